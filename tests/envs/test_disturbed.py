"""Disturbances and deadlines in environments and evaluations: what is recorded, when episodes end, what the guard mends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.envs.tiny import scenario
from trimtab.agents.evaluate import Evaluator
from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.episode import Episodes
from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.envs.vector_env import TrimtabVectorEnv
from trimtab.errors import MismatchError
from trimtab.inner_training.disturbances import DISTURBANCES, Event
from trimtab.policies.registry import load_policy

RANDOM: dict[str, Any] = {"disturbances": [{"kind": kind, "rate": 1.0} for kind in DISTURBANCES]}


def held(config: Scenario, seed: int = 3) -> list[dict[str, Any]]:
    """The infos of an episode in which nothing is moved."""
    env = TrimtabEnv(config)
    infos = [env.reset(seed=seed)[1]]
    while "run" not in infos[-1]:
        infos.append(env.step(np.zeros(len(config.levers), dtype=np.float32))[4])
    return infos


def test_what_befalls_a_run_is_recorded() -> None:
    first, *steps = held(scenario("sgd", **RANDOM))
    assert first["events"] and all(isinstance(event, Event) for event in first["events"])
    for kind in DISTURBANCES:
        active = {
            step for one in first["events"] if one.kind == kind for step in range(one.first, one.first + one.steps)
        }
        for info in steps:
            inside = {step for step in active if info["step"] - 3 <= step < info["step"]}
            assert info["disturbed"][kind] == len(inside)
        last = steps[-1]
        assert last["run"]["disturbed"][kind] == sum(info["disturbed"][kind] for info in steps)
    assert steps[-1]["run"]["clock"] == steps[-1]["clock"] >= steps[-1]["step"]


def test_a_vector_meets_the_faults_of_its_seeds_and_new_ones_after_a_reset() -> None:
    config = scenario("sgd", **RANDOM)
    env = TrimtabVectorEnv(config, 3, mode="eager")
    _, info = env.reset(seed=5)
    first = list(info["events"])
    for slot in range(3):
        assert first[slot] == held(config, 5 + slot)[0]["events"]
    episodes = env.episodes
    for _ in range(40):
        *_, ended, _, info = env.step(np.zeros(env.action_space.shape, dtype=np.float32))
        if ended.all():
            break
    assert ended.all()
    for slot in range(3):
        assert info["events"][slot] != first[slot]
        assert info["final_info"]["run"]["disturbed"]["lr-spike"][slot] >= 0
    assert not any(steps.any() for steps in episodes.disturbed_steps.values())


def test_scenarios_without_disturbances_say_nothing_of_them() -> None:
    infos = held(scenario())
    for info in (*infos, infos[-1]["run"]):
        assert not {"events", "disturbed", "clock"} & set(info)


@pytest.mark.parametrize("kind", ["nan-gradient", "inf-gradient"])
def test_the_guard_mends_a_gradient_that_is_no_number(kind: str) -> None:
    faults = [{"kind": kind, "at": 20, "steps": 1}]
    infos = held(scenario("sgd", disturbances=faults, levers=["lr"]))
    assert [info["step"] for info in infos if info.get("rolled_back")] == [21]
    assert not infos[-1]["run"]["diverged"] and infos[-1]["step"] == 60
    unguarded = held(scenario("sgd", disturbances=faults, levers=["lr"], guard={"rollback": False}))
    assert unguarded[-1]["run"]["diverged"] and unguarded[-1]["step"] == 21


@pytest.mark.parametrize(("deadline", "end"), [(None, 60), (0.0, 15), (0.5, 24), (10.0, 60)])
def test_an_episode_ends_when_its_clock_passes_the_deadline(deadline: float | None, end: int) -> None:
    slow = [{"kind": "slow-steps", "at": 0, "steps": 1000, "severity": 4}]
    infos = held(scenario("sgd", disturbances=slow, deadline=deadline))
    assert infos[-1]["step"] == end and infos[-1]["clock"] == 4 * end
    assert not infos[-1]["run"]["diverged"]


def test_a_deadline_without_slow_steps_changes_nothing() -> None:
    assert held(scenario("sgd", deadline=0.0))[-1]["step"] == 60


def test_a_deadline_is_seen() -> None:
    slow = [{"kind": "slow-steps", "at": 30, "steps": 1000, "severity": 2}]
    config = scenario("sgd", disturbances=slow, deadline=0.5, signals=["deadline_left", "deadline_available"])
    episodes = Episodes(config, 1, mode="eager")
    seen = [episodes.reset(np.ones(1, dtype=bool), np.zeros(1, dtype=np.int64))[0]]
    while not episodes.ended[0]:
        seen.append(episodes.step(np.zeros((1, len(config.levers)))).observations[0])
    left = [1 - clock / 90 for clock in (*range(0, 31, 3), *range(36, 91, 6))]
    np.testing.assert_allclose(np.array(seen)[:, 0], left, atol=1e-6)
    assert (np.array(seen)[:, 1] == 1).all()
    blind = Episodes(config.replace(deadline=None), 1, mode="eager")
    blind.reset(np.ones(1, dtype=bool), np.zeros(1, dtype=np.int64))
    assert not blind.step(np.zeros((1, len(config.levers)))).observations.any()


def test_runs_that_a_deadline_cuts_off_are_late() -> None:
    slow = [{"kind": "slow-steps", "at": 30, "steps": 1000, "severity": 2}]
    config = scenario("sgd", disturbances=slow, deadline=0.2)
    found = Evaluator(config, runs=2, mode="eager").play(load_policy("constant"))
    assert found.late.all() and (found.inner_steps < found.budgets).all()
    in_time = Evaluator(config.replace(deadline=2.0), runs=2, mode="eager").play(load_policy("constant"))
    assert not in_time.late.any() and (in_time.inner_steps >= in_time.budgets).all()


def test_runs_that_were_given_must_have_the_scenarios_disturbances() -> None:
    calm = Episodes(scenario(), 2, mode="eager")
    with pytest.raises(MismatchError, match="has 9 disturbances, the runs that were given 0"):
        Episodes(scenario(**RANDOM), 2, populations=calm.populations)


def test_evaluations_carry_the_same_faults_for_every_policy() -> None:
    evaluator = Evaluator(scenario("sgd", "wide", **RANDOM, guard={"rollback": False}), runs=6, mode="eager")
    one, other = (evaluator.play(load_policy(name)) for name in ("constant", "cosine"))
    assert set(one.disturbed) == set(DISTURBANCES)
    whole = ~one.diverged & ~other.diverged
    assert whole.any()
    for kind, steps in one.disturbed.items():
        assert steps.shape == (6,)
        np.testing.assert_array_equal(steps[whole], other.disturbed[kind][whole])
        np.testing.assert_array_equal(one.columns()[f"disturbed_{kind}"], steps)
    assert sum(steps.sum() for steps in one.disturbed.values()) > 0
    again = Evaluator(evaluator.scenario, runs=6, mode="eager", batch_of_runs=1).play(load_policy("constant"))
    for kind, steps in one.disturbed.items():
        np.testing.assert_array_equal(again.disturbed[kind], steps)


def test_the_disturbed_scenario_has_every_kind_and_reads_back(tmp_path: Any) -> None:
    config = SCENARIOS["digits-mlp-disturbed"]
    assert [one.kind for one in config.disturbance_settings] == list(DISTURBANCES)
    path = tmp_path / "file.yaml"
    path.write_text(config.to_yaml())
    assert load_scenario(path) == config


BAD = {
    "kind": ([{"kind": "lr-spik", "at": 0.5}], "unknown disturbance 'lr-spik'; did you mean 'lr-spike'"),
    "no time": ([{"kind": "lr-spike"}], "neither of at and rate"),
    "no share": ([{"kind": "lr-spike", "at": 1.5}], "at is 1.5; give a share of the budget"),
    "text": ([{"kind": "lr-spike", "at": "soon"}], r"disturbances\[0\].at is 'soon'; it must be a number or null"),
    "bool": ([{"kind": "lr-spike", "rate": True}], r"disturbances\[0\].rate is True; it must be a number or null"),
    "severity": ([{"kind": "label-noise", "rate": 1, "severity": 3}], "it must be between 0.0 and 1.0"),
    "a name": (["lr-spike"], r"disturbances\[0\] is 'lr-spike'; it must be a mapping with the keys kind, at"),
    "key": ([{"kind": "lr-spike", "rate": 1, "sevrity": 2}], "did you mean 'disturbances\\[0\\].severity'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_entries_are_named(name: str) -> None:
    entries, message = BAD[name]
    with pytest.raises(Exception, match=message):
        scenario(disturbances=entries)
    with pytest.raises(Exception, match="deadline is -1; it must be a number, at least 0"):
        scenario(deadline=-1)
