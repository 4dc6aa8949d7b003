"""A population: N inner training runs of one architecture, advancing in lock-step in one set of stacked tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import MismatchError, UserError, out_of_range, unknown
from trimtab.inner_training.feeding import allocate_feed, examples, write_feed
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.recipes import Recipes
from trimtab.inner_training.snapshot import SnapshotRing
from trimtab.inner_training.stepping import (
    EvaluateFunction,
    Learner,
    Mode,
    StepFunction,
    StepOptions,
    allocate_learner,
    choose_mode,
    compiled,
    logger,
    make_evaluate,
    make_step,
)
from trimtab.inner_training.streams import batch_positions
from trimtab.inner_training.task import SPLITS, Instance, TaskFamily
from trimtab.inner_training.telemetry import SAMPLED_STEPS, Measured, Telemetry
from trimtab.inner_training.update_rules import UPDATE_RULES, Coefficients

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
        self._clip = clip
        self._inputs = family.inputs.to(self.device)
        self._feed = allocate_feed(family, num_runs, self.device)
        self._blank()
        self._recipes = Recipes(self._rules, num_runs, self.device)
        self._split_sizes = np.ones((len(SPLITS), num_runs), dtype=np.int64)
        self.instances: list[Instance | None] = [None] * num_runs
        self.mode = choose_mode(mode, num_runs)
        self._steps, self._evaluate = self._functions()
        self._ring = SnapshotRing(self._learner)

    def _functions(self) -> tuple[tuple[StepFunction, StepFunction], EvaluateFunction]:
        """The step that does not sample, the step that does, and the evaluation."""
        adaptive = any(rule.adaptive for rule in self._rules.values())
        plain, sampling = (
            make_step(self.family, self.layout, StepOptions(clip=self._clip, adaptive=adaptive, sample=sample))
            for sample in (False, True)
        )
        evaluate = make_evaluate(self.family, EVALUATION_SLOTS)
        self._check_stackable(plain)
        if self.mode == "eager":
            return (plain, sampling), evaluate
        steps, fast_evaluate = (compiled(plain), compiled(sampling)), compiled(evaluate)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the compiler imports deprecated parts of torch
                for step in steps:
                    self._take_step(step, self._idle())
                self._call_evaluate(fast_evaluate, 0, 0, self._feed.sizes[0])
        except Exception as error:  # noqa: BLE001 - any failure of the compiler has the same remedy
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step of %s could not be compiled, so it runs eagerly: %s", self.family.name, reason)
            self.mode, steps, fast_evaluate = "eager", (plain, sampling), evaluate
        self._blank()
        return steps, fast_evaluate

    def _idle(self) -> Tensor:
        """Coefficients (N, 10) of a step whose outcome nobody keeps."""
        return torch.zeros(self.num_runs, len(Coefficients._fields), dtype=torch.float32, device=self.device)

    def _check_stackable(self, step: StepFunction) -> None:
        """Refuses a module that cannot be stacked, before any training."""
        before = {name: buffer.clone() for name, buffer in self._feed.buffers.items()}
        remedy = "use layer or group norm in place of batch norm, and leave dropout out"
        try:
            self._take_step(step, self._idle())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise MismatchError(f"the module of {self.family.name!r} cannot be stacked: {reason}; {remedy}") from error
        changed = [name for name, buffer in self._feed.buffers.items() if not torch.equal(buffer, before[name])]
        if changed:
            raise MismatchError(
                f"the module of {self.family.name!r} changes its buffer {changed[0]!r} in the forward pass, "
                f"which runs stacked together cannot do; {remedy}"
            )
        self._blank()

    def _blank(self) -> None:
        self._learner = allocate_learner(self.num_runs, self.layout.width, self.device)
        self._last_gradient = torch.zeros_like(self._learner.parameters)
        self._feed.step.zero_()

    def _take_step(self, step: StepFunction, by: Tensor) -> tuple[Tensor, Tensor | None]:
        """Advances the learner by one step; returns the loss (N,) and, when sampling, the statistics (4, N)."""
        moving, clip = self._learner[:3], self._recipes.clip
        result = step(moving, self._feed, self._inputs, self._last_gradient, by, clip)
        self._learner = Learner(result[0], result[1], result[2], self._learner.updates)
        self._feed.step += 1
        if len(result) == 4:
            return result[3], None
        self._last_gradient = result[4]
        return result[3], result[5]

    def _call_evaluate(self, evaluate: EvaluateFunction, split: int, offset: int, size: Tensor) -> Tensor:
        start, shift = self._feed.starts[split], torch.tensor(offset, device=self.device)
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
        write_feed(self._feed, index, instances)
        flat = self.layout.rows([instance.parameters for instance in instances])
        self._learner = self._learner.overwritten(index, torch.from_numpy(flat).to(self.device))
        self._recipes.write(runs, instances)
        for run, instance in zip(runs, instances, strict=True):
            self.instances[run], self._split_sizes[:, run] = instance, instance.sizes
        chosen = torch.zeros(self.num_runs, dtype=torch.bool, device=self.device).index_fill(0, index, True)
        self._ring.forget(self._learner, chosen)

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

    # --- hyperparameters --------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> np.ndarray:
        """(N,) int64 steps since the reset of each run, on the host."""
        return self._recipes.steps_done

    @property
    def total_steps(self) -> np.ndarray:
        """(N,) int64 budget of each run."""
        return self._recipes.total_steps

    @property
    def base(self) -> dict[str, np.ndarray]:
        """Base value (N,) of each hyperparameter now: the scheduled learning rate, and what the recipe set."""
        return self._recipes.base

    def set_lr_multiplier(self, values: np.ndarray) -> None:
        """Sets the factor (N,) on the scheduled learning rate, from the next step on."""
        self._recipes.set_lr_multiplier(values)

    def set_hyperparameters(self, values: Mapping[str, np.ndarray]) -> None:
        """Sets effective values (N,) of ``momentum``, ``weight_decay``, ``grad_clip`` (absolute norm, inf is off)."""
        self._recipes.set_hyperparameters(values)

    # --- training ---------------------------------------------------------------------------------------------

    def advance(self, steps: int) -> Telemetry:
        """Trains every run for ``steps`` >= 1 steps; nothing synchronises with the device."""
        if steps < 1:
            raise out_of_range("steps", steps, 1)
        coefficients = self._recipes.coefficients(steps, self._learner.updates)
        losses, sampled = [], []
        for step in range(steps):
            loss, statistics = self._take_step(self._steps[step >= steps - SAMPLED_STEPS], coefficients[step])
            losses.append(loss)
            if statistics is not None:
                sampled.append(statistics)
        self._recipes.steps_done += steps
        self._learner = self._learner._replace(updates=self._learner.updates + steps)
        last = sampled[-1]
        dot = last[1] if steps >= SAMPLED_STEPS else torch.full_like(last[1], torch.nan)
        return Telemetry(
            losses=torch.stack(losses),
            grad_norm=torch.stack([row[0] for row in sampled]),
            grad_dot=dot,
            update_norm=last[2],
            weight_norm=last[3],
        )

    def evaluate(self, split: str, max_examples: int | None = None) -> Tensor:
        """Mean loss (N,) over a split, on the device; over its first ``max_examples`` only, if given."""
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        place = SPLITS.index(split)
        sizes = self._split_sizes[place] if max_examples is None else np.minimum(self._split_sizes[place], max_examples)
        size = torch.from_numpy(np.ascontiguousarray(sizes)).to(self.device)
        total = torch.zeros(self.num_runs, dtype=torch.float32, device=self.device)
        for offset in range(0, int(sizes.max()), EVALUATION_SLOTS):
            total = total + self._call_evaluate(self._evaluate, place, offset, size)
        return total / size

    def snapshot(self, mask: np.ndarray) -> None:
        """Notes the present of the runs in ``mask`` (bool, (N,)) as stable (see ``SnapshotRing``)."""
        if mask.any():
            self._ring.take(self._learner, mask)

    def restore(self, mask: np.ndarray) -> None:
        """Puts parameters and optimizer state of the runs in ``mask`` back to their last confirmed moment."""
        if mask.any():
            self._learner = self._ring.restore(self._learner, mask)

    def state_bytes(self) -> int:
        """Bytes that grow with the number of runs: learner, last gradient, snapshots, and maps."""
        feed = [value for value in vars(self._feed).values() if isinstance(value, Tensor)]
        tensors = [*self._learner, self._last_gradient, *feed, *self._feed.buffers.values()]
        return sum(tensor.nbytes for tensor in tensors) + 2 * sum(tensor.nbytes for tensor in self._learner)

    # --- looking at runs --------------------------------------------------------------------------------------

    def parameters_of(self, run: int) -> dict[str, Tensor]:
        """A copy of one run's parameters by name."""
        return {name: view[run].clone() for name, view in self.layout.views(self._learner.parameters).items()}

    def batch(self, run: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch, *shape) and labels (batch,) that the run is, or was, fed at ``step``."""
        feed = self._feed
        when = torch.full_like(feed.step, step)
        positions = batch_positions(feed.seed, when, feed.batch, feed.sizes[0], feed.walks, self.family.max_batch)
        x, y = examples(feed, self._inputs, positions)
        size = int(self._recipes.batch_size[run])
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
            batch_size=self._recipes.batch_size.copy(),
            depth=np.full(runs, float(self.depth)),
            adaptive=self._recipes.adaptive.copy(),
            base=self.base,
            initial_lr=self._recipes.initial_lr.copy(),
        )
