"""Lightning: ``Trainer(callbacks=[TrimtabCallback(policy="default")])``.

``TrimtabCallback`` is made when it is first asked for, because that imports Lightning.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from trimtab.errors import require_extra
from trimtab.policies.controller import Controller
from trimtab.policies.hosts.hosted import Hosted, HostOptions, Options, single
from trimtab.policies.policy import Policy

logger = logging.getLogger("trimtab")


class LightningHooks:
    """Steers a Lightning training, once per optimizer step, from ``on_train_start`` until the training ends.

    A gradient scaler is rolled back with the model. The controller's state lies in Lightning's checkpoints under
    ``TrimtabCallback``, and is loaded when optimizer and schedulers have been restored.

    Args:
        policy: as for ``trimtab.attach``.
        monitor: name of a validation loss in ``trainer.callback_metrics``; None for none.
        options: ``decide_every``, ``mode``, ``guard``, ``audit`` and ``process_group`` as for ``trimtab.attach``;
            ``total_steps``, optimizer steps of the whole training, None for ``trainer.estimated_stepping_batches``;
            ``stateful``, objects to roll back with the model, and ``structure``, or functions of the trainer that give them;
            ``stop_when_lost=True`` ends the training when the run has diverged for good.

    Raises:
        UserError: when the training starts: several optimizers, an argument that cannot be used, or a checkpoint
            of another controller or optimizer.
    """

    def __init__(
        self,
        policy: str | os.PathLike[str] | Policy = "default",
        *,
        monitor: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._monitor = monitor
        self._said: set[str] = set()
        self._done = 0  # optimizer steps that Lightning has counted
        self._hosted = Hosted(HostOptions(policy=policy, **options))

    @property
    def controller(self) -> Controller | None:
        """The controller of this training, or of the last one; None before the first has started."""
        return self._hosted.controller

    # --- what Lightning calls -----------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The name of the controller's state in a checkpoint."""
        return "TrimtabCallback"

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and that of the structure that it edits."""
        return {"controller": self._hosted.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps a state until the training starts."""
        self._hosted.load_state_dict(state_dict.get("controller"))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses several optimizers before anything else happens."""
        single(trainer.optimizers, "LightningModule")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attaches the controller: everything has been restored by now."""
        steps = trainer.estimated_stepping_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._hosted.begin(
            single(trainer.optimizers, "LightningModule"),
            pl_module,
            host=trainer,
            total_steps=int(steps) if math.isfinite(steps) and steps > 0 else None,
            also=() if scaler is None else (scaler,),
            done=trainer.global_step if trainer.ckpt_path is not None else 0,
        )
        self._done = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notes the loss of a batch, and tells the controller when an optimizer step was done with it."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._hosted.note(loss * trainer.accumulate_grad_batches)  # Lightning has divided by it
        if trainer.global_step == self._done:
            return
        self._done = trainer.global_step
        if not self._hosted.noted:
            self._say("loss", "training_step returned no loss, so the controller cannot decide; return it")
        decision = self._hosted.step()
        if decision is not None and decision.acted:
            self._log(trainer)
        if self._hosted.stops:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Passes the validation loss on, with the next step."""
        if self._monitor is None or trainer.sanity_checking:
            return
        found = trainer.callback_metrics.get(self._monitor)
        if found is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            self._say("monitor", f"monitor {self._monitor!r} was not logged in the validation; logged: {known}")
        self._hosted.validated(found)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lets go of the optimizer."""
        self._hosted.end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of the optimizer."""
        self._hosted.end()

    # ------------------------------------------------------------------------------------------------------------

    def _log(self, trainer: Any) -> None:
        """Multipliers and effective rate go to the trainer's loggers whenever a decision changed something."""
        controller = self._hosted.controller
        if controller is None:
            return
        values = {f"trimtab/{lever}_multiplier": value for lever, value in controller.multipliers.items()}
        rates = (float(group["lr"]) for group in trainer.optimizers[0].param_groups)
        rate = next(filter(None, rates), 0.0) * controller.multipliers.get("lr", 1.0)
        for one in trainer.loggers:
            one.log_metrics({**values, "trimtab/effective_lr": rate}, step=trainer.global_step)

    def _say(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s", message)


def __getattr__(name: str) -> Any:
    """Makes the callback on first use, for whichever of Lightning's two packages the program has imported."""
    if name != "TrimtabCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    older = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
    framework = require_extra("pytorch_lightning" if older else "lightning.pytorch", "lightning")
    body = {"__doc__": LightningHooks.__doc__, "__module__": __name__}
    made = type(name, (LightningHooks, framework.Callback), body)
    globals()[name] = made
    return made
