"""Rules of structure against slow references: schedules of the active share, waiting for newborns, rewiring, resets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from trimtab.errors import MismatchError, RangeError
from trimtab.inner_training.formulas import squash
from trimtab.policies.policy import Policy
from trimtab.policies.registry import check_policy, load_policy
from trimtab.policies.rules.structural import PARITY_SCALE, SETTLE

STEPS = 100


def seen(policy: Policy, **values: float) -> np.ndarray:
    """(1, S) float32; what is not given is there and free."""
    usual = {"structure_available": 1.0, "progress_available": 1.0, "edits_left": 1.0, "edit_rest": 0.0}
    return np.array([[{**usual, **values}.get(name, 0.0) for name in policy.signals]], dtype=np.float32)


def followed(
    policy: Policy, start: float, more: Callable[[int, float], dict[str, float]] = lambda k, a: {}
) -> list[float]:
    """Active share after each of STEPS decisions of a run in which every target is met at once."""
    state, share, shares = policy.init(1), start, []
    for number in range(STEPS):
        row = seen(policy, active_share=share, progress=number / STEPS, **more(number, share))
        actions, state = policy.act(row, state)
        share = float(actions[0, 0])
        shares.append(share)
    return shares


def stair(start: float, final: float, edits: int, begin: float = 0.0, end: float = 1.0) -> list[float]:
    """A level for each decision: one more step at each of the equally spaced moments."""
    moments = [round(STEPS * (begin + (end - begin) * step / edits)) for step in range(edits)]
    return [start + (final - start) * sum(at >= moment for moment in moments) / edits for at in range(STEPS)]


def rounds(start: float, share: float, count: int, begin: float, end: float) -> list[float]:
    left, found = start, []
    moments = [round(STEPS * (begin + (end - begin) * step / count)) for step in range(count)]
    for at in range(STEPS):
        for _ in range(moments.count(at)):
            left -= share * left
        found.append(left)
    return found


def cubic(start: float, final: float, begin: float, end: float) -> list[float]:
    parts = [min(max((at / STEPS - begin) / (end - begin), 0.0), 1.0) for at in range(STEPS)]
    return [final + (start - final) * (1 - part) ** 3 for part in parts]


REFERENCES: list[tuple[str, dict[str, Any], float, Sequence[float]]] = [
    ("prune-once", {}, 0.9, [0.9] * 30 + [0.3] * 70),
    ("prune-once", {"at": 0.0, "final": 0.5}, 0.4, [0.4] * 100),  # never grows
    ("prune-cubic", {}, 1.0, cubic(1.0, 0.3, 0.1, 0.7)),
    ("prune-iterative", {}, 0.8, rounds(0.8, 0.2, 5, 0.1, 0.8)),
    ("grow-steps", {}, 0.2, stair(0.2, 0.8, 5)),
    ("grow-steps", {"final": 1.0, "edits": 4, "begin": 0.2, "end": 0.6}, 0.1, stair(0.1, 1.0, 4, 0.2, 0.6)),
    ("grow-steps", {"final": 0.5}, 0.7, [0.7] * 100),
    ("prune-steps", {}, 1.0, stair(1.0, 0.2, 5)),
    ("prune-steps", {"edits": 10, "begin": 0.1, "end": 0.9}, 0.9, stair(0.9, 0.2, 10, 0.1, 0.9)),
]


@pytest.mark.parametrize(("name", "options", "start", "wanted"), REFERENCES, ids=str)
def test_schedules(name: str, options: dict[str, Any], start: float, wanted: Sequence[float]) -> None:
    np.testing.assert_allclose(followed(load_policy(name, **options), start), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["prune-once", "prune-cubic", "prune-iterative", "grow-steps", "rewire", "newborn-aware"]
)
def test_without_a_budget_rules_hold(name: str) -> None:
    policy = load_policy(name)
    state = policy.init(1)
    for _ in range(30):
        actions, state = policy.act(seen(policy, active_share=0.4, progress_available=0.0), state)
        assert actions[0, 0] == np.float32(0.4)


def parity(value: float) -> dict[str, float]:
    return {"parity_available": 1.0, "newborn_parity": float(squash(np.log(np.array([value])), PARITY_SCALE)[0])}


def test_newborns_that_have_recovered_let_it_grow_as_grow_steps() -> None:
    grown = followed(load_policy("newborn-aware"), 0.2, lambda k, a: parity(0.9))
    np.testing.assert_allclose(grown, stair(0.2, 0.8, 5), atol=1e-5)


def test_a_step_waits_for_newborns_until_its_deadline() -> None:
    starved = followed(load_policy("newborn-aware"), 0.2, lambda k, a: parity(0.5))
    moments = [0, 30, 50, 70, 90]  # the first waits for nobody, each other one for a tenth of the budget
    np.testing.assert_allclose(starved, [0.2 + 0.12 * sum(k >= at for at in moments) for k in range(STEPS)], atol=1e-5)
    late = followed(load_policy("newborn-aware"), 0.2, lambda k, a: parity(0.9 if k >= 23 else 0.5))
    assert late[22] == pytest.approx(0.32) and late[23] == pytest.approx(0.44)


def test_parity_of_before_a_step_does_not_count() -> None:
    policy = load_policy("newborn-aware", edits=50, final=0.7, deadline=1.0)
    shares = followed(policy, 0.2, lambda k, a: parity(1.0))
    changes = np.flatnonzero(np.diff([0.2, *shares]) > 1e-6)
    assert changes[0] == 0 and (np.diff(changes)[:4] == SETTLE + 1).all()


def test_rewiring_exchanges_what_it_removes_less_and_less() -> None:
    policy = load_policy("rewire", share=0.4, every=10, end=0.5)
    shares = np.array(followed(policy, 0.5))
    low = np.flatnonzero(shares < 0.499)
    assert low.tolist() == [0, 10, 20, 30, 40]
    expected = 0.5 * (1 - 0.4 * 0.5 * (1 + np.cos(np.pi * low / STEPS / 0.5)))
    np.testing.assert_allclose(shares[low], expected, atol=1e-5)
    np.testing.assert_allclose(np.delete(shares, low), 0.5, atol=1e-6)


def test_rewiring_waits_for_its_rest_and_asks_again_after_a_refusal() -> None:
    policy = load_policy("rewire", every=4)
    state, asked = policy.init(1), []
    for number in range(12):
        resting = 1.0 if 2 <= number <= 6 else 0.0
        row = seen(policy, active_share=0.5, progress=number / STEPS, edit_rest=resting)
        actions, state = policy.act(row, state)  # every removal is refused, so the share stays
        asked.append(actions[0, 0] < 0.5)
    assert np.flatnonzero(asked).tolist() == [0, 7, 11]


def test_dormant_units_are_reset() -> None:
    policy = load_policy("dormant-reset", threshold=0.3)
    for there, share, move in ((1, 0.2, 0), (1, 0.4, 1), (0, 0.4, 0)):
        row = seen(policy, structure_available=there, dormant_share=share)
        assert policy.act(row, policy.init(1))[0].tolist() == [[move]]


def test_options_that_are_refused() -> None:
    for name, options, words in (
        ("prune-once", {"at": 1.0}, "at is 1.0"),
        ("prune-cubic", {"begin": 0.5, "end": 0.4}, "end is 0.4; it must be between 0.501 and 1"),
        ("grow-steps", {"edits": 0}, "edits is 0"),
        ("rewire", {"share": 2}, "share is 2"),
    ):
        with pytest.raises(RangeError, match=words):
            load_policy(name, **options)


def test_resets_have_no_position() -> None:
    policy = load_policy("dormant-reset")

    class Aimed:
        name, signals, levers, decide_every = "aimed", policy.signals, {"reset": "targets"}, None
        init, act = policy.init, policy.act

    with pytest.raises(MismatchError, match="mine gives targets for 'reset', which has no position; give moves"):
        check_policy(Aimed(), "mine")


def test_a_live_run_refuses_them() -> None:
    import torch

    from trimtab.policies.attach import attach

    model = torch.nn.Linear(2, 1)
    with pytest.raises(
        MismatchError, match="'grow-steps' moves 'width', which edits the structure of a network; give attach"
    ):
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model=model, policy="grow-steps", total_steps=10)
