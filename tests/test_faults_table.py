"""The fault study: what a case is, what counts as recovered, the page, and a tiny study from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from experiments.faults import __main__ as script
from experiments.faults import cases, measure, page, studies
from experiments.faults.cases import Case
from experiments.faults.play import Played
from experiments.pages import filled

from tests.inner_training.problems import SmallDigits
from trimtab.inner_training.disturbances import DISTURBANCES, DisturbanceSettings, Event
from trimtab.inner_training.population import Population

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "results" / "faults.json"


def found() -> dict[str, object]:
    result: dict[str, object] = json.loads(RESULTS.read_text())
    return result


STUDIED = pytest.mark.skipif(not (DOCS / "results" / "faults.json").exists(), reason="the study has yet to be run")


@STUDIED
@pytest.mark.parametrize("name", page.TABLES)
def test_the_page_shows_the_figures(name: str) -> None:
    text = (DOCS / "faults.md").read_text()
    assert f"<!-- table: {name} -->" in text
    assert "\n".join(page.TABLES[name](found())) in text


@STUDIED
def test_the_page_is_filled_anew() -> None:
    text = (DOCS / "faults.md").read_text()
    assert filled(text, page.tables_of(found())) == text


@pytest.mark.parametrize("kind", DISTURBANCES)
def test_faults_are_drawn_from_the_ranges_of_their_kind(kind: str) -> None:
    entry, faults = DISTURBANCES[kind], [cases.draw_fault(kind, run, 0, 400) for run in range(200)]
    assert all(80 <= one.first <= 240 for one in faults) and len({one.first for one in faults}) > 50
    assert all(entry.steps[0] <= one.steps <= entry.steps[1] for one in faults)
    assert all(entry.severity[0] * 0.999 <= one.severity <= entry.severity[1] * 1.001 for one in faults)
    assert cases.draw_fault(kind, 3, 0, 400) == faults[3] != cases.draw_fault(kind, 3, 1, 400)
    lasting = cases.draw_fault(kind, 3, 0, 400, to_the_end=True)
    assert lasting.first + lasting.steps == 400


def started(events: tuple[Event, ...]) -> Population:
    family = SmallDigits()
    kinds = [DisturbanceSettings(kind=kind, at=1) for kind in DISTURBANCES]
    runs = Population(family, 1, mode="eager", disturbances=kinds)
    runs.reset([0], [family.instance(0, steps=40)])
    assert runs.disturber is not None
    runs.disturber.plan([0], [events])
    return runs


def weights(runs: Population) -> np.ndarray:
    return np.concatenate([one.ravel() for one in runs.parameters_of(0).values()])


def test_a_perfect_rollback_is_the_moment_before_the_fault_when_it_is_over() -> None:
    case, one = Case(SmallDigits().instance(0, steps=40), Event("label-noise", 7, 9, 1.0)), np.ones(1, dtype=bool)
    restored = started(case.events)
    restored.advance(7)
    restored.snapshot(one), restored.snapshot(one)
    restored.advance(9)
    restored.restore(one)
    restored.advance(14)
    undone = started(case.undone)
    undone.advance(30)
    np.testing.assert_allclose(weights(undone), weights(restored), atol=1e-6)
    assert Case(case.instance, Event("slow-steps", 7, 9, 2.0)).undone == ()


def test_a_fresh_start_begins_at_the_shift_with_the_first_weights() -> None:
    case = Case(SmallDigits().instance(0, steps=40), Event("data-shift", 12, 28, 0.5))
    runs = started(case.fresh_start)
    first = weights(runs)
    runs.advance(12)
    assert (weights(runs) == first).all()
    runs.advance(1)
    assert (weights(runs) != first).any()


def played(curve: list[float], *, diverged: bool = False) -> Played:
    one = np.array([curve])
    return Played(
        first=np.zeros(1), curve=one, final=one[:, -1], diverged=np.array([diverged]), rollbacks=np.zeros(1), scores={}
    )


CALM = played([-0.2 * step for step in range(10)])


@pytest.mark.parametrize(
    ("above", "over", "extra"),
    [
        ([0] * 10, 20, 0),
        ([0] * 10, 25, 5),
        ([0, 0, 9, 9, 0, 0, 0, 0, 0, 0], 20, 30),
        ([0, 0, 9, 9, 0.1, 0.2, 0, 0, 0, 0], 20, 40),
        ([0, 0, 9, 9, 9, 9, 9, 9, 0, 0], 20, np.inf),
    ],
)
def test_a_run_is_back_when_three_decisions_are(above: list[float], over: int, extra: float) -> None:
    hit = played([value + high for value, high in zip(CALM.curve[0], above, strict=True)])
    width = measure.tolerance(CALM.first, CALM.curve)
    assert width == pytest.approx(0.05 * 1.6)
    back, steps = measure.recovery(hit, CALM, width, np.array([over]))
    assert (back[0], steps[0]) == (np.isfinite(extra), extra)
    lost, _ = measure.recovery(played(hit.curve[0].tolist(), diverged=True), CALM, width, np.array([over]))
    assert not lost[0]


def test_ratios_and_intervals() -> None:
    rng = np.random.default_rng(0)
    one, other = np.array([True] * 45 + [False] * 55), np.array([True] * 50 + [False] * 50)
    estimate, low, high = measure.ratio(one, other, rng)
    assert estimate == 0.9 and 0.75 < low < 0.9 < high < 1
    assert measure.interval(np.full(5, 2.0), rng) == [2.0, 2.0, 2.0]


def test_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cases, "STEPS", 80)
    monkeypatch.setattr(studies, "TUNED_ON", 2)
    monkeypatch.setattr(measure, "REPETITIONS", 10)
    out, keep, picture = tmp_path / "new" / "faults.json", tmp_path / "keep", tmp_path / "a.png"
    arguments = [
        "--runs",
        "4",
        "--families",
        "digits-mlp",
        "--policies",
        "constant",
        "--studies",
        "faults",
        "--training",
    ]
    line = ["faults", *arguments, "--keep", str(keep), "--out", str(out), "--png", str(picture)]
    monkeypatch.setattr(sys, "argv", line)
    script.main()
    assert "transient faults, 4 of each kind" in capsys.readouterr().out
    result = json.loads(out.read_text())
    rows = result["transient"]["all"]
    assert list(rows) == ["no controller", "perfect rollback", "constant"]
    assert rows["perfect rollback"]["of_perfect"][0] == 1
    assert rows["no controller"]["diverged"] > rows["constant"]["diverged"] == 0
    assert rows["no controller"]["minus_bare"] == [0, 0, 0]
    assert picture.stat().st_size > 1000 and len(list(keep.glob("*.npz"))) == 3
    monkeypatch.setattr(studies.Arena, "play", lambda *_: pytest.fail("it was kept"))
    script.main()
    assert list(json.loads(out.read_text())["transient"]["all"]) == list(rows)
