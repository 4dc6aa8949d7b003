"""Under which conditions a policy is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from trimtab.envs.scenario import Scenario
from trimtab.errors import MismatchError, RangeError, unknown
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import Instance
from trimtab.inner_training.update_rules import UPDATE_RULES

Missing = Literal["none", "validation", "progress", "both"]
LearningRates = Mapping[str, float] | np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Under which conditions runs are played; by default as a user would meet them, with nothing hidden.

    Attributes:
        held_out: held-out instances, or those of the kind that policies train on.
        guard: None is the scenario's; it is the same for every policy.
        learning_rates: initial learning rates instead of the instances' own: one for each kind of optimizer, by the
            names ``"sgd"`` and ``"adaptive"``, or (runs,) one for each run.
        base_schedule: ``"own"`` keeps the instances' schedules, ``"constant"`` drops them, for policies that are a
            schedule themselves.
        missing: what the policy is not told: ``"none"``, ``"validation"``, ``"progress"`` or ``"both"``.
    """

    held_out: bool = True
    guard: GuardConfig | None = None
    learning_rates: LearningRates = None
    base_schedule: Literal["own", "constant"] = "own"
    missing: Missing = "none"

    def __post_init__(self) -> None:
        if self.base_schedule not in ("own", "constant"):
            raise unknown("base schedule", self.base_schedule, ("own", "constant"))
        if self.missing not in get_args(Missing):
            raise unknown("choice of what is missing", self.missing, get_args(Missing))

    def rates(self, instances: Sequence[Instance]) -> np.ndarray:
        """Initial learning rate of each instance, (runs,)."""
        given = self.learning_rates
        if given is None:
            return np.array([instance.optimizer.lr for instance in instances])
        if isinstance(given, Mapping):
            if set(given) != {"sgd", "adaptive"}:
                raise MismatchError(f"learning_rates has the keys {sorted(given)}; give 'sgd' and 'adaptive'")
            rates = np.array([given["adaptive" if is_adaptive(instance) else "sgd"] for instance in instances])
        else:
            rates = np.asarray(given, dtype=np.float64)
        if rates.shape != (len(instances),):
            raise MismatchError(f"learning_rates has shape {rates.shape}; give one for each of {len(instances)} runs")
        if not (np.isfinite(rates) & (rates > 0)).all():
            raise RangeError(
                f"learning_rates holds {rates[~(rates > 0) | ~np.isfinite(rates)][0]}; all must be above 0"
            )
        return rates

    def apply(self, instances: Sequence[Instance]) -> list[Instance]:
        """The instances as they are played."""
        played = []
        for instance, rate in zip(instances, self.rates(instances), strict=True):
            schedule = instance.schedule if self.base_schedule == "own" else BaseSchedule()
            played.append(replace(instance, optimizer=replace(instance.optimizer, lr=float(rate)), schedule=schedule))
        return played

    def shown(self, scenario: Scenario, signals: Sequence[str]) -> Scenario:
        """The scenario with the signals that a policy reads and all that it may know always known."""
        hidden = {
            "progress": float(self.missing in ("progress", "both")),
            "validation": float(self.missing in ("validation", "both")),
            "validation_every_max": 1,
            "measurements": 0,
        }
        # A scenario has at least one signal; a policy that reads none is not shown it.
        changes: dict[str, Any] = {"missing": hidden, "signals": list(signals) or ["started"]}
        if self.guard is not None:
            changes["guard"] = self.guard.plain()
        return scenario.replace(**changes)


def is_adaptive(instance: Instance) -> bool:
    """Whether an instance trains with an update rule whose steps do not follow the size of the gradient."""
    return UPDATE_RULES[instance.optimizer.rule].adaptive
