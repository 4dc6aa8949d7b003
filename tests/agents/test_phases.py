"""Measures of runs whose task changes, against the same figures taken by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from trimtab.agents.conditions import Conditions
from trimtab.agents.diagnostics import FIGURES
from trimtab.agents.evaluate import Evaluator
from trimtab.agents.phases import MEASURES, PhaseRecord
from trimtab.agents.results import Entry, summarise, to_csv
from trimtab.envs.catalogue import SCENARIOS
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.population import Population
from trimtab.inner_training.tasks import make_family
from trimtab.policies.registry import load_policy

FIGURE_NAMES = {name for name, _ in FIGURES.values()}
NAME = "class-incremental-digits"
UNGUARDED = GuardConfig.bare()  # plain runs have no guard


@pytest.mark.parametrize(("name", "hard"), [(NAME, range(5)), ("alternating-classes", range(0, 10, 2))])
def test_measures_are_those_of_plain_runs(name: str, hard: range) -> None:
    evaluator = Evaluator(SCENARIOS[name], runs=3, mode="eager", batch_of_runs=2)
    calm = Conditions(guard=UNGUARDED, learning_rates={"sgd": 0.01, "adaptive": 1e-3})
    found = evaluator.play(load_policy("constant"), calm).measures
    assert set(found) == {*MEASURES, *FIGURE_NAMES}
    for run, instance in enumerate(calm.apply(evaluator.instances())):
        alone = Population(make_family(name), 1, mode="eager", score=True, clip=False)
        alone.reset([0], [instance])
        online, at_end = [], []
        length = instance.phases[1].first_step
        phases = range(len(instance.phases))
        for phase in phases:
            scores = alone.advance(length).to_host().scores
            assert scores is not None
            online.append(scores.mean())
            at_end.append(float(alone.evaluate("test", phase=phase, score=True)))
        at_last = [float(alone.evaluate("test", phase=phase, score=True)) for phase in phases]
        early = [at_end[phase] for phase in hard if phase < len(phases) / 3]
        forgotten = np.mean([at_end[phase] - at_last[phase] for phase in hard if phase < len(phases) - 1])
        judged = [[values[phase] for phase in hard] for values in (at_end, at_last)]
        wanted = [np.mean(online), np.mean(judged[0]), np.mean(early), np.mean(judged[1]), forgotten]
        np.testing.assert_allclose([found[name][run] for name in MEASURES], wanted, atol=0.02)


class Lost(SimpleNamespace):
    """Populations whose runs score 0.2 at whatever they are asked, having diverged."""

    def phase_score(self, phase: int) -> np.ndarray:
        return np.full(2, 0.9 if phase == 0 and not self.dead else 0.2)


def test_phases_that_a_run_did_not_reach_count_as_what_is_left_of_it_scores() -> None:
    instance = make_family(NAME).draw(0, held_out=False)
    populations = Lost(dead=False)
    episodes = SimpleNamespace(scenario=SimpleNamespace(interval=10), populations=populations)
    record = PhaseRecord(episodes, [instance, instance])  # type: ignore[arg-type]

    def note(step: int, ended: bool) -> None:
        result = SimpleNamespace(score=np.full(2, 0.5), step=np.full(2, step))
        record.note(result, np.arange(2), np.ones(2, dtype=bool), np.full(2, ended))  # type: ignore[arg-type]

    note(instance.phases[1].first_step, ended=False)
    populations.dead = True
    note(instance.phases[1].first_step + 10, ended=True)
    found = record.measures()
    np.testing.assert_allclose(found["phase_score"], (0.9 + 4 * 0.2) / 5)
    np.testing.assert_allclose(found["forgetting"], (0.9 - 0.2) / 4)
    done, budget = 2, -(-instance.steps // 10)
    np.testing.assert_allclose(found["online_score"], (0.5 * done + 0.2 * (budget - done)) / budget)


def test_a_family_without_a_score_is_judged_online_by_its_losses() -> None:
    evaluator = Evaluator(SCENARIOS["changing-regression"], runs=2, mode="eager")
    calm = Conditions(guard=UNGUARDED, learning_rates={"sgd": 1e-4, "adaptive": 1e-4})
    found = evaluator.play(load_policy("constant"), calm).measures["online_score"]
    for run, instance in enumerate(calm.apply(evaluator.instances())):
        alone = Population(make_family("changing-regression"), 1, mode="eager", clip=False)
        alone.reset([0], [instance])
        losses = alone.advance(instance.steps).to_host().losses[:, 0]
        wanted = -np.log(alone.family.bounded(losses)).mean()
        assert found[run] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("interval", [5, 10, 17])
def test_what_is_measured_when_a_phase_ends_is_unknown_where_no_interval_ends(interval: int) -> None:
    evaluator = Evaluator(SCENARIOS["changing-regression"].replace(interval=interval), runs=2, mode="eager")
    found = evaluator.play(load_policy("constant")).measures
    assert set(found) == {*MEASURES, *FIGURE_NAMES}
    assert (found["online_score"] != found["phase_score"]).all()
    ends = ("phase_score", "early_score", "forgetting")
    for name, values in found.items():
        if name != "stability_margin":
            assert np.isfinite(values).all() == (interval != 17 or name not in ends), name


def test_tables_of_scenarios_with_and_without_measures_join() -> None:
    results = []
    for name in ("digits-mlp", NAME):
        evaluator = Evaluator(SCENARIOS[name], runs=2, mode="eager")
        found = evaluator.play(load_policy("constant"))
        entry = Entry(label="constant", setting="untuned", learned=False, evaluation=found)
        results.append(summarise([entry], name, {}, seed=0))
    header, *rows = to_csv(results).splitlines()
    assert header.count("forgetting") == 1
    assert len(rows) == 4 and all(row.count(",") == header.count(",") for row in rows)
    assert set(results[0].summaries[0].measures) == {"stability_margin"}
    assert set(results[1].summaries[0].measures) == {*MEASURES, *FIGURE_NAMES}


def test_a_mix_has_the_figures_of_each_family_and_nan_for_the_others() -> None:
    mix = SCENARIOS["digits-mlp"].replace(id="some-mix", families=["digits-mlp", NAME])
    found = Evaluator(mix, runs=4, mode="eager").play(load_policy("constant"))
    changing = np.array([family == NAME for family in found.families])
    assert changing.sum() == 2
    for name in MEASURES:
        assert (np.isfinite(found.measures[name]) == changing).all()
    entry = Entry(label="constant", setting="untuned", learned=False, evaluation=found)
    figures = summarise([entry], mix.id, {}, seed=0).summaries[0].measures
    assert figures["forgetting"] == pytest.approx(found.measures["forgetting"][changing].mean())


def test_figures_are_of_the_runs_that_have_them() -> None:
    evaluator = Evaluator(SCENARIOS["digits-mlp"], runs=12, mode="eager")
    found = evaluator.play(load_policy("constant")).measures["stability_margin"]
    assert (np.isnan(found) == evaluator.adaptive()).all()
    rates = evaluator.play(load_policy("constant"), Conditions(learning_rates={"sgd": 1e-4, "adaptive": 1e-4}))
    calm = rates.measures["stability_margin"][~evaluator.adaptive()]
    wild = found[~evaluator.adaptive()]
    assert (calm > 0.75).all() and (wild < calm - 0.05).mean() > 0.5 and (wild <= calm + 0.02).all()


def test_energy_is_shared_out_by_steps_where_a_meter_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        def __init__(self) -> None:
            self.read = 0

        def joules(self) -> float:
            self.read += 1
            return 100.0 * self.read

    evaluator = Evaluator(SCENARIOS["digits-mlp"], runs=3, mode="eager")
    made: list[int] = []
    monkeypatch.setattr("trimtab.agents.evaluate.open_meter", lambda device: made.append(len(evaluator._blocks)))
    assert "joules" not in evaluator.play(load_policy("constant")).measures
    assert made == [1], "what is compiled is compiled before"
    monkeypatch.setattr("trimtab.agents.evaluate.open_meter", lambda device: Meter())
    found = evaluator.play(load_policy("constant"))
    assert found.measures["joules"].sum() == pytest.approx(100.0)
    np.testing.assert_allclose(found.measures["joules"] / found.inner_steps, 100 / found.inner_steps.sum())
