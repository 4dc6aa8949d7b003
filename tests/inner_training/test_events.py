"""Levers that fire: in populations, in a module run, and under a controller, the same."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.inner_training.problems import family
from tests.policies.live import Loop, Scripted, adamw, sgd
from trimtab.errors import MismatchError, UnknownNameError
from trimtab.inner_training.events import EVENTS, HALF_LIFE, PULL, REST
from trimtab.inner_training.guard import Guard, GuardConfig, Reason
from trimtab.inner_training.levers import resolve_levers
from trimtab.inner_training.live_events import forget_moments, has_moments
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import OptimizerSettings
from trimtab.policies.attach import attach
from trimtab.policies.registry import check_policy

DOCS = Path(__file__).parents[2] / "docs"


def population(runs: int = 3, rule: str = "adam") -> Population:
    made = Population(family(), runs, mode="eager", rules=(rule,))
    settings = OptimizerSettings(rule=rule, lr=0.01, momentum=0.9)
    made.reset(range(runs), [replace(family().instance(seed, settings), steps=200) for seed in range(runs)])
    return made


def weights(made: Population) -> torch.Tensor:
    return made._learner.parameters.clone()


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_has_a_row(name: str) -> None:
    assert f"| `{name}` | {EVENTS[name].doc} | {EVENTS[name].source} |" in (DOCS / "levers.md").read_text()


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_touches_only_the_runs_that_it_happens_in(event: str) -> None:
    made, other = population(), population()
    for one in (made, other):
        for _ in range(3):
            one.advance(5)
            one.snapshot(np.ones(3, dtype=bool))
    made.fire(event, np.array([False, True, False]))
    for one in (made, other):
        for _ in range(2):
            one.advance(5)
    same = (weights(made) == weights(other)).all(1).tolist()
    assert same == [True, False, True]


def test_an_unknown_event_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="rollback"):
        population().fire("rolback", np.ones(3, dtype=bool))


def test_a_rollback_goes_back_to_the_confirmed_moment() -> None:
    made = population()
    made.advance(5)
    made.snapshot(np.ones(3, dtype=bool))
    confirmed = weights(made)
    made.advance(5)
    made.snapshot(np.ones(3, dtype=bool))
    made.advance(5)
    made.fire("rollback", np.ones(3, dtype=bool))
    assert torch.equal(weights(made), confirmed)
    assert (made.steps_done == 15).all()


def test_moments_begin_again_as_at_the_start() -> None:
    made = population()
    made.advance(20)
    made.fire("reset_moments", np.array([True, True, False]))
    learner = made._learner
    assert not learner.first[:2].any() and not learner.second[:2].any() and learner.updates.tolist() == [0, 0, 20]
    assert learner.first[2].any()


def test_an_anchor_pulls_as_it_says() -> None:
    made, free = population(1), population(1)
    for one in (made, free):
        one.advance(5)
        one.snapshot(np.ones(1, dtype=bool))
        one.advance(5)
        one.snapshot(np.ones(1, dtype=bool))
    anchor = made._ring.stable.parameters.clone()
    made.fire("anchor", np.ones(1, dtype=bool))
    made.advance(5), free.advance(5)
    expected = weights(free) + PULL * (anchor - weights(free))
    torch.testing.assert_close(weights(made), expected)
    before = weights(made)
    made.set_lr_multiplier(np.zeros(1))
    made.advance(1)
    share = PULL * 0.5 ** (1 / HALF_LIFE)
    torch.testing.assert_close(weights(made), before + share * (anchor - before))
    again = family().instance(5, OptimizerSettings(rule="adam", lr=0.01, momentum=0.9))
    made.reset([0], [again])
    free.reset([0], [again])
    made.advance(5), free.advance(5)
    assert torch.equal(weights(made), weights(free)), "a new run has no anchor"


def test_the_guard_lets_an_event_rest_and_counts_rollbacks() -> None:
    guard = Guard(GuardConfig(rollback_budget=1), resolve_levers(["lr"]), 2)
    wanted = np.array([True, False])
    first, _ = guard.permit_event("rollback", wanted)
    assert first.tolist() == [True, False] and guard.rollbacks.tolist() == [1, 0] and (guard.caution == 1).all()
    again, reason = guard.permit_event("rollback", wanted)
    assert not again.any() and reason.tolist() == [Reason.RESTING | Reason.SPENT, 0]
    once, _ = guard.permit_event("anchor", wanted)
    twice, _ = guard.permit_event("anchor", wanted)
    assert once.tolist() == [True, False] and not twice.any()
    copy = Guard(GuardConfig(rollback_budget=1), resolve_levers(["lr"]), 2)
    copy.load_state_dict(guard.state_dict())
    assert copy.permit_event("anchor", wanted)[1].tolist() == [Reason.RESTING, 0]
    off, reason = Guard(GuardConfig(rollback=False), resolve_levers(["lr"]), 1).permit_event("rollback", wanted[:1])
    assert not off.any() and reason.tolist() == [Reason.SPENT] and REST > 1


# --- live runs ------------------------------------------------------------------------------------------------------


def firing(kind: Any, event: str, at: int, **options: Any) -> Loop:
    """A loop whose policy fires an event at one decision (of five steps), and holds the rate."""
    loop = Loop(kind)
    table = [[1.0, 0.0]] * at + [[1.0, 1.0]] + [[1.0, 0.0]]
    policy = Scripted(table, levers={"lr": "targets", event: "events"}, decide_every=10)
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, **options)
    return loop


@pytest.mark.parametrize("kind", [sgd, adamw])
def test_a_controller_rolls_back_when_it_is_asked_to(kind: Any) -> None:
    loop = firing(kind, "rollback", 3)
    loop.run(10)
    confirmed = loop.weights()
    loop.run(19)
    loop.step()
    # At step 30 the moment of step 20 is the newest; the one before it is confirmed.
    assert loop.decisions[-1].rolled_back and not torch.equal(loop.weights(), confirmed)
    assert loop.controller.multipliers == {"lr": 1.0}
    loop.run(30)
    assert sum(decision.rolled_back for decision in loop.decisions) == 1
    assert np.isfinite(loop.losses).all()


def test_a_controller_forgets_moments_in_place() -> None:
    loop = firing(adamw, "reset_moments", 2)
    loop.run(19)
    state = loop.optimizer.state[next(loop.model.parameters())]
    held = state["exp_avg"]
    assert held.any()
    loop.step()
    assert state["exp_avg"] is held and not held.any() and float(state["step"]) == 0


def test_an_adviser_fires_nothing() -> None:
    loop, free = firing(adamw, "reset_moments", 2, mode="advise"), Loop(adamw)
    loop.run(30), free.run(30)
    assert torch.equal(loop.weights(), free.weights())


def test_an_anchor_pulls_a_live_run() -> None:
    loop, free = firing(sgd, "anchor", 3), firing(sgd, "anchor", 99)
    loop.run(30), free.run(30)
    assert torch.equal(loop.weights(), free.weights())
    loop.run(9), free.run(9)
    assert torch.equal(loop.weights(), free.weights()), "it pulls between intervals"
    loop.step(), free.step()
    assert not torch.equal(loop.weights(), free.weights())


def test_policies_name_events_of_the_table() -> None:
    with pytest.raises(MismatchError, match="rollback"):
        check_policy(Scripted([[1.0]], levers={"rolback": "events"}), "mine")  # type: ignore[dict-item]
    check_policy(Scripted([[1.0]], levers={"rollback": "events"}), "mine")


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
        lambda ps: torch.optim.Rprop(ps),
        lambda ps: torch.optim.Adadelta(ps),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01),
    ],
    ids=["Adagrad", "Rprop", "Adadelta", "RMSprop"],
)
def test_what_is_no_moment_is_not_forgotten(make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    assert not has_moments(optimizer)
    forget_moments(optimizer)
    assert str(optimizer.state_dict()["state"]) == str(before)


def test_an_optimizer_with_a_sequence_of_its_own_keeps_it() -> None:
    class AdamWScheduleFree(torch.optim.Adam):
        """A stand-in: its state is moments by name, and weights."""

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWScheduleFree([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    assert not has_moments(optimizer)


@pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.AdamW])
def test_steps_after_moments_were_forgotten_are_those_of_a_new_optimizer(make: Any) -> None:
    first, second = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    old, new = make([first], lr=0.1), make([second], lr=0.1)
    for _ in range(5):
        first.grad = torch.randn(3, generator=torch.Generator().manual_seed(0))
        old.step()
    with torch.no_grad():
        first.fill_(2.0)
    forget_moments(old)
    for _ in range(3):
        first.grad = second.grad = torch.tensor([1.0, -2.0, 0.5])
        old.step(), new.step()
    torch.testing.assert_close(first, second)
