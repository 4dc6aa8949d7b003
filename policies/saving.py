"""Is a saved state one that this controller can take over? Everything is verified before anything is changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.errors import MismatchError
from trimtab.inner_training.live_run import LiveRun
from trimtab.inner_training.steering import Steering
from trimtab.policies.attachment import Attachment
from trimtab.policies.forms import Form, brief, entry, wrong
from trimtab.policies.policy import Policy
from trimtab.policies.state_form import check_policy_state, state_form


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a state must fit.

    Attributes:
        identity: entries that must be equal.
        form: of the entries.
        scheduled_lr: the scheduled learning rate of each parameter group now.
        interval: steps that are measured together.
        fresh: a steering of this kind that has not decided yet, without bounds of the user's: the state may have others.
        policy: whose state it holds.
    """

    identity: Mapping[str, Any]
    form: Form
    scheduled_lr: Sequence[float]
    interval: int
    fresh: Steering
    policy: Policy


def expected(settings: Attachment, steering: Steering, run: LiveRun) -> Expected:
    """What the controller of these settings takes over."""
    edits = None if settings.editing is None else settings.editing.config
    fresh = Steering(steering.levers, steering.signals, replace(settings.guard, bounds=()), 1, edits)
    events = [name for name, kind in settings.policy.levers.items() if kind == "events"]
    return Expected(
        identity=settings.identity(run.optimizer),
        form=state_form(fresh, steering.memory.state_dict(), len(run.scheduled_lr), run.interval, events),
        scheduled_lr=run.scheduled_lr,
        interval=run.interval,
        fresh=fresh,
        policy=settings.policy,
    )


def check_state(state: Any, wanted: Expected) -> None:
    """Raises ``MismatchError``, which names the entry, unless a saved state can be taken over as it is.

    Args:
        state: what ``Controller.state_dict`` gave.
        wanted: what it must fit.
    """
    for key, value in wanted.identity.items():
        if not isinstance(state, Mapping) or key not in state:
            raise MismatchError(f"this is not the state of a controller: it has no {key!r}")
        _check_equal(state[key], value, key)
    wanted.form.check(state, "")
    check_policy_state(entry(state, "policy_state", ""), wanted.policy, "policy_state")
    _check_steering(state, wanted.fresh)
    _check_run(state, wanted.interval)
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


def _check_equal(saved: Any, own: Any, path: str) -> None:
    """Raises ``MismatchError``, which names the innermost entry, unless plain values are equal; a flag is no number."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping) and set(own) == set(saved):
        for key, one in own.items():
            _check_equal(saved[key], one, f"{path}.{key}")
    elif isinstance(own, list) and isinstance(saved, list | tuple) and len(own) == len(saved):
        for place, one in enumerate(own):
            _check_equal(saved[place], one, f"{path}[{place}]")
    else:
        plain = isinstance(saved, bool | int | float | str | None) and isinstance(saved, bool) == isinstance(own, bool)
        if not plain or saved != own:
            raise MismatchError(f"the state was saved with {path} {brief(saved)}, but this controller has {brief(own)}")


def _check_steering(state: Mapping[str, Any], fresh: Steering) -> None:
    """Multipliers within the levers' own bounds, statistics that belong together, and the rate that follows from them."""
    steering = state["steering"]
    for column, lever in enumerate(fresh.levers):
        low, value = min(lever.low, lever.target_low), steering["multipliers"][0][column]
        if not low <= value <= lever.high:
            path = f"steering.multipliers of the lever {lever.name!r}"
            raise wrong(path, value, f"between {low:g} and {lever.high:g}")
    memory = steering["memory"]
    names = {name.removesuffix(end) for end in ("/mean", "/weight") for name in memory if name.endswith(end)}
    judged = not math.isnan(steering["guard"]["divergence"]["first"][0])
    for name in sorted(names | ({"grad_average"} if judged else set())):
        for end in ("mean", "weight"):
            entry(memory, f"{name}/{end}", "steering.memory")
    fresh.load_state_dict(copy.deepcopy(steering))
    rate = float(fresh.lr_multiplier[0]) if state["mode"] == "act" else 1.0
    if not math.isclose(rate, state["lr_multiplier"], rel_tol=1e-6):
        parts = "multipliers, guard.divergence.caution and guard.ceiling"
        raise wrong("lr_multiplier", state["lr_multiplier"], f"{rate:g}, as {parts} of its steering have it")


def _check_run(state: Mapping[str, Any], interval: int) -> None:
    """Counts that agree with one another, and no measurement before its time."""
    run, journal = state["run"], state["journal"]
    steps, position, known = run["steps"], run["position"], len(run["losses"])
    counts = {"run.position": position, "run.recorded": run["recorded"], "decided_at": state["decided_at"]}
    for path, value in counts.items():
        if value > steps:
            raise wrong(path, value, f"no more than run.steps, {steps}")
    told = max(run["recorded"] - (steps - position), 0)  # of the interval
    if known > told or (told > 0 and known == 0 and not run["unknown"]):
        raise wrong("run.losses", run["losses"], f"of the steps {steps - position + 1} to {run['recorded']}")
    if run["unknown"] and known >= told:
        raise wrong("run.unknown", True, "false, since the loss of every step is there")
    _check_probe(run["probe"], position, interval)
    for path, pair in {
        **{f"journal.ranges.{name}": both for name, both in journal["ranges"].items()},
        **{f"journal.tallies[{place}]": (one["lower"], one["known"]) for place, one in enumerate(journal["tallies"])},
    }.items():
        if pair[0] > pair[1]:
            raise wrong(path, pair, "of two numbers of which the first is not the larger one")


def _check_probe(probe: Mapping[str, Any], position: int, interval: int) -> None:
    """Nothing is measured before its time, and what is measured together is there together."""
    path, norms, last = "run.probe", probe["grad_norms"], str(interval - 1)
    since = {"grad_dot": interval - 1, "weight_norm": interval - 1, "update_norm": interval}
    for name, first in since.items():
        if position < first and probe[name] is not None:
            raise wrong(f"{path}.{name}", probe[name], f"None before step {first} of the interval")
    if any(int(key) > position for key in norms) or (last in norms) != (probe["weight_norm"] is not None):
        raise wrong(f"{path}.grad_norms", norms, f"of steps done, and of step {last} where there is a weight_norm")
    done = position >= interval and probe["weight_norm"] is not None
    if (probe["update_norm"] is not None) != done:
        raise wrong(f"{path}.update_norm", probe["update_norm"], "there once the interval is over, with weight_norm")


def _check_rate(state: Mapping[str, Any], scheduled_lr: Sequence[float]) -> None:
    now = [scheduled * float(state["lr_multiplier"]) for scheduled in scheduled_lr]
    saved = [float(rate) for rate in state["effective_lr"]]
    if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(now, saved, strict=True)):
        raise MismatchError(
            f"the effective learning rate would be {now}, but it was {saved} when the state was saved (effective_lr); "
            "restore the optimizer and its scheduler before the controller"
        )
