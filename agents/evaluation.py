"""What became of the runs that a policy steered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of one policy on one scenario; numpy arrays with one entry for each run, none of them NaN but for ``measures``.

    Losses are natural logarithms of mean losses clipped to the family's ``[loss_floor, loss_cap]``. A diverged run
    has ``ln loss_cap`` from then on.

    Attributes:
        policy, scenario, seed: what was evaluated.
        interval: optimizer steps between decisions.
        keys, families: identity of each instance, and the family that it came from.
        learning_rates: (runs,) initial learning rate.
        budgets: (runs,) optimizer steps allowed.
        final_loss: (runs,) test loss at the end of the budget.
        best_loss: (runs,) test loss at the decision with the lowest validation loss.
        diverged: (runs,) bool, the run ended with parameters or losses that are not finite.
        lost_early: (runs,) bool, it diverged in the first interval, before any policy could see a measurement.
        late: (runs,) bool, the scenario's deadline cut it off before its budget was spent.
        curve: (runs, decisions) validation loss at the end of each interval, padded with its last value.
        inner_steps: (runs,) optimizer steps done.
        rollbacks: (runs,) snapshots restored by the guard.
        measures: further figures (runs,) by name (see ``diagnostics`` and ``phases.MEASURES``), NaN where a run
            does not have one.
        disturbed: by kind of disturbance, in how many steps of each run it was active, (runs,).
        wall_seconds: time for all runs: training, validation, guard and policy; not the test losses.
    """

    policy: str
    scenario: str
    seed: int
    interval: int
    keys: tuple[str, ...]
    families: tuple[str, ...]
    learning_rates: np.ndarray
    budgets: np.ndarray
    final_loss: np.ndarray
    best_loss: np.ndarray
    diverged: np.ndarray
    lost_early: np.ndarray
    late: np.ndarray
    curve: np.ndarray
    inner_steps: np.ndarray
    rollbacks: np.ndarray
    wall_seconds: float
    measures: Mapping[str, np.ndarray] = field(default_factory=dict)
    disturbed: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def decisions(self) -> np.ndarray:
        """(runs,) entries of ``curve`` that lie within the budget."""
        return -(-self.budgets // self.interval)

    @property
    def final_validation_loss(self) -> np.ndarray:
        """(runs,) validation loss at the end of the budget."""
        return self.curve[:, -1]

    @property
    def trajectory(self) -> np.ndarray:
        """(runs,) mean of the validation loss over the whole budget."""
        inside = np.arange(self.curve.shape[1])[None] < self.decisions[:, None]
        return np.where(inside, self.curve, 0.0).sum(1) / self.decisions

    def steps_to_target(self, target: float | np.ndarray) -> np.ndarray:
        """Optimizer steps (runs,) until the validation loss is at or below a target, infinite where it never is.

        Args:
            target: ln validation loss, one for all or (runs,) one for each.
        """
        below = self.curve <= np.broadcast_to(np.asarray(target, dtype=np.float64), self.budgets.shape)[:, None]
        steps = np.minimum((below.argmax(1) + 1) * self.interval, self.inner_steps).astype(np.float64)
        return np.where(below.any(1), steps, np.inf)

    def columns(self) -> dict[str, np.ndarray]:
        """Everything with the shape (runs,), by name, for tables."""
        settings = ("learning_rates", "budgets")
        losses = ("final_loss", "best_loss", "final_validation_loss", "trajectory")
        ends = ("diverged", "lost_early", "late", "inner_steps", "rollbacks")
        disturbed = {f"disturbed_{kind}": steps for kind, steps in self.disturbed.items()}
        return {**{name: getattr(self, name) for name in settings + losses + ends}, **self.measures, **disturbed}
