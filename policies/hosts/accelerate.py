"""Accelerate: ``controller = attach(accelerator, optimizer, model=model)`` after ``accelerator.prepare``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from trimtab.errors import UserError, require_extra
from trimtab.policies.controller import Controller
from trimtab.policies.hosts.hosted import Guarded, Hosted, HostOptions
from trimtab.policies.policy import Policy
from trimtab.policies.trail import Decision


class AcceleratedController:
    """A controller in an Accelerate loop; made by ``attach`` of this module.

    Attributes:
        controller: the controller itself, with ``multipliers``, ``summary()`` and ``detach()``.
    """

    def __init__(self, accelerator: Any, hosted: Hosted, controller: Controller) -> None:
        self._accelerator, self._hosted, self.controller = accelerator, hosted, controller
        self._missing = False

    def step(self, loss: Tensor | float, val_loss: Tensor | float | None = None) -> Decision:
        """Notes a loss; call it for every batch, after ``optimizer.step()`` and ``scheduler.step()``.

        With gradient accumulation it decides at most once per optimizer step, on the mean of the micro-batches.

        Args:
            loss: training loss of the batch, as it was given to ``accelerator.backward``.
            val_loss: validation loss, whenever one was measured.
        """
        self.register()
        self._hosted.note(loss)
        self._hosted.validated(val_loss)
        decision = self._hosted.step() if self._accelerator.sync_gradients else None
        return decision or Decision(False, self.multipliers, "no optimizer step was done", False)

    def register(self, *saving: Any) -> None:
        """Takes its place among the accelerator's checkpoints again, after one that did not hold it."""
        if self._missing:
            self._accelerator.register_for_checkpointing(self)
            self._missing = False

    def look(self, models: Any, folder: str | os.PathLike[str]) -> None:
        """Leaves the accelerator's checkpoints for the one that is about to be loaded, if it was saved without a controller:
        Accelerate refuses one that holds fewer objects than there are."""
        registered = self._accelerator._custom_objects
        held = len([name for name in os.listdir(folder) if re.fullmatch(r"custom_checkpoint_\d+\.pkl", name)])
        without = registered[held:]
        if self in without and all(isinstance(one, AcceleratedController) for one in without):
            registered.remove(self)
            self._missing = True
            self.controller.not_resumed(None)

    @property
    def multipliers(self) -> dict[str, float]:
        """Multiplier in force for each lever."""
        return self.controller.multipliers

    @property
    def lost(self) -> bool:
        """The run has diverged for good."""
        return self.controller.lost

    def summary(self) -> str:
        """What changed, why, and what the loss did afterwards."""
        return self.controller.summary()

    def detach(self) -> None:
        """Leaves the optimizer as it was."""
        self.controller.detach()

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and that of the structure that it edits; ``accelerator.save_state`` calls this."""
        return self._hosted.state_dict() or {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state; ``accelerator.load_state`` calls this after model, optimizer and scheduler."""
        self._hosted.restore(self.controller, state)


def attach(
    accelerator: Any,
    optimizer: Any,
    *,
    model: nn.Module | None = None,
    policy: str | os.PathLike[str] | Policy = "default",
    total_steps: int | None = None,
    **options: Unpack[Guarded],
) -> AcceleratedController:
    """Attaches a controller to an Accelerate loop, and registers it with the accelerator's checkpoints.

    The optimizer is unwrapped: the controller works through its hooks, so that skipped steps and accumulated batches
    do not count, and it is never registered as a scheduler (an ``AcceleratedScheduler`` steps once per process).

    Args:
        accelerator: the ``Accelerator``.
        optimizer: what ``accelerator.prepare`` returned for the optimizer, or the optimizer itself.
        model: the model, wrapped or not.
        policy: as for ``trimtab.attach``.
        total_steps: optimizer steps (not batches) of the whole training.
        options: ``decide_every``, ``mode``, ``guard``, ``stateful`` (objects, or a function of the accelerator that gives
            them), ``structure``, ``audit`` and ``process_group`` as for ``trimtab.attach``; a gradient scaler is rolled back too.

    Raises:
        UserError: an argument cannot be used; nothing has been touched then.
    """
    framework = require_extra("accelerate", "huggingface")
    if not isinstance(accelerator, framework.Accelerator):
        raise UserError(f"accelerator is a {type(accelerator).__name__}; give the accelerate.Accelerator of this loop")
    if "stop_when_lost" in options:
        raise UserError("stop_when_lost is for hosts that own the loop; here, leave it when controller.lost is True")
    hosted = Hosted(HostOptions(policy=policy, **options))
    scaler = getattr(optimizer, "scaler", None)
    controller = hosted.begin(
        optimizer,
        accelerator.unwrap_model(model) if isinstance(model, nn.Module) else model,
        host=accelerator,
        total_steps=total_steps,
        also=() if scaler is None else (scaler,),
    )
    made = AcceleratedController(accelerator, hosted, controller)
    try:
        accelerator.register_for_checkpointing(made)
        accelerator.register_load_state_pre_hook(made.look)
        accelerator.register_save_state_pre_hook(made.register)
    except BaseException:
        hosted.withdraw()
        raise
    return made
