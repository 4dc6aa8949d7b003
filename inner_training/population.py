"""A population: N inner training runs of one architecture, advancing in lock-step in one set of stacked tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.schedules import BaseSchedule, factors
from trimtab.inner_training.snapshot import SnapshotRing
from trimtab.inner_training.stepping import (
    EvaluateFunction,
    Feed,
    Learner,
    Mode,
    StepFunction,
    choose_mode,
    compiled,
    examples,
    logger,
    make_evaluate,
    make_step,
)
from trimtab.inner_training.streams import MULTIPLIERS, batch_positions, walk_multipliers
from trimtab.inner_training.task import SPLITS, Instance, TaskFamily
from trimtab.inner_training.telemetry import SAMPLED_STEPS, Measured, Telemetry
from trimtab.inner_training.update_rules import HYPERPARAMETERS, UPDATE_RULES, Coefficients, interval_coefficients

EVALUATION_SLOTS = 128


class Population:
    """N runs of a task family, each with its own instance, hyperparameters and random streams.

    Runs start by ``reset``; until then they hold zeros and train on nothing that matters. The same instance gives
    the same run: bit for bit at equal ``num_runs`` and mode, within 1e-4 over 50 stable steps otherwise.

    Args:
        family: what is learned; its module must be free of in-place buffers (no batch norm).
        num_runs: N >= 1.
        rules: the update rules that instances may use.
        device: a torch device.
        mode: ``"compile"``, ``"eager"``, or ``"auto"`` (compile from 32 runs on). Compilation happens here, and if it
            fails the population is eager, with one log line.
        clip: whether the gradient norm is computed at every step so that ``grad_clip`` can act.

    Attributes:
        instances: the instance of each run (None until its first reset).
        steps_done: (N,) int64, on the host.
        mode: ``"compile"`` or ``"eager"``.
        parameter_count, depth: real parameters, and weight matrices, per run.
    """

    def __init__(
        self,
        family: TaskFamily,
        num_runs: int,
        *,
        rules: Sequence[str] = ("sgd", "adam", "adamw"),
        device: str | torch.device = "cpu",
        mode: Mode = "auto",
        clip: bool = True,
    ) -> None:
        if num_runs < 1:
            raise out_of_range("num_runs", num_runs, 1)
        for rule in rules:
            if rule not in UPDATE_RULES:
                raise unknown("update rule", rule, UPDATE_RULES)
        self.family, self.num_runs, self.device = family, num_runs, torch.device(device)
        self.layout = FlatLayout(family.module)
        self.parameter_count = self.layout.size
        self.depth = sum(len(shape) >= 2 for shape in self.layout.shapes.values())
        self._rules = {name: UPDATE_RULES[name] for name in rules}
        self._kinds = tuple(dict.fromkeys(rule.coefficients for rule in self._rules.values()))
        self._clip = clip
        self._allocate()
        self.mode = choose_mode(mode, num_runs)
        self._step, self._evaluate = self._functions()
        self._ring = SnapshotRing(self._learner)

    def _allocate(self) -> None:
        runs, width, device = self.num_runs, self.layout.width, self.device
        self._inputs = self.family.inputs.to(device)
        self._learner = Learner(
            parameters=torch.zeros(runs, width, device=device),
            first=torch.zeros(runs, width, device=device),
            second=torch.zeros(runs, width, device=device),
            updates=torch.zeros(runs, dtype=torch.int64, device=device),
        )
        whole = {"dtype": torch.int64, "device": device}
        buffers = {
            name: torch.zeros(runs, *buffer.shape, dtype=buffer.dtype, device=device)
            for name, buffer in self.family.module.named_buffers()
        }
        self._feed = Feed(
            rows=torch.zeros(runs, self.family.max_examples, **whole),  # type: ignore[call-overload]
            labels=torch.zeros(runs, self.family.max_examples, dtype=self.family.label_dtype, device=device),
            scale=torch.ones(runs, device=device),
            seed=torch.zeros(runs, **whole),  # type: ignore[call-overload]
            batch=torch.ones(runs, **whole),  # type: ignore[call-overload]
            size=torch.ones(runs, **whole),  # type: ignore[call-overload]
            walks=torch.ones(runs, MULTIPLIERS, **whole),  # type: ignore[call-overload]
            step=torch.zeros(runs, **whole),  # type: ignore[call-overload]
            buffers=buffers,
        )
        self._last_gradient = torch.zeros(runs, width, device=device)
        self._columns = {name: torch.zeros(runs, device=device) for name in HYPERPARAMETERS}
        self._columns["grad_clip"].fill_(torch.inf)
        self._choice = torch.zeros(runs, dtype=torch.int64, device=device)
        self._splits = torch.ones(len(SPLITS), 2, runs, dtype=torch.int64, device=device)
        self._split_sizes = np.ones((len(SPLITS), runs), dtype=np.int64)
        self.instances: list[Instance | None] = [None] * runs
        self._schedules = [BaseSchedule()] * runs
        self.steps_done, self.total_steps = np.zeros(runs, dtype=np.int64), np.ones(runs, dtype=np.int64)
        self.initial_lr, self.adaptive, self.batch_size = np.ones(runs), np.zeros(runs), np.ones(runs)
        self._base = {name: np.zeros(runs) for name in ("momentum", "weight_decay")}
        self._lr_multiplier = np.ones(runs)

    def _functions(self) -> tuple[StepFunction, EvaluateFunction]:
        step = make_step(self.family, self.layout, clip=self._clip)
        evaluate = make_evaluate(self.family, EVALUATION_SLOTS)
        if self.mode == "eager":
            return step, evaluate
        fast_step, fast_evaluate = compiled(step), compiled(evaluate)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the compiler imports deprecated parts of torch
                for sample in (False, True):
                    self._call_step(
                        fast_step, torch.zeros(self.num_runs, len(Coefficients._fields), device=self.device), sample
                    )
                self._call_evaluate(fast_evaluate, 0, 0)
        except Exception as error:  # noqa: BLE001 - any failure of the compiler has the same remedy
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step of %s could not be compiled, so it runs eagerly: %s", self.family.name, reason)
            self.mode, fast_step, fast_evaluate = "eager", step, evaluate
        for tensor in (*self._learner.tensors(), self._feed.step, self._last_gradient):
            tensor.zero_()
        return fast_step, fast_evaluate

    def _call_step(self, step: StepFunction, by: Tensor, sample: bool) -> tuple[Tensor, Tensor]:
        threshold = self._columns["grad_clip"]
        return step(self._learner, self._feed, self._inputs, self._last_gradient, by, threshold, sample)

    def _call_evaluate(self, evaluate: EvaluateFunction, split: int, offset: int) -> Tensor:
        start, size = self._splits[split]
        shift = torch.tensor(offset, device=self.device)
        return evaluate(self.layout.views(self._learner.parameters), self._feed, self._inputs, start, size, shift)

    # --- starting runs ----------------------------------------------------------------------------------------

    def reset(self, runs: Sequence[int], instances: Sequence[Instance]) -> None:
        """Starts ``instances[i]`` in run ``runs[i]``; the other runs are untouched, bit for bit.

        Raises:
            UserError: an instance that does not fit this population (rule, batch size, number of examples).
        """
        if len(runs) == 0:
            return
        for instance in instances:
            self._check(instance)
        index = torch.as_tensor(np.asarray(runs, dtype=np.int64), device=self.device)
        self._write_maps(index, instances)
        self._write_learner(index, instances)
        self._write_recipes(list(runs), index, instances)
        self._ring.forget(self._learner, index)

    def _check(self, instance: Instance) -> None:
        if instance.optimizer.rule not in self._rules:
            raise unknown("update rule", instance.optimizer.rule, self._rules)
        if not 1 <= instance.batch_size <= min(self.family.max_batch, instance.sizes[0]):
            limit = min(self.family.max_batch, instance.sizes[0])
            raise out_of_range("batch_size", instance.batch_size, 1, limit)
        if len(instance.rows) > self.family.max_examples or sum(instance.sizes) != len(instance.rows):
            raise UserError(
                f"instance {instance.key}: {len(instance.rows)} examples in splits {instance.sizes}, but the splits "
                f"must sum to the examples and those to at most {self.family.max_examples}"
            )

    def _write_maps(self, index: Tensor, instances: Sequence[Instance]) -> None:
        width, feed = self.family.max_examples, self._feed
        rows = np.zeros((len(instances), width), dtype=np.int64)
        labels = np.zeros((len(instances), width), dtype=np.float64 if feed.labels.is_floating_point() else np.int64)
        for place, instance in enumerate(instances):
            rows[place, : len(instance.rows)] = instance.rows
            labels[place, : len(instance.labels)] = instance.labels
        feed.rows[index] = torch.from_numpy(rows).to(self.device)
        feed.labels[index] = torch.from_numpy(labels).to(self.device, feed.labels.dtype)
        sizes = np.array([instance.sizes for instance in instances], dtype=np.int64).T
        starts = np.cumsum(sizes, 0) - sizes
        self._splits[:, 0, index] = torch.from_numpy(starts).to(self.device)
        self._splits[:, 1, index] = torch.from_numpy(sizes).to(self.device)
        self._split_sizes[:, index.cpu().numpy()] = sizes
        walks = np.stack([walk_multipliers(i.sizes[0], np.random.default_rng(i.seed)) for i in instances])
        feed.walks[index] = torch.from_numpy(walks).to(self.device)
        for name, values in (
            ("scale", [instance.input_scale for instance in instances]),
            ("seed", [instance.seed for instance in instances]),
            ("batch", [instance.batch_size for instance in instances]),
            ("size", [instance.sizes[0] for instance in instances]),
        ):
            target: Tensor = getattr(feed, name)
            target[index] = torch.tensor(values, dtype=target.dtype, device=self.device)
        for name, buffer in feed.buffers.items():
            stacked = np.stack([np.asarray(instance.buffers[name]) for instance in instances])
            buffer[index] = torch.from_numpy(stacked).to(self.device, buffer.dtype)
        feed.step[index] = 0

    def _write_learner(self, index: Tensor, instances: Sequence[Instance]) -> None:
        flat = self.layout.rows([instance.parameters for instance in instances])
        self._learner.parameters[index] = torch.from_numpy(flat).to(self.device)
        for tensor in (self._learner.first, self._learner.second, self._learner.updates, self._last_gradient):
            tensor[index] = 0

    def _write_recipes(self, runs: list[int], index: Tensor, instances: Sequence[Instance]) -> None:
        for run, instance in zip(runs, instances, strict=True):
            self.instances[run], self._schedules[run] = instance, instance.schedule
        settings = [instance.optimizer for instance in instances]
        kinds = [self._rules[one.rule] for one in settings]
        self.steps_done[runs], self.total_steps[runs] = 0, [instance.steps for instance in instances]
        self.initial_lr[runs] = [one.lr for one in settings]
        self.adaptive[runs] = [kind.adaptive for kind in kinds]
        self.batch_size[runs] = [instance.batch_size for instance in instances]
        self._base["momentum"][runs] = [one.momentum for one in settings]
        self._base["weight_decay"][runs] = [one.weight_decay for one in settings]
        self._lr_multiplier[runs] = 1.0
        table = {
            "momentum": [one.momentum for one in settings],
            "weight_decay": [one.weight_decay for one in settings],
            "nesterov": [float(one.nesterov) for one in settings],
            "beta2": [one.beta2 for one in settings],
            "eps": [one.eps for one in settings],
            "decoupled": [float(kind.decoupled) for kind in kinds],
            "grad_clip": [float("inf")] * len(settings),
            "lr": [0.0] * len(settings),
        }
        for name, column in self._columns.items():
            column[index] = torch.tensor(table[name], dtype=torch.float32, device=self.device)
        choice = [self._kinds.index(kind.coefficients) for kind in kinds]
        self._choice[index] = torch.tensor(choice, device=self.device)

    # --- hyperparameters --------------------------------------------------------------------------------------

    @property
    def base(self) -> dict[str, np.ndarray]:
        """Base value (N,) of each hyperparameter now: the scheduled learning rate, and what the recipe set."""
        now = factors(self._schedules, self.steps_done[None], self.total_steps)[0]
        return {"lr": self.initial_lr * now, **self._base, "grad_clip": np.full(self.num_runs, np.inf)}

    def set_lr_multiplier(self, values: np.ndarray) -> None:
        """Sets the factor (N,) on the scheduled learning rate, from the next step on."""
        self._lr_multiplier = np.array(values, dtype=np.float64)

    def set_hyperparameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets effective values (N,) of ``momentum``, ``weight_decay``, ``grad_clip`` (absolute norm, inf is off)."""
        for name, value in values.items():
            if name not in self._columns or name == "lr":
                raise unknown("hyperparameter", name, [name for name in self._columns if name != "lr"])
            self._columns[name].copy_(torch.from_numpy(np.asarray(value, dtype=np.float32)))

    # --- training ---------------------------------------------------------------------------------------------

    def advance(self, steps: int) -> Telemetry:
        """Trains every run for ``steps`` >= 1 steps; nothing synchronises with the device."""
        if steps < 1:
            raise out_of_range("steps", steps, 1)
        coefficients = self._interval_coefficients(steps)
        losses, sampled = [], []
        for step in range(steps):
            sample = step >= steps - SAMPLED_STEPS
            loss, statistics = self._call_step(self._step, coefficients[step], sample)
            losses.append(loss)
            if sample:
                sampled.append(statistics)
        self.steps_done += steps
        self._learner.updates += steps
        last = sampled[-1]
        dot = last[1] if steps >= SAMPLED_STEPS else torch.full_like(last[1], torch.nan)
        return Telemetry(
            losses=torch.stack(losses),
            grad_norm=torch.stack([row[0] for row in sampled]),
            grad_dot=dot,
            update_norm=last[2],
            weight_norm=last[3],
        )

    def _interval_coefficients(self, steps: int) -> Tensor:
        when = self.steps_done[None] + np.arange(steps)[:, None]
        scheduled = self.initial_lr * factors(self._schedules, when, self.total_steps)
        lr = torch.from_numpy((scheduled * self._lr_multiplier).astype(np.float32)).to(self.device)
        columns = {name: column.expand(steps, -1) for name, column in self._columns.items()}
        count = self._learner.updates[None] + torch.arange(1, steps + 1, device=self.device)[:, None]
        return interval_coefficients(self._kinds, self._choice, {**columns, "lr": lr}, count.float())

    def evaluate(self, split: str, max_examples: int | None = None) -> Tensor:
        """Mean loss (N,) over a split, on the device; over its first ``max_examples`` only, if given."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        place = SPLITS.index(split)
        sizes = self._split_sizes[place] if max_examples is None else np.minimum(self._split_sizes[place], max_examples)
        shortened = torch.from_numpy(sizes).to(self.device)
        whole = self._splits[place, 1].clone()
        self._splits[place, 1] = shortened
        total = torch.zeros(self.num_runs, device=self.device)
        for offset in range(0, int(sizes.max()), EVALUATION_SLOTS):
            total = total + self._call_evaluate(self._evaluate, place, offset)
        self._splits[place, 1] = whole
        return total / shortened

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present of the runs in ``mask`` (bool, (N,)) as stable (see ``SnapshotRing``)."""
        if mask.any():
            self._ring.take(self._learner, mask)

    def restore(self, mask: np.ndarray) -> None:
        """Puts parameters and optimizer state of the runs in ``mask`` back to their last confirmed moment."""
        if mask.any():
            self._ring.restore(self._learner, mask)

    # --- looking at runs --------------------------------------------------------------------------------------

    def parameters_of(self, run: int) -> dict[str, Tensor]:
        """A copy of one run's parameters by name."""
        return {name: view[run].clone() for name, view in self.layout.views(self._learner.parameters).items()}

    def batch(self, run: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch, *shape) and labels (batch,) that the run is, or was, fed at ``step``."""
        feed = self._feed
        when = torch.full_like(feed.step, step)
        positions = batch_positions(feed.seed, when, feed.batch, feed.size, feed.walks, self.family.max_batch)
        x, y = examples(feed, self._inputs, positions)
        size = int(self.batch_size[run])
        return x[run, :size], y[run, :size]

    def reading(self, measured: Measured | None, val_loss: np.ndarray) -> Reading:
        """A reading of every run; levers and guard are filled in by ``Steering.assess``."""
        runs = self.num_runs
        return Reading(
            measured=measured,
            fresh=self.steps_done == 0,
            step=self.steps_done.astype(np.float64),
            total_steps=self.total_steps.astype(np.float64),
            val_loss=np.asarray(val_loss, dtype=np.float64),
            parameters=np.full(runs, float(self.parameter_count)),
            batch_size=self.batch_size.copy(),
            depth=np.full(runs, float(self.depth)),
            adaptive=self.adaptive.copy(),
            base=self.base,
            initial_lr=self.initial_lr.copy(),
        )
