"""What a user gives to ``attach``: verified in one place, before anything is touched."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from trimtab.errors import UserError, check_whole, unknown
from trimtab.inner_training.edits import nudged
from trimtab.inner_training.energy import step_energy
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.levers import LEVERS, Lever, resolve_levers
from trimtab.inner_training.live_snapshot import LiveSnapshots
from trimtab.inner_training.measurements import check_live
from trimtab.inner_training.signals import Signal, lever_signals
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.structure.editing import Editor
from trimtab.inner_training.structure.editors import editors_of
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies.audit import AuditFile
from trimtab.policies.editing import Editing
from trimtab.policies.identity import identity_of
from trimtab.policies.network import LearnedPolicy, ranges_of
from trimtab.policies.policy import MOST_EVERY, Policy
from trimtab.policies.registry import check_policy, load_policy
from trimtab.policies.rules import RULES

Mode = Literal["act", "advise"]
UNMEASURED = ("progress", "base", "scale", "levers")  # groups of signals that need no telemetry
FORMAT = 4  # of a saved state
SWITCH = "TRIMTAB_OFF"  # environment variable that switches every controller of a process off
SWITCH_FILE = "TRIMTAB_OFF_FILE"  # environment variable with a path: while there is something, controllers are off
MOST_STEPS = 10**12  # of a run: more than any machine will do
DECIDE_EVERY = 10  # optimizer steps per decision where neither the user nor the policy says otherwise
MOST_DECISIONS = 100  # of a learned policy in one run: about as many as the longest runs of training had
EXACT_UNTIL = 1000  # steps of a run, whose schedule decides at every step; in a longer one that would cost too much
STAIRS = 100  # of a schedule in a longer run, at least


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """The verified arguments of ``attach``; see there."""

    model: nn.Module | None
    policy: Policy
    total_steps: int | None
    decide_every: int
    mode: Mode
    guard: GuardConfig
    stateful: tuple[Any, ...]
    audit: AuditFile | None
    editing: Editing | None = None

    def identity(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a saved state must have in common with the controller that loads it."""
        sizes = [[one.numel() for one in group["params"]] for group in optimizer.param_groups]
        return {
            "format": FORMAT,
            "optimizer": type(optimizer).__name__,
            "parameter groups": [[len(group), sum(group)] for group in sizes],  # tensors and numbers in each
            **identity_of(self.policy),
            "levers": dict(self.policy.levers),
            "signals": list(self.policy.signals),
            "decide_every": self.decide_every,
        }

    def common(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            **self.identity(optimizer),
            "mode": self.mode,
            "total_steps": self.total_steps,
            "guard": self.guard,
            "stateful": [type(one).__name__ for one in self.stateful],
        }


def switch_file() -> str | None:
    """The path that ``TRIMTAB_OFF_FILE`` holds now; None where it holds none."""
    return os.environ.get(SWITCH_FILE) or None


def switched_off(file: str | None = None) -> bool:
    """Whether ``TRIMTAB_OFF`` switches every controller of this process off, or there is a file of that path."""
    return os.environ.get(SWITCH, "0") not in ("", "0") or (file is not None and os.path.exists(file))


