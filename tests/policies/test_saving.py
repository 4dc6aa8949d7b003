"""What a controller takes over from a saved state: verified as a whole, and nothing changed where it is refused."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.policies.live import Loop, Scripted, adamw, sgd
from tests.policies.made_up import learned

from trimtab.errors import MismatchError
from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach
from trimtab.policies.registry import load_policy


def build(policy: Any = "steady", **options: Any) -> Loop:
    loop = Loop(adamw)
    options = {"decide_every": 5, "total_steps": 100, **options}
    loop.controller = attach(loop.optimizer, model=loop.model, policy=policy, **options)
    return loop


def saved(policy: Any = "steady", steps: int = 23, **options: Any) -> dict[str, Any]:
    loop = build(policy, **options).run(steps)
    assert loop.controller is not None
    return json.loads(json.dumps(loop.controller.state_dict()))  # type: ignore[no-any-return]


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all mappings' entries."""
    if not isinstance(tree, dict):
        return []
    return [found for key, one in tree.items() for found in [(*path, key), *leaves(one, (*path, key))]]


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def refused(state: Any, policy: Any = "steady", match: str = "") -> None:
    """Loading this is refused, and changes nothing: the run goes on as one that never tried."""
    tried, alone = build(policy).run(7), build(policy).run(7)
    assert tried.controller is not None and alone.controller is not None
    before = json.dumps(tried.controller.state_dict())
    with pytest.raises(MismatchError, match=match):
        tried.controller.load_state_dict(state)
    assert json.dumps(tried.controller.state_dict()) == before
    assert torch.equal(tried.run(8).weights(), alone.run(8).weights())


@pytest.mark.parametrize("policy", ["steady", "learned"])
def test_every_entry_is_needed(policy: str) -> None:
    make: Callable[[], Any] = learned if policy == "learned" else lambda: policy
    state = saved(make())
    grows = (("steering", "memory"), ("journal",), ("run", "probe", "grad_norms"), ("policy_options",), ("signals",))
    paths = [
        path
        for path in leaves(state)
        if not any(path[: len(start)] == start and len(path) > len(start) for start in grows) and path[0] != "levers"
    ]
    assert len(paths) > 45
    loop = build(make())
    assert loop.controller is not None
    before = json.dumps(loop.controller.state_dict())
    for path in paths:
        broken = copy.deepcopy(state)
        del at(broken, path[:-1])[path[-1]]
        with pytest.raises(MismatchError, match=str(path[0 if path[-1] in ("__array__", "dtype") else -1])):
            loop.controller.load_state_dict(broken)
        assert json.dumps(loop.controller.state_dict()) == before, path


