"""The lottery experiment: a tiny one from end to end, and the page shows what its file holds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trimtab.inner_training.tasks import make_family

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trimtab_lottery", ROOT / "experiments" / "lottery.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


lottery = load()


def test_the_page_shows_the_figures_of_the_file() -> None:
    rows = json.loads((ROOT / "docs" / "results" / "lottery.json").read_text())["rounds"]
    page = (ROOT / "docs" / "structure.md").read_text().splitlines()
    assert all(line in page for line in lottery.table(rows))


def test_a_tiny_one_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, picture = tmp_path / "lottery.json", tmp_path / "lottery.png"
    options = ["--tasks", "2", "--rounds", "3", "--steps", "20", "--out", str(file), "--figure", str(picture)]
    monkeypatch.setattr(sys, "argv", ["lottery.py", *options])
    monkeypatch.setattr(lottery, "SHOWN", (2,))
    lottery.main()
    rows = json.loads(file.read_text())["rounds"]
    assert [row["density"] for row in rows] == pytest.approx([1, 0.8, 0.64], abs=1e-3)
    for row in rows:
        for name in lottery.ARMS:
            middle, low, high = row[name]["accuracy"]
            assert 0 <= low <= middle <= high <= 1
    assert rows[0]["ticket@k"]["minus_ticket"] == rows[0]["shuffled"]["minus_ticket"] == [0, 0, 0]
    assert len(lottery.table(rows)) == 4 and picture.stat().st_size > 1000


def test_arms_of_a_task_differ_in_what_they_should() -> None:
    family = make_family("digits-mlp")
    first, second = next(iter(lottery.tasks(family, 1, 50)))
    assert np.array_equal(first.rows, second.rows) and first.seed == second.seed
    assert not np.array_equal(first.parameters["layers.0.weight"], second.parameters["layers.0.weight"])
    assert first.traits["label_noise"] == 0 and first.traits["classes"] >= 8
