"""What every host needs: a controller that is attached when the host's optimizer exists, and fed once per optimizer step."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.structure.structure import Structure
from trimtab.policies.attach import attach
from trimtab.policies.audit import AuditFile
from trimtab.policies.controller import Controller
from trimtab.policies.editing import Editing
from trimtab.policies.policy import Policy
from trimtab.policies.trail import Decision

Stateful = Sequence[Any] | Callable[[Any], Sequence[Any]]
UNITS = "structure_state"  # in a saved state, beside the controller's own entries
Edits = Structure | Editing | Callable[[Any], Structure | Editing] | None


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """The arguments of ``trimtab.attach`` that a user of a host gives; see there.

    Attributes:
        total_steps: None for the host's own count of optimizer steps, where it knows it.
        stateful: objects to roll back with the model, or a function of the host's trainer or state that gives them,
            for what does not exist before the training begins.
        structure: what may be edited, or such a function that gives it.
        stop_when_lost: the host ends the training when the run has diverged for good.
    """

    policy: str | os.PathLike[str] | Policy = "default"
    total_steps: int | None = None
    decide_every: int | None = None
    mode: str = "act"
    guard: GuardConfig | bool | None = None
    stateful: Stateful = ()
    audit: str | os.PathLike[str] | AuditFile | None = None
    process_group: dist.ProcessGroup | None = None
    structure: Edits = None
    stop_when_lost: bool = False


class Common(TypedDict, total=False):
    """Some of them as keyword arguments."""

    decide_every: int | None
    mode: str
    stateful: Stateful
    process_group: dist.ProcessGroup | None
    structure: Edits
    stop_when_lost: bool


class Guarded(Common, total=False):
    """More of them."""

    guard: GuardConfig | bool | None
    audit: str | os.PathLike[str] | AuditFile | None


class Options(Guarded, total=False):
    """All but the policy."""

    total_steps: int | None


def innermost(optimizer: Any) -> Any:
    """The optimizer inside wrappers that look like one but have no hooks, such as ``AcceleratedOptimizer``."""
    while isinstance(optimizer, torch.optim.Optimizer) and "_optimizer_step_pre_hooks" not in vars(optimizer):
        inner = vars(optimizer).get("optimizer")
        if inner is None:
            break
        optimizer = inner
    return optimizer


def single(optimizers: Sequence[Any], host: str) -> Any:
    """The one optimizer of a host; several cannot be steered by one controller.

    Raises:
        UserError: there is none, or more than one.
    """
    if len(optimizers) != 1:
        raise UserError(
            f"this {host} has {len(optimizers)} optimizers, but a controller steers exactly one; call "
            "trimtab.attach(optimizer, ...) and controller.step(loss) yourself for the one to be steered"
        )
    return optimizers[0]


class Hosted:
    """A controller in a host.

    Args:
        options: what the user gave.
        tensors: the host's checkpoints hold tensors, and so the state of a structure too.

    Attributes:
        controller: the present one, or that of the training that ended last; None before the first.
        seen: its optimizer steps when it was last told of one.
    """

    def __init__(self, options: HostOptions, *, tensors: bool = True) -> None:
        self.options, self._tensors = options, tensors
        self._structure: Structure | None = None
        self.controller: Controller | None = None
        self._saved: Mapping[str, Any] | None = None  # to be loaded when the optimizer exists
        self._losses: list[Tensor | float] = []
        self._val_loss: Tensor | float | None = None
        self.seen = 0

    def begin(
        self,
        optimizer: Any,
        model: nn.Module | None,
        *,
        host: Any,
        total_steps: int | None,
        also: Sequence[Any] = (),
        done: int = 0,
    ) -> Controller:
        """Attaches a controller, and gives it the state that was loaded before there was an optimizer.

        Args:
            optimizer: the host's, wrapped or not.
            model: the module that it trains.
            host: what a function of the user that gives ``stateful`` is called with.
            total_steps: what the host knows of the budget.
            also: objects of the host to be rolled back too.
            done: optimizer steps of the checkpoint that the host has restored; 0 for none.

        Raises:
            UserError: as ``trimtab.attach`` and ``Controller.load_state_dict``; nothing stays attached then, but a structure keeps
                what it has loaded.
        """
        self.end()
        options = self.options
        given = options.stateful(host) if callable(options.stateful) else options.stateful
        editing = options.structure(host) if callable(options.structure) else options.structure
        self._structure = editing.structure if isinstance(editing, Editing) else editing
        # Before attaching, which already decides, by the units that it finds.
        state = None if self._saved is None else self._without_units(self._saved)
        controller = attach(
            innermost(optimizer),
            model=model,
            policy=options.policy,
            total_steps=total_steps if options.total_steps is None else options.total_steps,
            decide_every=options.decide_every,
            mode=options.mode,
            guard=options.guard,
            stateful=[*given, *also] if isinstance(given, list | tuple) else given,
            audit=options.audit,
            structure=editing,
            process_group=options.process_group,
        )
        if state is not None:
            try:
                controller.load_state_dict(state)
            except BaseException:
                controller.withdraw()
                raise
        elif done > 0:
            controller.not_resumed(done)
        self._losses.clear()
        self._saved = None
        self.controller, self.seen = controller, controller.steps
        return controller

    def restore(self, controller: Controller, saved: Mapping[str, Any]) -> None:
        """Gives a controller, and the structure that it edits, what ``state_dict`` gave; model and optimizer are restored.

        Raises:
            UserError: as ``Structure.load_state_dict`` and ``Controller.load_state_dict``.
        """
        controller.load_state_dict(self._without_units(saved))

    def _without_units(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The controller's own entries; the structure goes on from the others."""
        state = dict(saved)
        units = state.pop(UNITS, None)
        if units is not None and isinstance(self._structure, Structure):
            self._structure.load_state_dict(units)
        return state

    def note(self, loss: Tensor | float) -> None:
        """Keeps the loss of a micro-batch, on its device."""
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def validated(self, loss: Tensor | float | None) -> None:
        """Keeps a validation loss for the next step; None is no news."""
        self._val_loss = self._val_loss if loss is None else loss

    @property
    def noted(self) -> bool:
        """Whether there is a loss since the last step."""
        return bool(self._losses)

    @property
    def told(self) -> bool:
        """Whether the controller has been told a loss yet."""
        return self.controller is not None and self.controller.told

    def step(self, *, total: bool = False) -> Decision | None:
        """Tells the controller of an optimizer step; None where there was none, as when a gradient scaler skipped it.

        The loss of a step without one is unknown; the first must have one to be told of.

        Args:
            total: the loss is the sum of what was noted, not its mean.
        """
        losses, controller = self._losses, self.controller
        if controller is None:
            losses.clear()
            return None
        done, self.seen = controller.steps > self.seen, controller.steps
        loss: Any = losses[0] if losses else None
        if len(losses) > 1:
            summed = torch.stack([torch.as_tensor(one).float().mean() for one in losses]).sum()
            loss = summed if total else summed / len(losses)
        losses.clear()
        if done:
            val_loss, self._val_loss = self._val_loss, None
            return None if loss is None and not controller.told else controller.step(loss, val_loss)
        if loss is not None and controller.steps > 0:  # it counts those, in case that no step is done any more
            controller.step(loss)
        return None

    @property
    def stops(self) -> bool:
        """Whether the host is to end the training now."""
        return self.options.stop_when_lost and self.controller is not None and self.controller.lost

    def end(self) -> None:
        """Leaves the optimizer as it was; the controller can still be asked for its summary and its state."""
        if self.controller is not None:
            self.controller.detach()

    def withdraw(self) -> None:
        """Leaves everything as if the training had not begun."""
        if self.controller is not None:
            self.controller.withdraw()
            self.controller = None

    def state_dict(self) -> dict[str, Any] | None:
        """State of the controller and, where the host holds tensors, of the structure that it edits; or what was loaded for a
        controller that does not exist yet; None where there is neither."""
        if self._saved is not None or self.controller is None:
            return None if self._saved is None else dict(self._saved)
        state = self.controller.state_dict()
        if self._tensors and self._structure is not None:
            state[UNITS] = self._structure.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Keeps a state until a controller exists; the host restores model, optimizer and scheduler before that."""
        self._saved = state
