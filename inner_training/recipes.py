"""The recipes of N runs: base hyperparameters, schedules and budgets, and what multipliers make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import unknown
from trimtab.inner_training.disturbances import Disturber
from trimtab.inner_training.faults import Faults
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.schedules import BaseSchedule, factors
from trimtab.inner_training.task import Instance
from trimtab.inner_training.telemetry import Measured
from trimtab.inner_training.update_rules import HYPERPARAMETERS, Coefficients, UpdateRule, interval_coefficients


class Recipes:
    """Who trains how, on the host, with the effective hyperparameters on the device.

    Attributes:
        steps_done, total_steps: (N,) int64.
        initial_lr: (N,) learning rate before schedule and multipliers.
        adaptive: (N,) 1 for rules whose steps do not follow the size of the gradient.
        batch_size: (N,) examples per step.
        clip: (N,) clip threshold, an absolute norm on the device; infinite is off.
        clock: (N,) time since the start of each run, in units of a usual step.
    """

    def __init__(
        self,
        rules: Mapping[str, UpdateRule],
        num_runs: int,
        device: torch.device,
        disturber: Disturber | None = None,
    ) -> None:
        self._disturber = disturber
        self._rules, self._device = dict(rules), device
        self._kinds = tuple(dict.fromkeys(rule.coefficients for rule in rules.values()))
        self._choice = torch.zeros(num_runs, dtype=torch.int64, device=device)
        self._columns = {name: torch.zeros(num_runs, dtype=torch.float32, device=device) for name in HYPERPARAMETERS}
        self._columns["grad_clip"].fill_(torch.inf)
        self._schedules = [BaseSchedule()] * num_runs
        self._base = {name: np.zeros(num_runs) for name in ("momentum", "weight_decay")}
        self._lr_multiplier = np.ones(num_runs)
        self.clock = np.zeros(num_runs)
        self.steps_done, self.total_steps = np.zeros(num_runs, dtype=np.int64), np.ones(num_runs, dtype=np.int64)
        self.initial_lr, self.adaptive, self.batch_size = np.ones(num_runs), np.zeros(num_runs), np.ones(num_runs)

    @property
    def clip(self) -> Tensor:
        """(N,) clip threshold on the device."""
        return self._columns["grad_clip"]

    def write(self, runs: Sequence[int], instances: Sequence[Instance]) -> None:
        """Starts the recipes of ``instances`` in ``runs``."""
        settings = [instance.optimizer for instance in instances]
        kinds = [self._rules[one.rule] for one in settings]
        for run, instance in zip(runs, instances, strict=True):
            self._schedules[run] = instance.schedule
        if self._disturber is not None:
            self._disturber.write(runs, instances)
        where = np.asarray(runs, dtype=np.int64)
        self.clock[where] = 0.0
        self.steps_done[where], self.total_steps[where] = 0, [instance.steps for instance in instances]
        self.initial_lr[where] = [one.lr for one in settings]
        self.adaptive[where] = [kind.adaptive for kind in kinds]
        self.batch_size[where] = [instance.batch_size for instance in instances]
        self._lr_multiplier[where] = 1.0
        index = torch.from_numpy(where).to(self._device)
        for name, column in self._columns.items():
            given = {"lr": 0.0, "grad_clip": np.inf}
            values = [
                given[name] if name in given else _setting(name, kind, one)
                for kind, one in zip(kinds, settings, strict=True)
            ]
            column[index] = torch.tensor(values, dtype=torch.float32, device=self._device)
            if name in self._base:
                self._base[name][where] = values
        choice = [self._kinds.index(kind.coefficients) for kind in kinds]
        self._choice[index] = torch.tensor(choice, device=self._device)

    @property
    def base(self) -> dict[str, np.ndarray]:
        """Base value (N,) of each hyperparameter now: the scheduled learning rate, and what the recipe set."""
        now = factors(self._schedules, self.steps_done[None], self.total_steps)[0]
        return {"lr": self.initial_lr * now, **self._base, "grad_clip": np.full(len(now), np.inf)}

    def set_lr_multiplier(self, values: np.ndarray) -> None:
        """Sets the factor (N,) on the scheduled learning rate, from the next step on."""
        self._lr_multiplier = np.array(values, dtype=np.float64)

    def set_hyperparameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets effective values (N,) of hyperparameters other than the learning rate."""
        for name, value in values.items():
            if name not in self._columns or name == "lr":
                raise unknown("hyperparameter", name, [name for name in self._columns if name != "lr"])
            self._columns[name].copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))

    @property
    def width(self) -> int:
        """Number of columns C that a step takes."""
        return len(Coefficients._fields) + (self._disturber is not None) * len(Faults._fields)

    def take(self, steps: int, updates: Tensor) -> tuple[Tensor, Tensor | int]:
        """What the next K steps take; ``steps_done`` and ``clock`` move on past them.

        Args:
            steps: K.
            updates: (N,) int64 updates done by the optimizer.

        Returns:
            (K, N, C) coefficients, followed by the columns of ``Faults`` in a disturbed population, and the updates
            that the optimizer will do: K, or (N,) int64 where steps may be lost.
        """
        done: Tensor | int = steps
        counts = torch.arange(1, steps + 1, device=self._device)[:, None]
        if self._disturber is None:
            rows = self._coefficients(steps, updates + counts, 1.0)
            self.clock += steps
        else:
            found = self._disturber(self.steps_done, steps)
            faults = torch.from_numpy(found.faults).to(self._device)
            counts = torch.cumsum(1 - faults[:, :, Faults._fields.index("lost")].long(), 0)
            rows = torch.cat([self._coefficients(steps, (updates + counts).clamp(min=1), found.lr), faults], -1)
            self.clock += found.time.sum(0)
            done = counts[-1]
        self.steps_done += steps
        return rows, done

    def reading(self, measured: Measured | None, val_loss: np.ndarray, parameters: int, depth: int) -> Reading:
        """What is known of every run on the host, for modules of so many parameters and weight matrices."""
        runs = len(self.steps_done)
        return Reading(
            measured=measured,
            fresh=self.steps_done == 0,
            step=self.steps_done.astype(np.float64),
            total_steps=self.total_steps.astype(np.float64),
            val_loss=np.asarray(val_loss, dtype=np.float64),
            parameters=np.full(runs, float(parameters)),
            batch_size=self.batch_size.copy(),
            depth=np.full(runs, float(depth)),
            adaptive=self.adaptive.copy(),
            base=self.base,
            initial_lr=self.initial_lr.copy(),
            clock=self.clock.copy(),
        )

    def _coefficients(self, steps: int, update_numbers: Tensor, lr_factors: np.ndarray | float) -> Tensor:
        when = self.steps_done[None] + np.arange(steps)[:, None]
        scheduled = self.initial_lr * factors(self._schedules, when, self.total_steps)
        lr = torch.from_numpy((scheduled * self._lr_multiplier * lr_factors).astype(np.float32)).to(self._device)
        columns = {name: column.expand(steps, -1) for name, column in self._columns.items()}
        return interval_coefficients(self._kinds, self._choice, {**columns, "lr": lr}, update_numbers.float())


def _setting(name: str, kind: UpdateRule, settings: object) -> float:
    return float(kind.decoupled) if name == "decoupled" else float(getattr(settings, name))
