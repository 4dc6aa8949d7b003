"""Copies of tensors, and of what holds them, that may lie on another device than the originals and come back to theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Copy:
    """A tensor's values, and the device that it lives on."""

    values: Tensor
    device: torch.device

    def again(self) -> Tensor:
        """The tensor anew, on its own device."""
        return self.values.to(self.device, copy=True)


@dataclass(frozen=True)
class Tree:
    """Dicts, lists and tuples as they were, with a ``Copy`` in the place of each tensor."""

    held: Any

    def again(self) -> Any:
        """The same with tensors anew."""
        return _mapped(self.held, again)


def copied(value: Any, device: torch.device | None, room: Any = None) -> Any:
    """A copy of anything; see ``again``.

    Args:
        value: a tensor, or whatever holds some.
        device: where the values of tensors are to lie; None for where the originals are.
        room: an earlier copy, whose memory is used where it fits: getting memory anew costs more than copying.
    """
    if isinstance(value, Tensor):
        there = device or value.device
        spare = room.values if isinstance(room, Copy) else None
        if spare is not None and (spare.shape, spare.dtype, spare.device) == (value.shape, value.dtype, there):
            return Copy(spare.copy_(value.detach()), value.device)
        return Copy(value.detach().to(there, copy=True), value.device)
    if device is not None and _opens(value):
        return Tree(_mapped(value, lambda one: copied(one, device)))
    return copy.deepcopy(value)


def again(value: Any) -> Any:
    """What ``copied`` has copied, anew, with every tensor on its own device.

    >>> held = copied({"ema": [torch.ones(2)], "decay": 0.9}, torch.device("cpu"))
    >>> again(held)
    {'ema': [tensor([1., 1.])], 'decay': 0.9}
    """
    return value.again() if isinstance(value, Copy | Tree) else copy.deepcopy(value)


def put_back(holder: dict[Any, Any], saved: Mapping[Any, Any], keep: str = "") -> None:
    """Makes ``holder`` hold what ``saved`` holds, keeping its own tensors where the shapes allow it, and one entry."""
    for key in [key for key in holder if key not in saved and key != keep]:
        del holder[key]
    for key, value in saved.items():
        present = holder.get(key)
        if isinstance(value, Copy) and isinstance(present, Tensor) and present.shape == value.values.shape:
            present.copy_(value.values)
        else:
            holder[key] = again(value)


def _opens(value: Any) -> bool:
    return isinstance(value, dict) or type(value) in (list, tuple)


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Changes what lies in dicts, lists and tuples; a dict keeps its kind and its attributes, as of a module's state."""
    if not _opens(value):
        return change(value)
    if not isinstance(value, dict):
        return type(value)(_mapped(one, change) for one in value)
    made = copy.copy(value)
    made.update({key: _mapped(one, change) for key, one in value.items()})
    return made
