"""Is a saved state one that this controller can take over? Everything is verified before anything is changed."""

from __future__ import annotations

import copy
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.errors import MismatchError
from trimtab.inner_training.live_probe import LiveProbe
from trimtab.inner_training.steering import Steering
from trimtab.policies.attachment import Attachment
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.plain import from_plain
from trimtab.policies.policy import Policy
from trimtab.policies.summary import Journal

OPEN = ("memory", "events")  # entries of a steering's state that grow under way
UNKNOWN_AT_FIRST = ("/first", "/best", "/latest", "/previous", "/fold")  # statistics that need not be finite
REMEDY = "the state is damaged, so resume from another checkpoint"
RUN = {"steps": 0, "position": 0, "recorded": 0, "initial_lr": 0.0, "intervals": 0}  # what kind of number each is


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a state must fit.

    Attributes:
        identity: entries that must be equal.
        scheduled_lr: the scheduled learning rate of each parameter group now.
        fresh: a steering of this kind that has not decided yet.
        policy: whose state it holds.
        events: that it may fire.
    """

    identity: Mapping[str, Any]
    scheduled_lr: Sequence[float]
    fresh: Steering
    policy: Policy
    events: Sequence[str]


def expected(
    settings: Attachment, steering: Steering, optimizer: torch.optim.Optimizer, scheduled_lr: Sequence[float]
) -> Expected:
    """What the controller of these settings takes over."""
    return Expected(
        identity=settings.identity(optimizer),
        scheduled_lr=scheduled_lr,
        fresh=Steering(steering.levers, steering.signals, settings.guard, 1),
        policy=settings.policy,
        events=[name for name, kind in settings.policy.levers.items() if kind == "events"],
    )


def check_state(state: Mapping[str, Any], wanted: Expected) -> None:
    """Raises ``MismatchError``, which names the entry, unless a saved state can be taken over as it is.

    Args:
        state: what ``Controller.state_dict`` gave.
        wanted: what it must fit.
    """
    for key, value in wanted.identity.items():
        if not isinstance(state, Mapping) or key not in state:
            raise MismatchError(f"this is not the state of a controller: it has no {key!r}")
        if state[key] != value:
            raise MismatchError(f"the state was saved with {key} {state[key]!r}, but this controller has {value!r}")
    rates = [0.0] * len(wanted.scheduled_lr)
    numbers = {"lr_multiplier": 1.0, "effective_lr": rates, "decided_at": 0, "val_loss": math.nan, "anchor": False}
    like(state, {**numbers, "mode": "", "run": RUN, "steering": {}}, "")
    _entry(state, "total_steps", "")
    _check_steering(state["steering"], wanted)
    _check_run(state["run"])
    _check_policy_state(_entry(state, "policy_state", ""), wanted.policy)
    _loads("journal", _entry(state, "journal", ""), Journal().load_state_dict)
    _check_rate(state, wanted.scheduled_lr)


def remarks(state: Mapping[str, Any], total_steps: int | None) -> dict[str, str]:
    """What a user should know of a state that is taken over, by what it is about."""
    found, before = {}, state["total_steps"]
    if before != total_steps:
        found["other total_steps"] = (
            f"the state was saved with total_steps={before}, but this controller has total_steps={total_steps}; what "
            "follows the budget goes by that from now on"
        )
    if state["anchor"]:
        found["anchor"] = (
            "the policy had dropped an anchor before the state was saved; its weights are not part of the state, so the "
            "run is not pulled to it any more"
        )
    return found


def like(value: Any, pattern: Any, path: str) -> None:
    """Raises ``MismatchError`` unless a tree has the entries and shapes of another, and numbers of the same kind.

    Whole numbers are counts, so at least 0. A number that is finite in the pattern must be finite.

    >>> like({"left": [1, 2], "rate": 0.1}, {"left": [0, 0], "rate": 1.0}, "")
    """
    if isinstance(pattern, Mapping):
        for key, one in pattern.items():
            like(_entry(value, key, path), one, f"{path}.{key}" if path else key)
    elif isinstance(pattern, list):
        if not isinstance(value, list) or len(value) != len(pattern):
            raise _wrong(path, value, f"a list of {len(pattern)}")
        for place, one in enumerate(pattern):
            like(value[place], one, f"{path}[{place}]")
    elif isinstance(pattern, bool):
        if not isinstance(value, bool):
            raise _wrong(path, value, "true or false")
    elif isinstance(pattern, int):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise _wrong(path, value, "a whole number of at least 0")
    elif isinstance(pattern, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(path, value, "a number")
        if math.isfinite(pattern) and not math.isfinite(value):
            raise _wrong(path, value, "a finite number")
    elif not isinstance(value, str):
        raise _wrong(path, value, "a text")


def _wrong(path: str, value: object, wanted: str) -> MismatchError:
    return MismatchError(f"{path} of the state is {reprlib.repr(value)}; it must be {wanted}: {REMEDY}")


def _entry(holder: Any, key: str, path: str) -> Any:
    if not isinstance(holder, Mapping):
        raise _wrong(path, holder, "a mapping")
    if key not in holder:
        raise MismatchError(f"the state has no {f'{path}.{key}' if path else key}: {REMEDY}")
    return holder[key]


def _within(values: Any, low: float, high: float, path: str) -> None:
    for value in np.ravel(values).tolist():
        if not low <= value <= high:
            raise _wrong(path, value, f"between {low:g} and {high:g}")


def _check_steering(state: Any, wanted: Expected) -> None:
    fresh = wanted.fresh
    pattern = fresh.state_dict()
    pattern["guard"] = {name: held for name, held in pattern["guard"].items() if name not in OPEN}
    like(state, {name: held for name, held in pattern.items() if name not in OPEN}, "steering")
    if state["levers"] != pattern["levers"]:
        raise _wrong("steering.levers", state["levers"], str(pattern["levers"]))
    for column, lever in enumerate(fresh.levers):
        low = min(lever.low, lever.target_low)
        _within(state["multipliers"][0][column], low, lever.high, f"steering.multipliers of the lever {lever.name!r}")
    for name in ("caution", "cap"):
        _within(state["guard"]["divergence"][name], 0.0, 1.0, f"steering.guard.divergence.{name}")
    rests = _entry(state["guard"], "events", "steering.guard")
    like(rests, {}, "steering.guard.events")
    for name in rests:
        if name not in wanted.events:
            raise _wrong("steering.guard.events", name, f"one of {', '.join(wanted.events) or 'none'}")
    like(rests, {name: [0] for name in rests}, "steering.guard.events")
    _check_memory(_entry(state, "memory", "steering"), fresh.num_runs)


def _check_memory(memory: Any, num_runs: int) -> None:
    like(memory, {}, "steering.memory")
    for name, held in memory.items():
        path = f"steering.memory.{name}"
        try:
            values = np.asarray(held, dtype=np.float64)
        except (TypeError, ValueError):
            raise _wrong(path, held, "numbers") from None
        if values.ndim == 0 or len(values) != num_runs:
            raise _wrong(path, held, f"of {num_runs} run")
        if not name.endswith(UNKNOWN_AT_FIRST) and not np.isfinite(values).all():
            raise _wrong(path, held, "finite")


def _check_run(run: Mapping[str, Any]) -> None:
    if run["recorded"] > run["steps"] or run["initial_lr"] < 0:
        name = "initial_lr" if run["initial_lr"] < 0 else "recorded"
        raise _wrong(f"run.{name}", run[name], "at least 0, and no more than run.steps")
    losses = _entry(run, "losses", "run")
    like(losses, [math.nan] * (len(losses) if isinstance(losses, list) else 0), "run.losses")
    probe = _entry(run, "probe", "run")
    _loads("run.probe", probe, lambda held: LiveProbe(1).load_state_dict(held, torch.device("cpu")))


def _check_policy_state(state: Any, policy: Policy) -> None:
    """Same entries as of a run that has not started; same shapes, and finite, where the policy is a learned one."""
    exact = isinstance(policy, LearnedPolicy)

    def compare(held: Any, fresh: Any, path: str) -> None:
        if isinstance(fresh, dict):
            for key, one in fresh.items():
                compare(_entry(held, key, path), one, f"{path}.{key}")
        elif isinstance(fresh, np.ndarray):
            shape = np.shape(held)
            if not isinstance(held, np.ndarray) or (shape != fresh.shape if exact else shape[:1] != fresh.shape[:1]):
                raise _wrong(path, held, f"an array of shape {fresh.shape}")
            if exact and not np.isfinite(held).all():
                raise _wrong(path, held, "finite")

    _loads("policy_state", state, from_plain)
    compare(from_plain(state), policy.init(1), "policy_state")


def _loads(path: str, state: Any, load: Callable[[Any], Any]) -> None:
    """Loads a part on trial."""
    try:
        load(copy.deepcopy(state))
    except Exception as error:  # whatever it holds
        raise MismatchError(f"{path} of the state cannot be read ({error!r}): {REMEDY}") from error


def _check_rate(state: Mapping[str, Any], scheduled_lr: Sequence[float]) -> None:
    now = [scheduled * float(state["lr_multiplier"]) for scheduled in scheduled_lr]
    saved = [float(rate) for rate in state["effective_lr"]]
    if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(now, saved, strict=True)):
        raise MismatchError(
            f"the effective learning rate would be {now}, but it was {saved} when the state was saved; restore the "
            "optimizer and its scheduler before the controller"
        )
