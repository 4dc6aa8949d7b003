"""Composer: ``Trainer(algorithms=[TrimtabAlgorithm(policy="default")])``.

Duck-typed: it has what Composer asks of an ``Algorithm``, and imports nothing of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Unpack

from trimtab.policies.controller import Controller
from trimtab.policies.hosts.hosted import Hosted, HostOptions, Options, innermost, single
from trimtab.policies.policy import Policy

TOTAL = "loss/train/total"  # the batch's loss in ``state.total_loss_dict``, of all its micro-batches
STARTS, BATCH, VALIDATED = "fit_start", "batch_end", "eval_end"


def value_of(event: Any) -> str:
    """The value of one of Composer's events, or the string itself.

    >>> value_of("batch_end")
    'batch_end'
    """
    return str(getattr(event, "value", event))


def budget(state: Any) -> int | None:
    """Optimizer steps of a training whose duration is given in batches, or in epochs of known length."""
    duration, length = state.max_duration, state.dataloader_len
    unit = value_of(getattr(duration, "unit", ""))
    if unit == "ba":
        return int(duration.value)
    if unit == "ep" and length is not None:
        return int(duration.value) * int(getattr(length, "value", length))
    return None


def batches_done(state: Any) -> int:
    """Batches that a checkpoint has restored; 0 where the state does not say."""
    done = getattr(getattr(state, "timestamp", None), "batch", 0)
    return int(getattr(done, "value", done))


class TrimtabAlgorithm:
    """Steers a Composer training, once per batch that ends in an optimizer step.

    A gradient scaler is rolled back with the model. The controller's state lies in Composer's checkpoints.

    Args:
        policy: as for ``trimtab.attach``.
        monitor: name of a metric of an evaluator that is a validation loss; None for none.
        options: ``decide_every``, ``mode``, ``guard``, ``audit`` and ``process_group`` as for ``trimtab.attach``;
            ``total_steps``, optimizer steps of the whole training, None to take them from ``max_duration``;
            ``stateful``, objects to roll back with the model, and ``structure``, or functions of Composer's state that give
            them;
            ``stop_when_lost=True`` ends the training when the run has diverged for good, where Composer's state can.

    Raises:
        UserError: when the training starts: several optimizers, an argument that cannot be used, or a checkpoint of
            another controller or optimizer.
    """

    find_unused_parameters = False
    backwards_create_graph = False

    def __init__(
        self,
        policy: str | os.PathLike[str] | Policy = "default",
        *,
        monitor: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._monitor = monitor
        self._optimizer: Any = None
        self._hosted = Hosted(HostOptions(policy=policy, **options))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def controller(self) -> Controller | None:
        """The controller; None before the training has started."""
        return self._hosted.controller

    @staticmethod
    def required_on_load() -> bool:
        """A checkpoint can be loaded without it: it changes no architecture."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """The controller's state, and that of the structure that it edits."""
        return {"repr": repr(self), "controller": self._hosted.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Keeps a state until the training starts."""
        self._hosted.load_state_dict(state.get("controller"))

    def match(self, event: Any, state: Any) -> bool:
        """Whether it has something to do at an event."""
        return value_of(event) in (STARTS, BATCH, VALIDATED)

    def apply(self, event: Any, state: Any, logger: Any = None) -> int:
        """Does it; 1 when a decision changed something, for Composer's traces."""
        now = value_of(event)
        if now == STARTS:
            self._start(state)
        elif now == VALIDATED:
            self._validated(state)
        elif now == BATCH and (loss := self._loss(state)) is not None:
            self._hosted.note(loss)
            decision = self._hosted.step()
            if self._hosted.stops and callable(stop := getattr(state, "stop_training", None)):
                stop()
            return int(decision is not None and decision.acted)
        return 0

    def detach(self) -> None:
        """Leaves the optimizer as it was. Composer's algorithms are not told that they will not be called any more."""
        self._hosted.end()
        self._optimizer = None

    def _start(self, state: Any) -> None:
        """Attaches the controller, unless this is a further ``fit`` of the same optimizer."""
        optimizer = innermost(single(tuple(state.optimizers), "Composer training"))
        if optimizer is self._optimizer:
            return
        scaler = getattr(state, "scaler", None)
        self._hosted.begin(
            optimizer,
            state.model,
            host=state,
            total_steps=budget(state),
            also=() if scaler is None else (scaler,),
            done=batches_done(state) if self._optimizer is None else 0,
        )
        self._optimizer = optimizer

    def _loss(self, state: Any) -> Any:
        """The batch's loss. Composer does not tell that of a batch whose step the scaler skipped; what stands there then
        is an earlier one, so it is that of the last micro-batch."""
        skipped = self._hosted.controller is not None and self._hosted.controller.steps == self._hosted.seen
        last = getattr(state, "loss", None)
        return last if skipped and last is not None else state.total_loss_dict.get(TOTAL)

    def _validated(self, state: Any) -> None:
        for metrics in state.eval_metrics.values():
            if self._monitor in metrics:
                self._hosted.validated(float(metrics[self._monitor].compute()))
