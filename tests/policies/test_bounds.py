"""Bounds that users set on levers, in a live run."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.policies.live import Loop, Scripted, sgd

from trimtab.inner_training.guard import GuardConfig
from trimtab.policies.attach import attach


def bounded(policy: Scripted, **options: Any) -> Loop:
    loop = Loop(sgd)
    guard = GuardConfig(bounds={"lr": (0.5, 1.5)}, **options)
    loop.controller = attach(loop.optimizer, policy=policy, guard=guard, decide_every=1)
    return loop


@pytest.mark.parametrize(
    ("kind", "actions", "rates"),
    [
        ("targets", [0.0, 9.0, 1.2], [0.5, 1.5, 1.2]),
        ("moves", [-1.0, 1.0, 1.0, 1.0], [0.5, 0.5 * 2.718281828, 1.5, 1.5]),
    ],
)
def test_a_live_rate_stays_within_them(kind: Any, actions: list[float], rates: list[float]) -> None:
    policy = Scripted([[one] for one in actions], levers={"lr": kind})
    loop = bounded(policy, dead_band=0.0, damping=0.0)
    seen = [loop.controller.multipliers["lr"]]  # type: ignore[union-attr]
    loop.run(len(actions) - 1)
    assert [*seen, *(one.applied["lr"] for one in loop.decisions)] == pytest.approx(rates)
    held = [one.reason for one, rate in zip(loop.decisions, rates[1:], strict=True) if rate == 1.5]
    assert held and all("outside its absolute bounds" in reason for reason in held)


def test_a_state_from_wider_bounds_is_taken_over_within_them() -> None:
    wide = Loop(sgd)
    wide.controller = attach(wide.optimizer, policy=Scripted([[8.0]]), decide_every=1)
    wide.run(3)
    state = json.loads(json.dumps(wide.controller.state_dict()))
    again = bounded(Scripted([[8.0]]))
    again.controller.load_state_dict(state)  # type: ignore[union-attr]
    assert (wide.controller.multipliers, again.controller.multipliers) == ({"lr": 8.0}, {"lr": 1.5})  # type: ignore[union-attr]