BROKEN: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "NaN": (("steering", "multipliers"), [[math.nan] * 2], r"steering.multipliers\[0\]\[0\] .* is nan; .* finite"),
    "negative": (
        ("steering", "multipliers", 0, 0),
        -50.0,
        "steering.multipliers of the lever 'lr' .* between 0 and 10000",
    ),
    "too large": (("steering", "multipliers", 0, 0), 1e5, "steering.multipliers of the lever 'lr'"),
    "another shape": (("steering", "multipliers"), [[1.0]], r"steering.multipliers\[0\] .* a list of 2"),
    "no list": (("steering", "moves"), 3.0, "steering.moves .* a list of 1"),
    "a text": (("steering", "moves", 0, 0), "x", r"steering.moves\[0\]\[0\] .* a number"),
    "other levers": (("steering", "levers", 0), "momentum", "steering.levers"),
    "availability": (("steering", "available", 0, 0), 0.5, "true or false"),
    "no caution": (("steering", "guard", "divergence", "caution"), [math.nan], "divergence.caution"),
    "too bold": (("steering", "guard", "divergence", "caution"), [3.0], r"divergence.caution\[0\] .* between 0 and 1"),
    "rollbacks": (("steering", "guard", "divergence", "rollbacks"), [-1], "rollbacks.* of at least 0"),
    "half a rollback": (("steering", "guard", "divergence", "rollbacks"), [0.5], "rollbacks.* whole number"),
    "no guard": (("steering", "guard"), [], "steering.guard .* a mapping"),
    "an event": (("steering", "guard", "events"), {"explode": [0]}, "events .* 'explode'"),
    "memory": (("steering", "memory", "grad_average/mean"), [math.inf], "memory.grad_average/mean"),
    "two runs": (("steering", "memory", "grad_average/mean"), [1.0, 1.0], "memory.grad_average/mean"),
    "words": (("steering", "memory", "grad_average/mean"), "x", "memory.grad_average/mean"),
    "steps": (("run", "steps"), -1, "run.steps"),
    "ahead": (("run", "recorded"), 99, "run.recorded"),
    "no rate": (("run", "initial_lr"), math.nan, "run.initial_lr"),
    "losses": (("run", "losses"), [1.0, "x"], r"run.losses\[1\]"),
    "a loss too many": (("run", "losses"), [1.0] * 4, "run.losses .* of the steps 21 to 23"),
    "no losses": (("run", "losses"), [], "run.losses .* of the steps 21 to 23"),
    "known after all": (("run", "unknown"), True, "run.unknown .* false"),
    "too early": (
        ("run", "probe", "update_norm"),
        [1.0] * 3,
        "run.probe.update_norm .* None before step 5 of the interval",
    ),
    "gradients to come": (("run", "probe", "grad_norms"), {"4": 1.0}, "run.probe.grad_norms .* of steps done"),
    "another rate": (("steering", "multipliers", 0, 0), 0.7, r"lr_multiplier .* 0\.7, as multipliers"),
    "decided later": (("decided_at",), 24, "decided_at .* no more than run.steps, 23"),
    "half of an average": (
        ("steering", "memory"),
        {"grad_average/mean": [1.0]},
        "no steering.memory.grad_average/weight",
    ),
    "no memory": (("steering", "memory"), {}, "no steering.memory.grad_average/mean"),
    "an upside-down range": (("journal", "ranges"), {"lr": [2.0, 1.0]}, "journal.ranges.lr"),
    "probe": (("run", "probe"), {"grad_norms": {"one": 1.0}}, "run.probe"),
    "journal": (("journal",), {"counts": [1, 2]}, "journal"),
    "rates": (("effective_lr",), [0.01, 0.01], "effective_lr"),
    "no memory of the policy": (("policy_state",), {}, "policy_state"),
    "not the policy's": (("policy_state",), 7, "policy_state"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_state_is_refused_by_the_entry(name: str) -> None:
    path, value, match = BROKEN[name]
    state = saved()
    at(state, path[:-1])[path[-1]] = value
    refused(state, match=match)


def test_a_learned_policys_memory_must_be_finite_and_of_its_size() -> None:
    state = saved(learned(lstm=(3,)))
    for values in ([[math.nan] * 3], [[0.0]]):
        broken = copy.deepcopy(state)
        name = next(iter(broken["policy_state"]))
        broken["policy_state"][name]["__array__"] = values
        refused(broken, learned(lstm=(3,)), match=f"policy_state.{name}")


def test_another_policy_of_the_same_name_is_refused() -> None:
    plateau = load_policy("plateau", factor=0.5)
    refused(
        saved(plateau),
        load_policy("plateau", factor=0.01),
        match=r"policy_options\.factor 0.5, but this controller has 0.01",
    )
    one, other = learned(), learned()
    object.__setattr__(other, "sha256", "f" * 64)
    refused(saved(one), other, match="policy_sha256")


def test_another_budget_is_said_and_taken(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    state = saved("cosine", decide_every=1)
    for total in (100, 25):
        loop = build("cosine", total_steps=total, decide_every=1)
        assert loop.controller is not None
        loop.controller.load_state_dict(state)
    assert len(caplog.records) == 1 and "with total_steps=100, but this controller has total_steps=25" in caplog.text


def test_an_advised_run_goes_on_as_a_steered_one_from_null_multipliers_and_back() -> None:
    policy = Scripted([[0.5], [0.5], [0.25]], decide_every=5)
    state = saved(policy, 7, mode="advise")
    loop = build(policy)
    assert loop.controller is not None
    loop.controller.load_state_dict(state)
    assert loop.controller.multipliers == {"lr": 1.0} and loop.controller.steps == 7
    loop.run(3)
    assert loop.controller.multipliers == {"lr": 0.25}, "the policy goes on where it was"
    adviser = build(policy, mode="advise")
    assert adviser.controller is not None
    adviser.controller.load_state_dict(loop.controller.state_dict())
    assert adviser.controller.multipliers == {"lr": 1.0}
    assert adviser.controller.state_dict()["steering"]["multipliers"] == [[1.0]]


def test_a_run_goes_on_under_another_guard() -> None:
    policy = Scripted([[0.5], [0.25]], decide_every=5)
    state = saved(policy)
    state["steering"]["guard"]["moderation"]["shaken"] = [900]  # of a guard with a long aftermath
    loop = build(policy, guard=GuardConfig(bounds={"lr": (0.4, 1.0)}, rollback=False))
    assert loop.controller is not None
    loop.controller.load_state_dict(state)
    assert loop.controller.multipliers == {"lr": 0.4}, "what lies beyond narrower bounds is led into them"


def test_an_interval_with_a_loss_that_is_no_number_is_resumed_as_one() -> None:
    loop = build().run(22)
    assert loop.controller is not None
    loop.optimizer.step()
    loop.controller.step("lost")  # type: ignore[arg-type]
    state = json.loads(json.dumps(loop.controller.state_dict()))
    assert state["run"]["unknown"] is True and len(state["run"]["losses"]) == 2
    other = build()
    assert other.controller is not None
    other.controller.load_state_dict(state)
    assert other.controller.state_dict()["run"] == state["run"]
    other.run(2)
    assert "could not be measured" in other.decisions[-1].reason
    other.run(5)
    assert "could not be measured" not in other.decisions[-1].reason


@pytest.mark.parametrize("order", ["controller first", "model first"])
def test_a_run_rolls_back_to_where_it_resumed_whatever_was_loaded_first(order: str) -> None:
    first = Loop(sgd)
    first.controller = attach(first.optimizer, model=first.model, policy="constant")
    first.run(20)
    states = [copy.deepcopy(one.state_dict()) for one in (first.model, first.optimizer, first.controller)]
    other = Loop(sgd)
    with torch.no_grad():
        next(other.model.parameters()).add_(3.0)
    other.controller = attach(other.optimizer, model=other.model, policy="constant")
    other.run(12)  # has snapshots of its own
    holders = [other.model, other.optimizer, other.controller]
    for index in (2, 0, 1) if order == "controller first" else (0, 1, 2):
        holders[index].load_state_dict(states[index])
    resumed = other.weights()
    other.step(spoil=math.nan)
    other.run(9)
    assert other.decisions[-1].rolled_back and torch.equal(other.weights(), resumed)


def test_an_anchor_that_is_not_saved_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "trimtab")
    policy = Scripted([[0.0], [0.0], [1.0], [0.0]], levers={"anchor": "events"}, decide_every=5)
    guard = GuardConfig()
    before, after = (saved(policy, steps, guard=guard) for steps in (7, 17))
    loop = build(policy, guard=guard).run(17)
    assert loop.controller is not None
    loop.controller.load_state_dict(before)
    assert caplog.records == []
    assert loop.controller.state_dict()["anchor"] is False, "the one of the run before is taken away"
    loop.controller.load_state_dict(after)
    assert len(caplog.records) == 1 and "the run is not pulled to it any more" in caplog.text
