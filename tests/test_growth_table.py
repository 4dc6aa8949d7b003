"""The study of growth: its page, its cells and plans, what is noted of a run, and a tiny study from end to end."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.growth_stability import __main__ as script
from experiments.growth_stability import arena, cells, grounds, measure, page, studies
from experiments.growth_stability.arena import Arena, Played, Run
from experiments.growth_stability.cells import DENSE, GROW, PRUNE, REMAIN, RESTART, Cell
from experiments.pages import filled
from scipy import stats

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "growth_stability.json"
STUDIED = pytest.mark.skipif(not RESULTS.exists(), reason="the study has yet to be run")


def found() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RESULTS.read_text())
    return result


@STUDIED
@pytest.mark.parametrize("name", page.TABLES)
def test_the_page_shows_the_figures(name: str) -> None:
    text = (DOCS / "growth.md").read_text()
    assert f"<!-- table: {name} -->" in text
    assert "\n".join(page.TABLES[name](found())) in text


@STUDIED
def test_the_page_is_filled_anew() -> None:
    text = (DOCS / "growth.md").read_text()
    assert filled(text, page.tables_of(found())) == text


@pytest.mark.parametrize("percent", cells.COMPACTNESS)
def test_units_leave_the_wanted_share_of_the_weights(percent: int) -> None:
    inputs, units, outputs = 256, 96, 16
    left = cells.units_at(percent, inputs, units, outputs)
    shares = [
        (inputs * one + one * one + one * outputs) / (inputs * units + units * units + units * outputs)
        for one in (left - 1, left, left + 1)
    ]
    assert abs(shares[1] - percent / 100) <= min(abs(share - percent / 100) for share in shares)


@pytest.mark.parametrize("cell", [one for one in studies.STUDIES["head"].cells if one.arm != "dense"])
def test_plans_begin_and_end_where_they_should(cell: Cell) -> None:
    plan = cells.plan(cell, 256, 96, 16)
    steps = np.diff(plan) * (1 if cell.arm == "grow" else -1)
    assert len(plan) == cell.cycles and plan[0] == (10 if cell.arm == "grow" else 96)
    assert plan[-1] == cells.units_at(cell.percent, 256, 96, 16)
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1


def test_every_treatment_is_swept() -> None:
    for study in studies.STUDIES.values():
        names = [cell.name for cell in study.cells]
        assert len(set(names)) == len(names)
        swept = {one.treatment for one in study.cells if one.percent in studies.SWEEP_AT and one.rated == one.treatment}
        assert swept == {cell.rated for cell in study.cells}


@pytest.fixture(scope="module")
def small() -> Arena:
    return Arena(grounds.perceptron(20), steps=40, points=10, size=7, mode="eager")


def played(small: Arena) -> dict[str, Played]:
    variants = [replace(cell, percent=50) for cell in (GROW, PRUNE, REMAIN, RESTART)]
    variants.append(replace(GROW, variant="ten", percent=50, cycles=10))
    variants.append(replace(GROW, variant="pairs", percent=50, method="pairing", newborn_state="transplant", scale=2.0))
    runs = [Run(cell, 0.05, 3) for cell in (DENSE, *variants)]
    return {run.cell.name: one for run, one in zip(runs, small.play(runs, note=lambda line: None), strict=True)}


def test_what_is_noted_of_runs(small: Arena) -> None:
    by_cell = played(small)
    wanted = cells.units_at(50, 64, 20, 10)
    for name, one in by_cell.items():
        edits = 0 if name == "dense" else 9 if "ten" in name else 4
        assert len(one.curve) == len(one.val_curve) == 10 and len(one.shock) == edits, name
        assert len(one.post) == len(one.exit) == (edits if name.startswith("grow") else 0), name
        assert one.units == (20 if name == "dense" else wanted)
        assert [len(units) for units in one.active.values()] == [one.units] * 2
        assert np.isfinite([*one.val_curve, one.val_accuracy, *one.curve, *one.shock, *np.ravel(one.post)]).all()
    assert by_cell["prune, 50 %"].curve[:2] == by_cell["prune, no rewind, 50 %"].curve[:2] == by_cell["dense"].curve[:2]
    assert by_cell["prune, 50 %"].curve != by_cell["prune, no rewind, 50 %"].curve
    assert by_cell["grow, 50 %"].curve[:2] == by_cell["grow, rewound, 50 %"].curve[:2]
    assert by_cell["grow, 50 %"].curve != by_cell["grow, pairs, 50 %"].curve


def test_retraining_keeps_the_units_and_begins_elsewhere(small: Arena) -> None:
    one = played(small)["prune, no rewind, 50 %"]
    run = Run(replace(REMAIN, percent=50), 0.05, 3 + studies.AGAIN, one.active)
    (again,) = small.play([run], note=lambda line: None)
    assert again.active == one.active and again.shock == [] and again.curve[0] != one.curve[0]


def test_two_speed_is_in_the_step_of_those_who_ask_only() -> None:
    own = Arena(grounds.perceptron(20), steps=40, points=10, size=3, mode="eager")
    fast, plain = replace(GROW, variant="fast", percent=50, speed=5.0), replace(GROW, percent=50)
    runs = [Run(fast, 0.05, 3), Run(plain, 0.05, 3), Run(plain, 0.05, 4)]
    first, second, _ = own.play(runs, note=lambda line: None)
    assert first.curve[:2] == second.curve[:2] and first.exit[0] != second.exit[0]
    assert own._population()[0]._feed.speed is not None


def test_a_rate_anew_has_the_mean_of_its_own_cosine_in_every_part_of_a_cycle(small: Arena) -> None:
    runs = [Run(cell, 0.05, 3) for cell in (DENSE, replace(GROW, percent=50, variant=cells.ANEW, anew=True))]
    game = arena._Game(small, runs, *small._population())
    whole = (1 + np.cos(np.pi * np.arange(10 * 32 + 1) / 320)) / 2  # ten points; cycles of two
    own = (1 + np.cos(np.pi * np.arange(65) / 64)) / 2
    for point in range(10):
        usual, anew = game._factors(point)
        scheduled = whole[32 * point : 32 * point + 33].mean()
        assert usual == 1
        assert anew * scheduled == pytest.approx(own[32 * (point % 2) : 32 * (point % 2) + 33].mean())


def test_an_interrupted_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep, ground = tmp_path / "deep" / "kept.jsonl", grounds.perceptron(20)
    runs = [Run(DENSE, 0.05, seed) for seed in range(3)]
    first = Arena(ground, 20, 10, 2, "eager", keep).play(runs, note=lambda line: None)
    monkeypatch.setattr(arena, "Population", lambda *_, **__: pytest.fail("it was kept"))
    assert Arena(ground, 20, 10, 2, "eager", keep).play(runs, note=lambda line: None) == first


def test_parities_are_those_of_newborns_by_hand() -> None:
    """The gradient of the values before the nonlinearity, by plain autograd, of the latest cohort against the others."""
    own = Arena(grounds.perceptron(20), steps=40, points=10, size=1, mode="eager")
    run = Run(replace(GROW, percent=50), 0.05, 3)
    game = arena._Game(own, [run], *own._population())
    game.begin()
    for point in range(4):
        game.train()
        game.edit(point + 1)
    structure, runs = game.structure, game.population
    x, y = runs.batch(0, int(runs.steps_done[0]))
    values = runs.parameters_of(0)
    before, h = [], x
    for layer in range(2):
        z = (h @ values[f"layers.{layer}.weight"].mT + values[f"layers.{layer}.bias"]).requires_grad_()
        before.append(z)
        h = torch.relu(z)
    loss = runs.family.loss(h @ values["layers.2.weight"].mT + values["layers.2.bias"], y).sum()
    logs = []
    for place, slope in enumerate(torch.autograd.grad(loss, before)):
        size = slope.abs().mean(0)
        newborn = structure.newborn[f"layers.{place}"][0]
        others = structure.active[f"layers.{place}"][0] & ~newborn
        logs.append(float((size[newborn].mean() / size[others].mean()).log()))
    assert game.played[0].post[-1][0] == pytest.approx(np.mean(logs), abs=1e-3)


def test_intervals_and_correlations_are_those_of_scipy() -> None:
    values = np.random.default_rng(0).normal(size=6)
    middle, low, high = measure.interval(values.tolist())
    expected = stats.t.interval(0.95, 5, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=1e-3) and middle == pytest.approx(values.mean(), abs=1e-4)
    others = values + np.random.default_rng(1).normal(size=6)
    assert measure.spearman(values, others) == pytest.approx(stats.spearmanr(values, others)[0], abs=1e-6)
    middle, low, high = measure.correlation(values.tolist(), others.tolist())
    assert -1 <= low <= middle <= high <= 1


def test_correlations_inside_cells_leave_out_what_cells_have_in_common() -> None:
    def run(parity: float, height: float) -> Played:
        return Played(key="", curve=[height], post=[[parity, 0.0]], exit=[[parity, 0.0]])

    groups = {"all": {str(cell): [run(cell + step, cell - step / 8) for step in range(3)] for cell in (0.0, 8.0, 16.0)}}
    row = measure.correlations(groups)["all"]["post"]
    assert row["cells"][0] == 1 and row["inside"][0] < -0.9 and row["runs"][0] > 0.7


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = [DENSE, *(replace(cell, percent=50) for cell in (GROW, PRUNE, REMAIN))]
    monkeypatch.setitem(studies.STUDIES, "perceptron", studies.Study(lambda: grounds.perceptron(20), few, True))
    monkeypatch.setattr(studies, "RATES", (0.1, 0.01))
    monkeypatch.setattr(measure, "REPETITIONS", 20)
    out, picture, text = tmp_path / "new" / "growth.json", tmp_path / "a.png", tmp_path / "page.md"
    text.write_text("<!-- table: perceptron -->\nold\n<!-- end -->\n")
    line = [
        "growth",
        "--small",
        "--studies",
        "perceptron",
        "--out",
        str(out),
        "--png",
        str(picture),
        "--page",
        str(text),
    ]
    monkeypatch.setattr(sys, "argv", line)
    script.main()
    assert "| cell | units |" in capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = result["perceptron"]["cells"]
    assert list(rows) == [cell.name for cell in few]
    assert list(result["perceptron"]["best"]) == [cell.treatment for cell in few]
    assert set(result["perceptron"]["best"].values()) <= {0.1, 0.01}
    assert rows["grow, 50 %"]["retrained"] and rows["grow, 50 %"]["post"] and "post" not in rows["dense"]
    assert page.TABLES["perceptron"](result)[2] in text.read_text() and "old" not in text.read_text()
    assert picture.stat().st_size > 1000
