"""The examples in the docstrings of the studies."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path

import pytest
from experiments.pages import filled, publish, table

from trimtab.errors import UserError

ROOT = Path(__file__).parents[1]
NAMES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "experiments").glob("**/*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0 and failed == 0


def test_publishing_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, out = tmp_path / "page.md", tmp_path / "new" / "figures.json"
    page.write_text("before\n<!-- table: x -->\n\nold\n\n<!-- end -->\nafter\n")
    publish({"a": 1}, {"x": table(["h"], [["1"]])}, out, page)
    assert page.read_text() == "before\n<!-- table: x -->\n\n| h |\n| --- |\n| 1 |\n\n<!-- end -->\nafter\n"
    assert json.loads(out.read_text()) == {"a": 1} and "| 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    ["<!-- table: x -->\nold", "<!-- table: x -->\nold\n<!-- table: y -->\n<!-- end -->"],
    ids=["none", "another's"],
)
def test_a_table_without_an_end_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="table 'x' of the page has no end"):
        filled(text, {"x": ["new"]})
