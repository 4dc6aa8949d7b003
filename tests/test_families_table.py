"""The experiment that shows that every family learns: which figures it picks, and a tiny one from end to end."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.inner_training.problems import SmallDigits, family
from trimtab.inner_training.task import Instance, OptimizerSettings, Phase
from trimtab.inner_training.tasks import BUILT_IN


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "experiments" / "families.py"
    spec = importlib.util.spec_from_file_location("trimtab_families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


families = load()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_page_shows_the_figures_of_every_family_and_each_learns(name: str) -> None:
    docs = Path(__file__).parents[1] / "docs"
    means = json.loads((docs / "results" / "families.json").read_text())["families"][name]["mean"]
    accuracy = f"{means['accuracy']:.2f}" if "accuracy" in means else ""
    row = " | ".join([f"`{name}`", *(f"{means[column]:.3g}" for column in families.COLUMNS), accuracy])
    assert f"| {row} |" in (docs / "tasks.md").read_text()
    assert means["tuned"] < 0.8 * means["initial"]
    assert min(means["rate / 10"], means["rate x 10"]) > 1.05 * means["tuned"]


def test_the_grid_is_that_of_the_recipes_and_a_decade_at_either_end() -> None:
    for rule, ends in (("sgd", (1e-5, 10.0)), ("adam", (1e-6, 1.0))):
        instance = family().instance(0, OptimizerSettings(rule=rule, lr=0.3))
        rates = [run.optimizer.lr for run in families.at_every_rate(instance)]
        assert len(rates) == 13
        np.testing.assert_allclose(rates, np.geomspace(*ends, 13))


def traces(steps: list[int]) -> dict[str, np.ndarray]:
    """Losses of which every one is different; validation is best at place 5 at step 100, and at place 0 at the ends."""
    validation = np.ones((len(steps), 13))
    validation[steps.index(100), 5] = 0.5
    validation[steps.index(100), 0] = validation[steps.index(100), 12] = 0.1  # outside the four decades
    validation[-1, 7] = 0.0
    test = 10.0 + np.arange(13.0 * len(steps)).reshape(len(steps), 13)
    return {"steps": np.array(steps), "validation": validation, "test": test}


def test_figures_of_an_instance() -> None:
    instance = family().instance(0, steps=100)
    found = families.summary(instance, traces([0, 50, 100, 150]))
    assert found["tuned_rate"] == pytest.approx(1e-5 * 10**2.5)
    assert [found[name] for name in families.COLUMNS] == [10, 36 + 5, 10, 36 + 3, 36 + 7]


def test_best_is_of_the_last_phase() -> None:
    phases = (Phase(0, (90, 20, 40)), Phase(50, (90, 20, 40)))
    instance = replace(family().instance(0, steps=100), phases=phases)
    assert families.summary(instance, traces([0, 50, 100, 150]))["best"] == 10 + 13


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Short(SmallDigits):
        def draw(self, seed: int, *, held_out: bool = False) -> Instance:
            return self.instance(seed, steps=(60, 40)[seed])

    monkeypatch.setattr(families, "make_family", lambda name: Short())
    out = tmp_path / "new" / "table.json"
    monkeypatch.setattr(sys, "argv", ["families.py", "--families", "digits", "--runs", "2", "--out", str(out)])
    families.main()
    assert "digits" in capsys.readouterr().out
    found = json.loads(out.read_text())["families"]["digits"]
    mean = found["mean"]
    assert mean["initial"] == pytest.approx(math.log(10), rel=0.1)
    assert mean["best"] <= mean["tuned"] < 0.7 * mean["initial"]
    assert max(mean["rate / 10"], mean["rate x 10"]) > 1.2 * mean["tuned"]
    assert [row["steps"] for row in found["instances"]] == [60, 40]
    for column in families.COLUMNS:
        assert mean[column] == pytest.approx(np.mean([row[column] for row in found["instances"]]))
