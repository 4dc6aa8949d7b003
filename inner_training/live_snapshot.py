"""Snapshots of a live run for the guard: two slots, as in a population, so that a moment is trusted only after the
interval that follows it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SPACING = (
    10  # steps between snapshots at least, so that a policy that decides at every step does not copy at every step
)


def _cloned(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _put_back(holder: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Makes ``holder`` hold what ``saved`` holds, keeping its own tensors where the shapes allow it."""
    for key in [key for key in holder if key not in saved]:
        del holder[key]
    for key, value in saved.items():
        present = holder.get(key)
        if isinstance(value, Tensor) and isinstance(present, Tensor) and present.shape == value.shape:
            present.copy_(value)
        else:
            holder[key] = _cloned(value)


@dataclass(frozen=True)
class Moment:
    """Copies of everything that a rollback puts back.

    Attributes:
        step: optimizer steps done.
        tensors: pairs (live tensor, copy) of parameters and buffers.
        state: optimizer state per parameter.
        groups: hyperparameters of each parameter group, without its parameters.
        others: ``state_dict`` of each stateful object.
    """

    step: int
    tensors: list[tuple[Tensor, Tensor]]
    state: dict[Any, Any]
    groups: list[dict[str, Any]]
    others: list[Any]


class LiveSnapshots:
    """Keeps a candidate (the newest stable moment) and the confirmed moment before it; ``restore`` takes the latter.

    Args:
        optimizer: its parameters and its state are kept.
        model: its buffers (batch statistics) are kept too; None for none.
        stateful: objects with ``state_dict`` and ``load_state_dict``. A scheduler among them is rolled back together
            with the learning rates of the groups; otherwise the schedule goes on.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module | None, stateful: Sequence[Any]) -> None:
        self._optimizer, self._model, self._stateful = optimizer, model, tuple(stateful)
        self._schedules = any(getattr(other, "optimizer", None) is optimizer for other in self._stateful)
        self._candidate: Moment | None = None
        self._confirmed: Moment | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to go back to yet."""
        return self._confirmed is None

    def clear(self) -> None:
        """Forgets both moments."""
        self._candidate = self._confirmed = None

    def take(self, step: int) -> None:
        """Notes the present as stable: confirms the candidate, and makes the present the next candidate."""
        if self._candidate is not None and step - self._candidate.step < SPACING:
            return
        self._confirmed, self._candidate = self._candidate, None  # frees the old moment before the new one is made
        self._candidate = self._present(step)
        if self._confirmed is None:
            self._confirmed = self._candidate

    def _present(self, step: int) -> Moment:
        groups = self._optimizer.param_groups
        live = [parameter for group in groups for parameter in group["params"]]
        live += list(self._model.buffers()) if self._model is not None else []
        state = {
            owner: {key: _cloned(value) for key, value in held.items()} if isinstance(held, dict) else _cloned(held)
            for owner, held in self._optimizer.state.items()
        }
        return Moment(
            step=step,
            tensors=[(tensor, tensor.detach().clone()) for tensor in live],
            state=state,
            groups=[{key: _cloned(value) for key, value in group.items() if key != "params"} for group in groups],
            others=[copy.deepcopy(other.state_dict()) for other in self._stateful],
        )

    @torch.no_grad()
    def restore(self) -> int:
        """Puts the run back to its confirmed moment, in place, and returns the step of that moment."""
        moment = self._confirmed
        if moment is None:
            raise RuntimeError("no snapshot has been taken yet")
        self._candidate = moment
        for tensor, saved in moment.tensors:
            tensor.copy_(saved)
        state = self._optimizer.state
        for owner in [owner for owner in state if owner not in moment.state]:
            del state[owner]
        for owner, held in moment.state.items():
            if isinstance(held, dict):
                _put_back(state[owner], held)
            else:
                state[owner] = _cloned(held)
        for other, saved in zip(self._stateful, moment.others, strict=True):
            other.load_state_dict(copy.deepcopy(saved))
        if self._schedules:
            for group, values in zip(self._optimizer.param_groups, moment.groups, strict=False):
                _put_back(group, {"params": group["params"], **values})
        return moment.step
