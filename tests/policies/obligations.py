"""What every policy owes, rule or network: one list of checks, each called with a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from trimtab.inner_training.edits import movable
from trimtab.inner_training.events import EVENTS
from trimtab.inner_training.signals import resolve_signals
from trimtab.policies.policy import Kind, Policy

RUNS, DECISIONS = 7, 25
State = dict[str, Any]


def observations(policy: Policy, runs: int = RUNS, decisions: int = DECISIONS, seed: int = 0) -> np.ndarray:
    """(decisions, runs, S) float32 with each signal in its usual range; bits are bits, progress rises."""
    rng = np.random.default_rng(seed)
    drawn = rng.uniform(-1, 1, (decisions, runs, len(policy.signals)))
    for column, name in enumerate(policy.signals):
        if name in ("started", "val_available", "progress_available", "structure_available"):
            drawn[:, :, column] = rng.random((decisions, runs)) < 0.8
        elif name == "progress":
            drawn[:, :, column] = np.linspace(0, 1, decisions)[:, None]
    return drawn.astype(np.float32)


def play(policy: Policy, seen: np.ndarray, state: State | None = None) -> tuple[np.ndarray, State]:
    """Actions (decisions, runs, L) over a sequence of observations, and the last state."""
    state = policy.init(seen.shape[1]) if state is None else state
    actions = []
    for row in seen:
        action, state = policy.act(row, state)
        actions.append(action)
    return np.stack(actions), state


def rows(state: State, index: np.ndarray) -> State:
    """The state of some runs, in any order."""
    return {name: value[index] for name, value in state.items()}


def same(first: State, second: State) -> bool:
    """Equal bit for bit, NaN equal to itself."""
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f") for name in first
    )


def alike(first: State, second: State) -> bool:
    """Equal bit for bit, but for float32: a product of many runs may round otherwise than that of one."""
    return first.keys() == second.keys() and all(
        np.allclose(first[name], second[name], rtol=0, atol=1e-6)
        if first[name].dtype == np.float32
        else same({name: first[name]}, {name: second[name]})
        for name in first
    )


def names_are_known(policy: Policy) -> None:
    assert isinstance(policy, Policy)
    assert policy.name
    assert policy.levers
    assert len(resolve_signals(policy.signals)) == len(set(policy.signals))
    assert movable([name for name, kind in policy.levers.items() if kind != "events"]) is not None
    assert {name for name, kind in policy.levers.items() if kind == "events"} <= set(EVENTS)
    assert set(policy.levers.values()) <= set(get_args(Kind))
    assert policy.decide_every is None or policy.decide_every >= 1


def actions_are_valid(policy: Policy) -> None:
    for runs in (1, RUNS):
        actions, _ = play(policy, observations(policy, runs))
        assert actions.shape == (DECISIONS, runs, len(policy.levers))
        assert actions.dtype in (np.float32, np.float64)
        assert np.isfinite(actions).all()
        for column, kind in enumerate(policy.levers.values()):
            chosen = actions[:, :, column]
            low, high = {"moves": (-1, 1), "targets": (0, np.inf), "events": (0, 1)}[kind]
            assert ((chosen >= low) & (chosen <= high)).all()


def state_is_arrays_of_runs(policy: Policy) -> None:
    _, state = play(policy, observations(policy))
    for begun in (policy.init(RUNS), state):
        assert all(isinstance(value, np.ndarray) and len(value) == RUNS for value in begun.values())
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in policy.init(RUNS).items()
    }


def nothing_is_hidden(policy: Policy) -> None:
    """The same state and observation give the same action, whatever came between; inputs are left alone."""
    seen = observations(policy)
    _, state = play(policy, seen[:10])
    held, given = copy.deepcopy(state), seen[10].copy()
    first, after_first = policy.act(seen[10], state)
    first = first.copy()
    play(policy, observations(policy, seed=1))
    second, after_second = policy.act(seen[10], state)
    np.testing.assert_array_equal(first, second)
    assert same(after_first, after_second)
    assert same(state, held)
    np.testing.assert_array_equal(seen[10], given)


def actions_are_not_state(policy: Policy) -> None:
    """Writing into the returned actions does not reach the state."""
    action, state = policy.act(observations(policy)[0], policy.init(RUNS))
    held = copy.deepcopy(state)
    action[:] = 0.123
    assert same(state, held)


def runs_are_independent(policy: Policy) -> None:
    """N runs equal N single runs, and the order of the rows does not matter."""
    seen = observations(policy)
    together, last = play(policy, seen)
    start = policy.init(RUNS)
    for run in range(RUNS):
        index = np.array([run])
        alone, single = play(policy, seen[:, index], rows(start, index))
        np.testing.assert_allclose(alone[:, 0], together[:, run], rtol=0, atol=1e-6)
        assert alike(single, rows(last, index))
    order = np.random.default_rng(2).permutation(RUNS)
    shuffled, _ = play(policy, seen[:, order], rows(start, order))
    np.testing.assert_allclose(shuffled, together[:, order], rtol=0, atol=1e-6)


def runs_can_be_reset(policy: Policy) -> None:
    """A run whose row of the state is replaced by a fresh one starts afresh; the others do not notice."""
    seen = observations(policy)
    reference, _ = play(policy, seen)
    _, state = play(policy, seen[:10])
    fresh = policy.init(RUNS)
    for name, value in state.items():
        value[3] = fresh[name][3]
    continued, _ = play(policy, seen[10:], state)
    others = np.arange(RUNS) != 3
    np.testing.assert_allclose(continued[:, others], reference[10:, others], rtol=0, atol=1e-6)
    restarted, _ = play(policy, seen[10:], fresh)
    np.testing.assert_allclose(continued[:, 3], restarted[:, 3], rtol=0, atol=1e-6)


def nothing_known_is_bearable(policy: Policy) -> None:
    """All signals 0 (everything unknown), for long: valid actions, every target is the identity, and nothing happens."""
    actions, _ = play(policy, np.zeros((200, 3, len(policy.signals)), dtype=np.float32))
    assert np.isfinite(actions).all()
    for column, kind in enumerate(policy.levers.values()):
        if kind != "moves":
            assert (actions[:, :, column] == (kind == "targets")).all()


OBLIGATIONS: tuple[Callable[[Policy], None], ...] = (
    names_are_known,
    actions_are_valid,
    state_is_arrays_of_runs,
    nothing_is_hidden,
    actions_are_not_state,
    runs_are_independent,
    runs_can_be_reset,
    nothing_known_is_bearable,
)
