"""Every entry of a real state, replaced by junk: it is refused by its name, or does no harm."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.policies.live import Loop, Scripted, adamw
from tests.policies.made_up import learned

from trimtab.errors import MismatchError
from trimtab.policies.attach import attach
from trimtab.policies.state_form import STEERING

JUNK: tuple[Any, ...] = (
    None, True, -1, 0.5, 10**5000, math.nan, math.inf, 1e308, "x", [], {}, [1e308], [[1]], object(), np.ones(2)
)  # fmt: skip
POLICIES: dict[str, Callable[[], Any]] = {
    "learned": lambda: learned(lstm=(2,)),
    "composite": lambda: "moment-reset",
    "rule": lambda: "plateau",
    "schedule": lambda: "cosine",
    "own": lambda: Scripted([[1.0, 0.0], [1.2, 1.0]], levers={"lr": "targets", "reset_moments": "events"}),
}


def build(policy: str) -> Loop:
    loop = Loop(adamw)
    loop.controller = attach(
        loop.optimizer, model=loop.model, policy=POLICIES[policy](), decide_every=5, total_steps=100
    )
    return loop


def state_of(loop: Loop) -> dict[str, Any]:
    assert loop.controller is not None
    return json.loads(json.dumps(loop.controller.state_dict()))  # type: ignore[no-any-return]


def saved(policy: str, *, before_deciding: bool) -> dict[str, Any]:
    """A state within an interval; or before the decision that ends one, when everything of it has been measured."""
    loop = build(policy).run(24 if before_deciding else 23)
    if before_deciding:
        loop.loss().backward()
        loop.optimizer.step()
    return state_of(loop)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything within: what mappings hold, and the first of each list, which stands for all of it."""
    found = tree.items() if isinstance(tree, dict) else enumerate(tree[:1]) if isinstance(tree, list) else ()
    for key, one in found:
        yield (*path, key)
        yield from paths(one, (*path, key))


def with_junk(state: dict[str, Any], path: tuple[Any, ...], junk: Any) -> dict[str, Any]:
    """The state with something else at a path; the rest is shared with it."""
    changed: dict[str, Any] = dict(state)
    holder: Any = changed
    for key in path[:-1]:
        holder[key] = copy.copy(holder[key])
        holder = holder[key]
    holder[path[-1]] = junk
    return changed


def refused_by(controller: Any, state: Any) -> str | None:
    try:
        controller.load_state_dict(state)
    except MismatchError as error:
        return str(error)
    return None


# At the end of an interval or within, and the entries to spoil; what is not the policy's is the same for all of them.
CASES = [
    ("learned", True, ()),
    ("rule", False, ("run",)),
    ("rule", False, ("policy_state",)),
    ("composite", False, ("policy_state",)),
    ("schedule", True, ("policy_state",)),
    ("own", False, ("policy_state",)),
    ("own", False, ("steering", "guard", "events")),
]


@pytest.mark.parametrize(("policy", "before_deciding", "within"), CASES)
def test_junk_anywhere_is_refused_by_its_entry_or_harmless(
    policy: str, before_deciding: bool, within: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    state = saved(policy, before_deciding=before_deciding)
    loop = build(policy).run(7)
    untouched, weights = json.dumps(state_of(loop)), loop.weights()
    taken = list[tuple[tuple[Any, ...], Any]]()
    for path in (path for path in paths(state) if path[: len(within)] == within):
        named = next(key for key in reversed(path) if isinstance(key, str) and key not in ("__array__", "dtype"))
        harmless = [junk for junk in JUNK if check(state, path, junk, loop, named)]
        assert len(harmless) < len(JUNK) / 2, path
        if harmless:
            taken += [(path, junk) for junk in harmless]
            loop = build(policy).run(7)
        assert json.dumps(state_of(loop)) == untouched and torch.equal(loop.weights(), weights), path
    caplog.set_level(logging.WARNING, "trimtab")
    for path, junk in taken:
        caplog.clear()
        goes_on(build(policy), with_junk(state, path, junk))
        assert not [one for one in caplog.records if "holds" in one.getMessage()], (path, junk)


def check(state: dict[str, Any], path: tuple[Any, ...], junk: Any, loop: Loop, named: str) -> bool:
    """Whether a state with junk is taken; else it is refused by the name of the entry."""
    said = refused_by(loop.controller, with_junk(state, path, junk))
    assert said is None or (named in said and len(said) < 500), (path, junk, said)
    return said is None


def goes_on(loop: Loop, state: dict[str, Any]) -> None:
    assert loop.controller is not None and refused_by(loop.controller, state) is None
    loop.run(12)
    assert loop.weights().isfinite().all()
    assert all(0 <= one <= 100 for one in loop.controller.multipliers.values())
    assert "steps" in loop.controller.summary() and state_of(loop)["run"]["steps"] == state["run"]["steps"] + 12


def test_every_limit_is_of_an_entry() -> None:
    steering = state_of(build("own"))["steering"]
    for path in STEERING:
        found = steering
        for key in path.split("."):
            found = found[key]
        assert isinstance(found, list)
