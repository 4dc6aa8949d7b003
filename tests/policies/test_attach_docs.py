"""The page and the example about attaching do what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "attach.md").read_text(encoding="utf-8"), re.DOTALL)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    names = runpy.run_path(str(script))
    assert len(blocks) == 2
    assert "policy cosine, mode act: 100 steps" in capsys.readouterr().out
    assert names["again"].multipliers == {"lr": 0.0}


@pytest.mark.parametrize("policy", ["greedy", "default"])
def test_the_example_runs_and_helps(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "attach_pytorch.py"))
    example["main"](policy)
    last = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(rf"test accuracy: ([\d.]+) alone, ([\d.]+) with {policy}", last)
    assert found is not None
    assert float(found[2]) > float(found[1])
