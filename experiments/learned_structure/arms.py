"""Who competes: rules of structure at several sizes, alone or beside a policy of hyperparameters, and learned policies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.learned_structure.together import Together

from trimtab.policies.policy import Policy
from trimtab.policies.registry import load_policy

LEVELS = (0.15, 0.3, 0.5, 0.75, 1.0)
START = 0.2  # of those that grow, as in the scenario that policies train on


@dataclass(frozen=True)
class Arm:
    """One policy under one start.

    Attributes:
        name: of the rule, without its size.
        level: size that the rule was given; NaN for a policy that chooses its own.
        start: active share of every group that runs begin with.
        policy: the policy.
    """

    name: str
    level: float
    start: float
    policy: Policy


def _rule(name: str, level: float) -> tuple[float, dict[str, Any]]:
    """Start and options of a rule of structure at a size: where it ends, or stays."""
    if name in ("grow-steps", "newborn-aware"):
        return START, {"final": level}
    if name in ("prune-steps", "prune-cubic"):
        return 1.0, {"final": level}
    return level, {}  # rewire keeps the size that it began with, and a fixed width has no rule at all


RULES = ("fixed", "grow-steps", "newborn-aware", "prune-steps", "prune-cubic", "rewire")


def rule_arms(beside: str | None, label: str = "") -> list[Arm]:
    """Every rule at every size, alone or beside a policy that moves the hyperparameters (``load_policy``), called ``label``."""
    arms = []
    for name in RULES:
        for level in LEVELS:
            start, options = _rule(name, level)
            parts = [] if name == "fixed" else [load_policy(name, **options)]
            parts += [load_policy(beside)] if beside else [load_policy("constant")]
            called = f"{name} + {label or beside}" if beside else name
            arms.append(Arm(called, level, start, Together(called, parts) if len(parts) > 1 else parts[0]))
    return arms


def learned_arms(bundles: dict[str, str]) -> list[Arm]:
    """Learned policies by label."""
    return [Arm(label, float("nan"), START, load_policy(path)) for label, path in bundles.items()]
