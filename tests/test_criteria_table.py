"""The study of criteria: its statistics, its parts, a tiny study from end to end, and the page."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments.criteria import __main__ as script
from experiments.criteria import costs, dense, looks, measure, page, study
from experiments.criteria.arms import FRESH, Arm, Plan, Slots, Workshop
from experiments.criteria.dense import Calibrator, Choice, Dense, Scores
from experiments.criteria.tasks import TASKS, narrowed
from experiments.pages import filled
from scipy.stats import ttest_rel

from trimtab.inner_training.structure.criteria import CRITERIA

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "criteria.json"
STUDIED = pytest.mark.skipif(not RESULTS.exists(), reason="the study has yet to be run")
TINY = Plan(seeds=2, steps=2, tuning=2, rate=0.01, sparsities=(0.5, 0.97), slots=3)


@STUDIED
def test_the_page_shows_the_figures() -> None:
    text, found = (DOCS / "criteria.md").read_text(), json.loads(RESULTS.read_text())
    assert filled(text, page.tables_of(found)) == text
    for name, lines in page.tables_of(found).items():
        assert f"<!-- table: {name} -->\n\n" + "\n".join(lines) in text


def test_paired_tests_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=8) + 1, rng.normal(size=8)
    expected = ttest_rel(one, other)
    assert measure.p_value(one - other) == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert measure.interval(one - other)[1:] == pytest.approx([ends.low, ends.high], abs=1e-4)
    assert measure.p_value(np.zeros(3)) == 1 and measure.p_value(np.ones(3)) == 0


def test_holm_stops_at_the_first_that_fails() -> None:
    assert measure.holm({"a": 0.01, "b": 0.02, "c": 0.04}) == {"a", "b", "c"}
    assert measure.holm({"a": 0.02, "b": 0.02, "c": 0.04}) == set()
    assert measure.holm({"a": 0.001, "b": 0.03, "c": 0.001}) == {"a", "b", "c"}
    rows = measure.against({"up": np.array([2.0, 2.1, 2.2]), "same": np.zeros(3)}, np.zeros(3))
    assert rows["up"]["verdict"] == 1 and rows["same"]["verdict"] == 0


def test_verdicts_count_both_ways() -> None:
    rows: dict[str, object] = {"random": [0.5, 0.4, 0.6], "spread": {"up": 0.1}}
    for name, ends, verdict in (("up", [0.1, 0.2], 1), ("above", [0.01, 0.2], 0), ("down", [-0.2, -0.1], -1)):
        rows[name] = {"value": [0.5, 0.4, 0.6], "minus_control": [sum(ends) / 2, *ends], "verdict": verdict}
    found = {
        "plan": {"sparsities": [0.5]},
        "tasks": {"one": {"layer": {"0.5": dict.fromkeys(("accuracy before", "accuracy", "loss"), rows)}}},
    }
    before, _, loss = page.verdicts(found)[2:]
    assert before == "| `one` | accuracy before | 1 (2) better, 1 (1) worse, of 3 |"
    assert loss == "| `one` | loss after | 1 (1) better, 1 (2) worse, of 3 |"


def begun(name: str) -> tuple[Calibrator, Dense]:
    task, calibrator = TASKS[name], Calibrator(replace(TASKS[name], calibration=4), 4)
    own = [task.recipe(one, 0.01, 2) for one in task.instances(task.family(), 2, 0, held_out=True)]
    instances = [*own, *own]
    values = [{key: torch.from_numpy(value) for key, value in one.parameters.items()} for one in instances]
    calibrator.show(instances, values, 0)
    return calibrator, Dense(instances, values, {})


@pytest.mark.parametrize("name", ["sprites-conv", "sprites-vit", "sprites-vit-heads"])
def test_a_network_without_its_units_is_the_smaller_network(name: str) -> None:
    calibrator, runs = begun(name)
    task, family = TASKS[name], calibrator.family
    rng = np.random.default_rng(0)
    gone = {
        group: torch.from_numpy(rng.random(units) < 0.6) for group, units in zip(task.groups, task.widths, strict=True)
    }
    gone = {group: units & (torch.arange(len(units)) % 8 != 0) for group, units in gone.items()}
    widths = tuple(int((~units).sum()) for units in gone.values())
    small, one = task.family(widths).module, narrowed(family, runs.instances[0], gone)
    small.load_state_dict({key: torch.from_numpy(value) for key, value in (one.parameters | one.buffers).items()})
    structure, population = calibrator.structure, calibrator.population
    structure.remove({group: units.expand(4, -1) for group, units in gone.items()})
    whole = task.family().module
    whole.load_state_dict({**population.parameters_of(0), **dict(whole.named_buffers())})
    x = family.inputs[:5]
    torch.testing.assert_close(small(x), whole(x), atol=1e-5, rtol=1e-4)
    assert task.multiplications(widths) < task.multiplications(task.widths)


def test_a_transformer_keeps_the_width_of_its_heads() -> None:
    def blocks(name: str, widths: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return [(one.heads, one.head_width, one.units) for one in TASKS[name].family(widths).module.blocks]

    assert blocks("sprites-vit-heads", (3, 5, 1, 64)) == [(3, 4, 5), (1, 4, 64)]
    for name in ("sprites-vit", "language"):
        assert blocks(name, (7, 2)) == [(2, 16, 7), (2, 16, 2)]


def test_every_criterion_can_be_gathered_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "FEW", 1)
    monkeypatch.setattr(dense, "MANY", 1)
    calibrator, _ = begun("sprites-conv")
    scores = Scores(calibrator, many=True)
    assert set(dense.compared()) | set(dense.SAME) == set(CRITERIA)
    for choice in dense.choices():
        gone, parameters = scores.chosen(choice, 0.75)
        assert sum(int(units[0].sum()) for units in gone.values()) == 48, choice
        if choice.scope == "layer":
            assert all((units.sum(1) == 24).all() for units in gone.values()), choice
        rows = parameters[0]["layers.0.weight"][gone["layers.0"][0]]
        assert (rows == 0).all() and len(rows)
    for same, other in dense.SAME.items():
        pairs = (scores.chosen(Choice(name), 0.5)[0]["layers.1"] for name in (same, other) if name != "agf-first")
        assert len({tuple(map(tuple, one.tolist())) for one in pairs}) == 1
    overlaps = looks.twins(scores, 2, (0.5,))
    assert overlaps["order"]["magnitude"]["0.5"] == [1.0, 1.0]  # the twins of this test are the same networks
    assert max(overlaps["initial"]["magnitude"]["0.5"]) < 1
    left = looks.of_agf(scores, 2, (0.5,))
    assert left["calibrations"]["log"]["0.5"] == left["calibrations"]["none"]["0.5"] == [1.0, 1.0]


def test_arms_begin_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "FEW", 1)
    monkeypatch.setattr(dense, "MANY", 1)
    calibrator, runs = begun("sprites-conv")
    work = Workshop(TASKS["sprites-conv"], TINY, runs).jobs(Scores(calibrator, many=True))
    fresh = work[Arm(Choice("agf"), 0.5, FRESH).key]
    kept = work[Arm(Choice("agf"), 0.5).key]
    assert [job.widths for job in fresh] == [(16, 16)] * 2
    assert not np.array_equal(fresh[0].instance.parameters["head.weight"], kept[0].instance.parameters["head.weight"])
    assert [job.instance.seed for job in fresh] == [job.instance.seed for job in kept]
    assert kept[0].instance.seed != runs.instances[0].seed
    assert work[Arm(Choice("agf"), 0.5, FRESH, True).key][0].instance.steps == TINY.steps + TINY.tuning
    every = work[Arm(Choice("agf", "none"), 0.5).key]
    assert every[0].widths == (32, 32) and sum(int(units.sum()) for units in every[0].gone.values()) == 32
    rows = Slots(TASKS["sprites-conv"], (32, 32), 3).play(every)
    lost = tuple(32 - int(units.sum()) for units in every[0].gone.values())
    task = TASKS["sprites-conv"]
    assert rows[0, 3] == pytest.approx(task.multiplications(lost) / task.multiplications(task.widths))
    assert (rows[:, :2] >= 0).all() and (rows[:, :2] <= 1).all()


def test_multiplications_are_counted() -> None:
    conv, vit, heads = (TASKS[name] for name in ("sprites-conv", "sprites-vit", "sprites-vit-heads"))
    assert conv.multiplications((2, 3)) == 64 * 9 * 2 + 16 * 2 * 9 * 3 + 16 * 3 * 16
    assert vit.multiplications((64, 64)) - vit.multiplications((63, 64)) == 16 * 2 * 32
    assert vit.multiplications((64, 40)) == vit.multiplications((40, 64))
    head = 16 * 32 * 3 * 4 + 2 * 16 * 16 * 4 + 16 * 4 * 32  # what makes a head, what it looks at, and what reads it
    assert heads.multiplications((8, 64, 8, 64)) - heads.multiplications((8, 64, 7, 64)) == head
    assert costs.work(vit)["blocks.0.up"] == pytest.approx(16 * 2 * 32 / vit.multiplications((64, 64)))


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(script, "SMALL", replace(TINY, sparsities=(0.97,), slots=32))
    monkeypatch.setattr(dense, "FEW", 1)
    monkeypatch.setattr(dense, "MANY", 1)
    monkeypatch.setattr(costs, "REPEATS", 1)
    monkeypatch.setitem(TASKS, "sprites-conv", replace(TASKS["sprites-conv"], judged=32, calibration=4))
    for module in (dense, study):
        monkeypatch.setattr(module, "MOMENTS", (0.0, 1.0))
    out, keep, text = tmp_path / "out", tmp_path / "keep", tmp_path / "page.md"
    text.write_text("<!-- table: scratch -->\n<!-- end -->\n")
    line = [
        "criteria",
        "--small",
        "--tasks",
        "sprites-conv",
        "--out",
        str(out),
        "--keep",
        str(keep),
        "--page",
        str(text),
    ]
    monkeypatch.setattr(sys, "argv", line)
    script.main()
    assert "inherited, agf" in capsys.readouterr().out
    assert "| `sprites-conv` | fresh, long |" in text.read_text()
    assert (out / "criteria.png").stat().st_size > 1000 and (out / "agf_range.png").stat().st_size > 1000
    found = json.loads((out / "criteria.json").read_text())
    assert len(page.tables_of(found)) == len(page.GENERAL) + 2
    monkeypatch.setattr(dense, "Population", lambda *_: pytest.fail("it was kept"))
    script.main()
    assert json.loads((out / "criteria.json").read_text()) == found
