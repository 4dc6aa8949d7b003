"""A population: N inner training runs of one architecture, advancing in lock-step in one set of stacked tensors."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.blocks import Block, State, choose_size, cut, sums, train
from trimtab.inner_training.disturbances import DisturbanceSettings, Disturber
from trimtab.inner_training.events import Anchors, check_event, without_moments
from trimtab.inner_training.feeding import (
    SplitTable,
    allocate_feed,
    check_instance,
    first_examples,
    place_of,
    write_feed,
)
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.measurements import PROBE_EVERY
from trimtab.inner_training.probe import LastStep, Probes
from trimtab.inner_training.programs import Programs, compiled_programs, plain_programs
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.recipes import Recipes
from trimtab.inner_training.snapshot import LearnerRing, Moments
from trimtab.inner_training.stacking import check_parameters, check_stackable
from trimtab.inner_training.stepping import (
    EvaluateFunction,
    Learner,
    Mode,
    StepOptions,
    allocate_learner,
    choose_mode,
    logger,
    served,
)
from trimtab.inner_training.task import SPLITS, Instance, TaskFamily
from trimtab.inner_training.telemetry import SAMPLED_STEPS, Measured, Telemetry
from trimtab.inner_training.update_rules import UPDATE_RULES, needs_of


class Population(Moments):
    """N runs of a task family, each with its own instance, hyperparameters and random streams.

    Runs start by ``reset``; until then they hold zeros and train on nothing that matters. The same instance gives
    the same run: bit for bit at equal ``num_runs``, mode and block, within 1e-4 over 50 stable steps otherwise.

    Args:
        family: what is learned; its module must be free of in-place buffers (no batch norm).
        num_runs: N >= 1.
        rules: the update rules that instances may use; None is those of the family.
        device: a torch device.
        mode: ``"compile"``, ``"eager"``, or ``"auto"`` (compile from 32 runs on). Compilation happens here, and if it
            fails the population is eager, with one log line.
        clip: whether the gradient norm is computed at every step so that ``grad_clip`` can act.
        score: whether every step records the family's score beside its loss.
        disturbances: the faults that may befall every run, drawn from its instance's own seed.
        block: runs that train through an interval together, before the next ones do; None is as many as fit a cache
            where that is quicker, and otherwise all (see ``blocks.choose_size``).

    Attributes:
        instances: the instance of each run (None until its first reset).
        steps_done: (N,) int64, on the host.
        mode: ``"compile"`` or ``"eager"``.
        disturber: the events of each run; None without disturbances.
        parameter_count, depth: real parameters, and weight matrices, per run.
    """

    def __init__(
        self,
        family: TaskFamily,
        num_runs: int,
        *,
        rules: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
        mode: Mode = "auto",
        clip: bool = True,
        score: bool = False,
        disturbances: Sequence[DisturbanceSettings] = (),
        block: int | None = None,
    ) -> None:
        if num_runs < 1:
            raise out_of_range("num_runs", num_runs, 1)
        if block is not None and block < 1:
            raise out_of_range("block", block, 1)
        rules = family.rules if rules is None else rules
        for rule in rules:
            if rule not in UPDATE_RULES:
                raise unknown("update rule", rule, UPDATE_RULES)
        if score and not family.score_name:
            raise UserError(f"task family {family.name!r} has no score; leave score out")
        self.family, self.num_runs, self.device = family, num_runs, torch.device(device)
        check_parameters(family.name, family.module)
        self.layout = FlatLayout(family.module)
        self.parameter_count, self.depth = self.layout.size, sum(len(one) >= 2 for one in self.layout.shapes.values())
        self._rules = {name: UPDATE_RULES[name] for name in rules}
        self._inputs = family.inputs.to(self.device).contiguous()  # an example in one piece: gathered far quicker
        self._feed = allocate_feed(family, num_runs, self.device)
        self._learner = allocate_learner(num_runs, self.layout.width, self.device)
        self._last_gradient = torch.zeros_like(self._learner.parameters)
        self.disturber = Disturber(disturbances, num_runs) if disturbances else None
        self._recipes = Recipes(self._rules, num_runs, self.device, self.disturber)
        self._splits = SplitTable(family.max_phases, num_runs)
        self._probes, self._anchors = Probes(family, self.layout, num_runs), Anchors(num_runs)
        self.instances: list[Instance | None] = [None] * num_runs
        needs = needs_of(self._rules.values())
        options = StepOptions(clip=clip, needs=needs, sample=False, score=score, disturbed=bool(disturbances))
        self.mode = choose_mode(mode, num_runs)
        self._blocks = cut(self._feed, num_runs, min(num_runs, 2))[:1]
        self._programs = self._built(options, block)
        self._ring = LearnerRing(self._learner, self.layout.mask(family.reset_each_phase))

    def _built(self, options: StepOptions, block: int | None) -> Programs:
        """The functions of this population: checked on the module, and compiled if that is wanted and works."""
        self._options = options
        programs, family = plain_programs(self.family, self.layout, options), self.family
        check_stackable(family.name, family.module, first_examples(family, 4)[0], lambda: self._try(programs))
        self._cut(block)
        if self.mode == "eager":
            return programs
        fast = compiled_programs(programs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the compiler imports deprecated parts of torch
                self._try(fast)
        except Exception as error:  # noqa: BLE001 - any failure of the compiler has the same remedy
            reason = str(error).strip().partition("\n")[0]
            logger.warning("the step of %s could not be compiled, so it runs eagerly: %s", self.family.name, reason)
            self.mode, fast = "eager", programs
            self._cut(block)
        return fast

    def _cut(self, block: int | None) -> None:
        size = choose_size(self.family, self.num_runs, self.mode, self.device) if block is None else block
        self._blocks = cut(self._feed, self.num_runs, min(size, self.num_runs))

    @property
    def block(self) -> int:
        """Runs that train through an interval together, before the next ones do."""
        return len(self._blocks[0].feed.step)

    def _try(self, programs: Programs) -> None:
        """Calls each program once, to an outcome that nobody keeps."""
        rows = torch.zeros(2, self.num_runs, self._recipes.width, dtype=torch.float32, device=self.device)
        train(self._blocks[:1], programs.steps, self._state(), self._inputs, rows, self._recipes.clip)
        for evaluate in programs.evaluations.values():
            self._sums(self._blocks[:1], evaluate, self._splits.spans("train", 0, self.steps_done))

    def _state(self) -> State:
        return State(*self._learner[:3], self._last_gradient)

    # --- starting runs ----------------------------------------------------------------------------------------

    def reset(self, runs: Sequence[int], instances: Sequence[Instance]) -> None:
        """Starts ``instances[i]`` in run ``runs[i]``; the other runs are untouched, bit for bit.

        Raises:
            UserError: an instance that does not fit this population (rule, batch size, number of examples).
        """
        if len(runs) == 0:
            return
        for instance in instances:
            if instance.optimizer.rule not in self._rules:
                raise unknown("update rule", instance.optimizer.rule, self._rules)
            check_instance(instance, self.family)
        index = torch.as_tensor(np.asarray(runs, dtype=np.int64), device=self.device)
        self._splits.write(runs, instances)
        self._probes.reset(runs)
        write_feed(self._feed, index, instances)
        flat = self.layout.rows([instance.parameters for instance in instances])
        self._learner = self._learner.overwritten(index, torch.from_numpy(flat).to(self.device))
        self._recipes.write(runs, instances)
        for run, instance in zip(runs, instances, strict=True):
            self.instances[run] = instance
        chosen = np.zeros(self.num_runs, dtype=bool)
        chosen[np.asarray(runs, dtype=np.int64)] = True
        self._ring.forget(self._learner, torch.as_tensor(chosen, device=self.device))
        self._anchors.weigh(chosen)
        if self.companion is not None:
            self.companion.started(chosen)

    # --- hyperparameters --------------------------------------------------------------------------------------

    @property
    def steps_done(self) -> np.ndarray:
        """(N,) int64 steps since the reset of each run, on the host."""
        return self._recipes.steps_done

    @property
    def clock(self) -> np.ndarray:
        """(N,) time since the reset of each run, in units of a usual step, on the host."""
        return self._recipes.clock

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
        rows, done = self._recipes.take(steps, self._learner.updates)
        programs = [self._programs.steps[step >= steps - SAMPLED_STEPS] for step in range(steps)]
        outcome = train(self._blocks, programs, self._state(), self._inputs, rows, self._recipes.clip)
        self._learner = self._anchors.pull(Learner(*outcome.state[:3], self._learner.updates + done))
        self._last_gradient = outcome.state.gradient
        self._feed.step += steps
        self._ring.renew(self._splits.crossed(self.steps_done - steps, self.steps_done))
        if self.companion is not None:
            self.companion.advanced(steps)
        last = LastStep(outcome.before, *outcome.state[::3], rows[-1])
        probed = self._probes.take(last, self._feed, self._inputs, lambda: self._gradient_again(rows[-1:]))
        return replace(outcome.telemetry, probed=probed)

    def _gradient_again(self, row: Tensor) -> Tensor:
        """Gradient (N, P) at the parameters as they are, on the batch of the last step."""
        blocks = [block._replace(feed=replace(block.feed, step=block.feed.step - 1)) for block in self._blocks]
        again = train(blocks, self._programs.steps[1:], self._state(), self._inputs, row, self._recipes.clip)
        return again.state.gradient

    def measure(self, names: Sequence[str], every: int = PROBE_EVERY) -> None:
        """Takes further measurements (see ``measurements``) in the first interval of each run and then in every few.

        Args:
            names: of ``MEASUREMENTS``; they replace those that were taken up to now.
            every: intervals from one to the next, >= 1.

        Raises:
            UserError: an unknown name, or the module does not allow a measurement.
        """
        self._probes.choose(names, every)
        self._probes.check(self._learner.parameters, self._feed, self._inputs, self._recipes.width)

    def evaluate(
        self, split: str, max_examples: int | None = None, *, phase: int | None = None, score: bool = False
    ) -> Tensor:
        """Mean loss (N,) over a split, on the device.

        Args:
            split: ``train``, ``validation`` or ``test``.
            max_examples: only the first so many.
            phase: of which phase; None is that of the last step done. Runs of fewer phases give their last.
            score: the mean score instead of the loss.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if score and not self.family.score_name:
            raise UserError(f"task family {self.family.name!r} has no score; leave score out")
        if phase is not None and not 0 <= phase < self.family.max_phases:
            raise out_of_range("phase", phase, 0, self.family.max_phases - 1)
        begins, sizes = self._splits.spans(split, phase, self.steps_done)
        sizes = sizes if max_examples is None else np.minimum(sizes, max_examples)
        total = self._sums(self._blocks, self._programs.evaluations[score], (begins, sizes))
        return total / torch.from_numpy(sizes).to(self.device)

    def _sums(
        self, blocks: Sequence[Block], function: EvaluateFunction, spans: tuple[np.ndarray, np.ndarray]
    ) -> Tensor:
        return sums(blocks, function, self.layout.views(self._learner.parameters), self._inputs, spans)

    def fire(self, event: str, mask: np.ndarray) -> None:
        """Does what an event (see ``events``) does to the runs in ``mask`` (bool, (N,))."""
        check_event(event)
        if event == "rollback":
            self.restore(mask)
        elif event == "reset_moments" and mask.any():
            self._learner = without_moments(self._learner, mask)
        elif mask.any():
            weights = self._ring.stable.parameters
            self._anchors.drop(weights if self.companion is None else self.companion.anchored(weights), mask)

    def state_bytes(self) -> int:
        """Bytes that grow with the number of runs: learner, last gradient, snapshots, and maps."""
        tensors = [*self._learner, self._last_gradient, *self._feed.tensors()]
        return sum(tensor.nbytes for tensor in tensors) + 2 * sum(tensor.nbytes for tensor in self._learner)

    # --- looking at runs --------------------------------------------------------------------------------------

    def parameters_of(self, run: int) -> dict[str, Tensor]:
        """A copy of one run's parameters by name."""
        return {name: view[run].clone() for name, view in self.layout.views(self._learner.parameters).items()}

    def batch(self, run: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (batch, *shape) and labels (batch,) that the run is, or was, fed at ``step``."""
        feed = self._feed
        then = replace(feed, step=torch.full_like(feed.step, step))
        x, y, _ = served(self.family, then, place_of(then), self._inputs, None)
        size = int(self._recipes.batch_size[run])
        return x[run, :size], y[run, :size]

    def reading(self, measured: Measured | None, val_loss: np.ndarray) -> Reading:
        """A reading of every run; levers and guard are filled in by ``Steering.assess``."""
        return self._recipes.reading(measured, val_loss, self.parameter_count, self.depth)