def decision_period(policy: Policy, total_steps: int | None) -> int:
    """Optimizer steps between decisions where the user leaves them to the policy.

    A learned policy knows runs of at most about ``MOST_DECISIONS`` decisions, so it decides less often in a longer one. A
    policy that wants every step, as a schedule does, has 100 decisions or a few more in a run of 1,000 steps or more.

    >>> from trimtab.policies.registry import load_policy
    >>> decision_period(load_policy("cosine"), 900), decision_period(load_policy("cosine"), 50_000)
    (1, 500)
    """
    own = policy.decide_every or DECIDE_EVERY
    if own == 1 and total_steps is not None:
        return 1 if total_steps < EXACT_UNTIL else min(total_steps // STAIRS, MOST_EVERY)
    if isinstance(policy, LearnedPolicy) and total_steps is not None:
        return min(max(own, math.ceil(total_steps / MOST_DECISIONS)), MOST_EVERY)
    return own


def moved_by(policy: Policy) -> tuple[str, ...]:
    """Names of the levers with a multiplier that a policy moves: no events, and no edits."""
    return nudged(name for name, kind in policy.levers.items() if kind != "events")


def levers_of(policy: Policy) -> tuple[Lever, ...]:
    """Levers that a policy governs, in its order, then those that it only looks at (``<lever>_position``, ...)."""
    read = set(policy.signals)
    seen = [name for name, lever in LEVERS.items() if any(signal.name in read for signal in lever_signals(lever))]
    return resolve_levers(tuple(dict.fromkeys([*moved_by(policy), *seen])))


def steering_of(settings: Attachment, signals: Sequence[Signal], optimizer: torch.optim.Optimizer) -> Steering:
    """The steering of one live run, with the meter of its device where a signal reads it."""
    edits = None if settings.editing is None else settings.editing.config
    steering = Steering(levers_of(settings.policy), signals, settings.guard, 1, edits)
    steering.energy = step_energy(
        signals, next(one for group in optimizer.param_groups for one in group["params"]).device
    )
    steering.ranges = ranges_of(settings.policy)
    return steering


def snapshots_of(settings: Attachment, optimizer: torch.optim.Optimizer) -> LiveSnapshots | None:
    """What rollbacks go back to; None where there are none."""
    if settings.mode != "act" or not settings.guard.rollback:
        return None
    place = torch.device("cpu") if settings.guard.snapshots == "cpu" else None
    return LiveSnapshots(optimizer, settings.model, settings.stateful, device=place)


def measuring_window(signals: Sequence[Signal], decide_every: int) -> int:
    """Steps per measured interval: those of one decision.

    A policy such as a schedule decides at every step, but reads nothing that is measured. Then only the guard needs
    intervals, and longer ones cost less.
    """
    if any(signal.group not in UNMEASURED for signal in signals):
        return decide_every
    return decide_every * math.ceil(DECIDE_EVERY / decide_every)


def check_budget(total_steps: int | None) -> int | None:
    """Optimizer steps of the whole run, or None where nobody knows."""
    if total_steps is None:
        return None
    return check_whole(
        "total_steps", total_steps, 1, remedy="optimizer steps of the whole run, or None", most=MOST_STEPS
    )


def check_period(given: int | None, policy: Policy, total_steps: int | None) -> int:
    """Optimizer steps between decisions: those that a user wants, or the policy's own."""
    if given is None:
        return decision_period(policy, total_steps)
    return check_whole("decide_every", given, 1, remedy="optimizer steps between decisions, or None", most=MOST_EVERY)


def check_mode(mode: str) -> Mode:
    """``act`` or ``advise``."""
    if mode == "act":
        return "act"
    if mode == "advise":
        return "advise"
    raise unknown("mode", mode, get_args(Mode))


def choose_policy(given: object, total_steps: int | None) -> Policy:
    """The policy of that name or path, or the object itself; verified, also against an unknown budget."""
    if isinstance(given, str | os.PathLike):
        policy = load_policy(given)
    else:
        policy = check_policy(given, f"policy {type(given).__name__}")
    if total_steps is None and _needs_budget(policy):
        raise UserError(f"policy {policy.name!r} follows the budget of the run; give attach(..., total_steps=...)")
    return policy


def _needs_budget(policy: Policy) -> bool:
    """Whether a policy can only stand still without ``total_steps``: a rule whose entry says so, or any policy that
    sets targets from ``progress`` without asking whether it is known."""
    entry = RULES.get(policy.name)
    if entry is not None and "progress" in entry.needs:
        return True
    blind = "progress" in policy.signals and "progress_available" not in policy.signals
    return blind and "targets" in policy.levers.values()


def check_guard(given: object, mode: str) -> GuardConfig:
    """The guard's settings; an adviser never rolls back."""
    if given is not None and given is not False and not isinstance(given, GuardConfig):
        raise UserError(f"guard is {given!r}; it must be None (the default guard), a GuardConfig, or False (off)")
    config = given if isinstance(given, GuardConfig) else GuardConfig() if given is None else GuardConfig.bare()
    check_live("the guard's curvature_share", config.needs)
    return replace(config, rollback=False) if mode == "advise" else config


def model_of(given: nn.Module | None, editing: Editing | None) -> nn.Module | None:
    """The model whose buffers are rolled back: of a structure also where the user gave none."""
    return editing.structure.editor.gates.model if given is None and editing is not None else given


def check_stateful(
    given: Sequence[Any], model: nn.Module | None, optimizer: torch.optim.Optimizer, editing: Editing | None = None
) -> tuple[Any, ...]:
    """Objects that can be saved and loaded, without model and optimizer, which are kept anyway. What edits the optimizer's
    models comes last, whoever edits: units go back with the weights."""
    if not isinstance(given, list | tuple):
        raise UserError(f"stateful is a {type(given).__name__}; it must be a tuple of objects, such as (scheduler,)")
    for other in given:
        if not callable(getattr(other, "state_dict", None)) or not callable(getattr(other, "load_state_dict", None)):
            raise UserError(f"stateful holds a {type(other).__name__}, which has no state_dict and load_state_dict")
    structures = [one for one in given if isinstance(one, Structure)] + ([] if editing is None else [editing.structure])
    whole = {id(one.editor): one for one in structures}
    last: list[Structure | Editor] = [whole.get(id(one), one) for one in editors_of(optimizer)]
    return (*(other for other in given if all(other is not one for one in (model, optimizer, *last))), *last)


def check_audit(path: str | os.PathLike[str] | AuditFile | None) -> AuditFile | None:
    """Where to write, with its labels; whether something is there already is the writer's to judge."""
    if path is None or isinstance(path, AuditFile):
        return path
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"audit is a {type(path).__name__}; it must be a path, an AuditFile, or None")
    if not os.fspath(path):
        raise UserError("audit is an empty text; it must be a path, an AuditFile, or None")
    return AuditFile(path)
