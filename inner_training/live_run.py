"""One live training run behind the face that a population has: measured through the hooks of an ordinary optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from trimtab.inner_training.levers import Lever
from trimtab.inner_training.live_hooks import Moments, StepHooks
from trimtab.inner_training.live_losses import LiveLosses
from trimtab.inner_training.live_measure import LiveMeasurements
from trimtab.inner_training.live_probe import LiveProbe, may_exceed, total_norm
from trimtab.inner_training.live_values import EffectiveValues, is_adaptive, moved_by, read_value
from trimtab.inner_training.measurements import PROBE_EVERY
from trimtab.inner_training.own_step import own_step
from trimtab.inner_training.reading import Reading
from trimtab.inner_training.steering import Steering
from trimtab.inner_training.telemetry import Measured, Telemetry, unmeasured

CLIP = "grad_clip"  # the one hyperparameter that lives outside the parameter groups


class LiveRun:
    """Before each step, effective values and measurement; after it, the scheduled values.

    Args:
        optimizer: whose steps are the run.
        interval: steps between decisions, >= 1.
        before_first: called once before the first step that is seen; None for nothing.

    Attributes:
        steps: optimizer steps done.
        position: steps done since the last decision.
        lr_multiplier: factor on the scheduled learning rate of every group, from the next step on.
        clip: gradient clip as an absolute norm; infinite for off.
        deadline: seconds that the run may take from its first step on; None for no limit.
        released: every hyperparameter is the user's own, as when a controller is switched off.
        losses: told since the last interval ended.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, interval: int, before_first: Callable[[], None] | None = None
    ) -> None:
        self.optimizer, self.interval = optimizer, interval
        self.steps = self.position = 0
        self.probe, self._before_first = LiveProbe(interval), before_first
        self.lr_multiplier, self.clip, self.released = 1.0, float("inf"), False
        self._others: list[tuple[str, Callable[[float], float]]] = []
        self._assigned: list[tuple[str, float, float]] = []
        self._first = self.parameters()[0]  # which may yet be moved to another device
        first = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
        self._initial_lr = next((rate for rate in first if rate > 0), 0.0)
        self.deadline: float | None = None
        self._began, self._given_up = math.nan, False
        self._values = EffectiveValues(optimizer)
        self.hooks = StepHooks(
            optimizer,
            Moments(before=self._write, gradients=self._gradients, after=self._updated, outside=self._values.restore),
        )
        self.losses = LiveLosses(self.hooks.say)
        self._further = LiveMeasurements(self.hooks.safely)
        self._further.last_step = interval == 1
        try:
            self._values.attach()
            self.hooks.attach()
        except BaseException:
            self.detach()
            raise

    def measure(self, names: Sequence[str], model: nn.Module | None, every: int = PROBE_EVERY) -> None:
        """Takes further measurements, as ``Population.measure``; without the model, on gradients alone."""
        self._further.choose(names, model, every)

    def before_first(self, act: Callable[[], None]) -> None:
        """Calls ``act`` once before the next step."""
        self._before_first = act

    def detach(self) -> None:
        """Leaves optimizer and model as they were."""
        self.hooks.detach()
        self._values.detach()
        self._further.detach()

    # --- around a step ------------------------------------------------------------------------------------------

    def _write(self) -> None:
        if self._before_first is not None:
            first, self._before_first = self._before_first, None
            self.hooks.safely("the first snapshot", first)
        if math.isnan(self._began):
            self._began = time.monotonic()
        if self.lr_multiplier != 1.0:
            self._values.scale_lr(self.lr_multiplier)
        for hyperparameter, effective in self._others:
            self._values.write(hyperparameter, effective)
        for hyperparameter, value, base in self._assigned:
            self._values.assign(hyperparameter, value, base)

    def _gradients(self) -> None:
        clipping = self.clip != math.inf
        self._further.close()
        if not (clipping or self._further.due or self.probe.samples(self.position)):
            return  # most steps; what follows would take as long as all the rest of them
        with torch.no_grad():
            parameters = self.parameters()
            scale = getattr(self.optimizer, "grad_scale", None)
            norm = self.probe.before(parameters, self.position, scale)
            self._further.gradients(parameters)
            if clipping:
                self._clip(parameters, scale, norm)

    def _clip(self, parameters: Sequence[Tensor], scale: Tensor | None, norm: Tensor | None) -> None:
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not present:
            return
        if norm is None:  # a sample of it will do for a signal, but not here
            norm = total_norm(present) if scale is None else total_norm(present) / scale
        if may_exceed(norm, self.clip):
            clip_grads_with_norm_(parameters, self.clip, norm)

    def _updated(self) -> None:
        self.steps += 1
        self.position += 1
        if self.steps - self.losses.step > 2 * self.interval + 1:
            self.hooks.say("forgotten", f"controller.step(loss) was not called in the last {2 * self.interval} steps; "
                           "call it after each optimizer.step(), or the controller cannot decide")  # fmt: skip
        if self.probe.pending:
            with torch.no_grad():
                self.probe.after(self.parameters())
        self._further.last_step = self.position == self.interval - 1

    # --- the face of a run --------------------------------------------------------------------------------------

    def parameters(self) -> list[Tensor]:
        """Every trained parameter of the optimizer, in order."""
        return [one for group in self.optimizer.param_groups for one in group["params"] if one.requires_grad]

    @property
    def _device(self) -> torch.device:
        return self._first.device

    @property
    def seconds(self) -> float:
        """Time since the first step of this process began."""
        return 0.0 if math.isnan(self._began) else time.monotonic() - self._began

    @property
    def scheduled_lr(self) -> list[float]:
        """The scheduled learning rate of each parameter group now, also while a step is under way."""
        return [float(self._values.scheduled(group)["lr"]) for group in self.optimizer.param_groups]

    def base(self, levers: Sequence[Lever]) -> dict[str, np.ndarray]:
        """Base value (1,) of each hyperparameter, from the first group that has it; 0 where none has.

        It is the first that is not 0: a group may be frozen by a rate of 0, and biases often come first, without decay.
        """
        names = dict.fromkeys(("lr", "momentum", "weight_decay", *(lever.hyperparameter for lever in levers)))
        values = {name: [float(value) for value in self._held(name)] or [0.0] for name in names}
        first = {name: next(filter(None, found), 0.0) for name, found in values.items()}
        return {name: np.full(1, value) for name, value in {**first, CLIP: np.inf}.items()}

    def _held(self, hyperparameter: str) -> list[Any]:
        scheduled = self._values.scheduled
        found = [read_value(scheduled(group), hyperparameter) for group in self.optimizer.param_groups]
        return [value for value in found if value is not None]

    def available(self, lever: Lever) -> bool:
        """Whether the lever can act on some parameter group."""
        if (kind := own_step(self.optimizer)) is not None and lever.hyperparameter in kind.deaf_to:
            return False
        if lever.hyperparameter == CLIP:
            return True
        return any(bool(lever.available(np.array([float(base)]))[0]) for base in self._held(lever.hyperparameter))

    def apply(self, steering: Steering) -> None:
        """Takes over lever positions: effective from the next step on."""
        self.lr_multiplier, self.released = float(steering.lr_multiplier[0]), False
        self.clip = float(steering.hyperparameters(self.base(steering.levers)).get(CLIP, np.full(1, np.inf))[0])
        self._others = [
            (lever.hyperparameter, moved_by(lever, float(multiplier)))
            for lever, multiplier, available in zip(
                steering.levers, steering.multipliers[0], steering.available[0], strict=True
            )
            if lever.hyperparameter not in ("lr", CLIP) and available and multiplier != 1
        ]

    def release(self) -> None:
        """Every hyperparameter is the user's own from the next step on."""
        self.lr_multiplier, self.clip, self.released = 1.0, float("inf"), True
        self._others, self._assigned = [], []

    def assign(self, values: Mapping[str, float]) -> None:
        """Takes over effective values of hyperparameters but the learning rate, from the next step on.

        A group whose own value is not the base moves in proportion, and so does one whose schedule goes on.
        """
        base = self.base(())
        self.clip = values.get(CLIP, self.clip)
        self._assigned = [
            (name, value, float(base[name][0])) for name, value in values.items() if name in base and name != CLIP
        ]

    def begin(self, interval: int) -> None:
        """Starts an interval of another length."""
        self.interval = self.probe.interval = interval
        self.next_interval()

    def record(self, loss: Tensor | float) -> bool:
        """Notes a step's loss without synchronising; False when no step was done since the last one."""
        losses = self.losses
        value = losses.readable("loss", loss)
        self.hooks.outside()  # a step that raised and was not called through the wrapper
        if self.steps == losses.step:
            if self.steps == 0:
                self.hooks.say("early", "controller.step was called before the first optimizer.step(); call it after "
                               "each one (a step that a gradient scaler skipped does not count)")  # fmt: skip
            else:
                losses.idle.append(value)
            return False
        losses.note(value, self.steps, self._device)
        return True

    def give_up(self) -> None:
        """The interval is over before its time, since no step is done any more: nothing of it is finite."""
        self._given_up = True

    def telemetry(self) -> Telemetry | None:
        """The interval up to now, on the device; None when it could not be measured."""
        probe, losses = self.probe, self.losses.held
        if self._given_up:
            never = unmeasured(self.interval, self._device)
            return replace(never, losses=torch.stack([*losses, never.losses[0, 0]])[:, None])
        if not self.losses.known or not probe.complete or probe.update_norm is None or probe.weight_norm is None:
            return None
        unknown = torch.full_like(probe.update_norm[0], torch.nan)
        return Telemetry(
            losses=torch.stack(losses)[:, None],
            grad_norm=torch.stack([norm for _, norm in sorted(probe.grad_norms.items())])[:, None],
            grad_dot=(unknown if probe.grad_dot is None else probe.grad_dot)[None],
            update_norm=probe.update_norm[:, None],
            weight_norm=probe.weight_norm[:, None],
            probed={name: value.to(self._device)[..., None] for name, value in self._further.taken.items()},
        )

    def next_interval(self) -> None:
        """Forgets the measurements of the interval that has just been judged."""
        if self.position > 0:
            self._further.next_interval()
        self.position, self._given_up = 0, False
        self._further.last_step = self.interval == 1
        self.losses.clear()
        self.probe.clear()

    def reading(self, levers: Sequence[Lever], total_steps: int | None, val_loss: float, *, measure: bool) -> Reading:
        """The reading of one run, as ``Population.reading`` gives it; the batch size is not known here.

        Raises:
            RuntimeError: the interval should be measured, and could not be.
        """
        telemetry = self.telemetry() if measure else None
        if measure and telemetry is None:
            why = ", since a loss was no number" if self.losses.unknown else ""
            raise RuntimeError(f"the interval could not be measured{why}")
        return self.described(levers, None if telemetry is None else telemetry.to_host(), total_steps, val_loss)

    def described(
        self, levers: Sequence[Lever], measured: Measured | None, total_steps: int | None, val_loss: float
    ) -> Reading:
        """The same with measurements that are on the host already."""
        parameters, base = self.parameters(), self.base(levers)
        if self._initial_lr <= 0:  # a warm-up by hand from 0: the first rate that is one
            self._initial_lr = max(float(base["lr"][0]), 0.0)
        one = partial(np.full, 1, dtype=np.float64)
        return Reading(
            measured=measured,
            fresh=np.full(1, self.steps == 0),
            step=one(self.steps),
            total_steps=one(np.nan if total_steps is None else total_steps),
            val_loss=one(val_loss),
            parameters=one(sum(parameter.numel() for parameter in parameters)),
            batch_size=one(np.nan),
            depth=one(sum(parameter.ndim >= 2 for parameter in parameters)),
            adaptive=one(is_adaptive(self.optimizer.param_groups[0])),
            base=base,
            initial_lr=one(self._initial_lr),
            clock=one(self.seconds),
            deadline=one(np.nan if self.deadline is None else self.deadline),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: where the run stands, and the interval so far (one transfer to the host)."""
        return {
            "steps": self.steps,
            "position": self.position,
            "recorded": self.losses.step,
            "initial_lr": self._initial_lr,
            "losses": torch.stack(self.losses.held).tolist() if self.losses.held else [],
            "unknown": self.losses.unknown,
            "probe": self.probe.state_dict(),
            "intervals": self._further.intervals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self.steps, self.position = int(state["steps"]), int(state["position"])
        self.losses.clear()
        self.losses.step, self.losses.unknown = int(state["recorded"]), bool(state["unknown"])
        self._initial_lr, self._further.intervals = float(state["initial_lr"]), int(state["intervals"])
        self.losses.held = list(torch.tensor(state["losses"], dtype=torch.float32, device=self._device))
        self.probe.load_state_dict(state["probe"], self._device)
        self._further.last_step = self.position == self.interval - 1
