"""Effective values in an optimizer's parameter groups, for the length of one step; the schedule owns them otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trimtab.inner_training.levers import Lever

# What only optimizers of this kind have: Adam kinds and Lion, RMSprop, Muon, Adadelta, Adagrad, Rprop, Adafactor.
ADAPTIVE_MARKS = frozenset(("betas", "centered", "ns_steps", "rho", "initial_accumulator_value", "etas", "beta2_decay"))

NUMBERS = (int, float, np.floating, np.integer, Tensor)  # that a parameter group may hold


def read_value(group: dict[str, Any], hyperparameter: str) -> Any:
    """The value of a hyperparameter in a parameter group as it stands there, or None when the group has none.

    ``momentum`` is ``betas[0]`` of the Adam kinds and of Lion. An RMSprop that began without momentum has none, because
    torch makes room for it at the first step only and fails where it is switched on later.

    >>> read_value({"betas": (0.9, 0.999)}, "momentum")
    0.9
    """
    if hyperparameter == "momentum" and "centered" in group and group["momentum"] == 0:
        return None
    value = group["betas"][0] if hyperparameter == "momentum" and "betas" in group else group.get(hyperparameter)
    return None if isinstance(value, bool) or not isinstance(value, NUMBERS) else value


def is_adaptive(group: dict[str, Any]) -> bool:
    """Whether a parameter group is of an optimizer whose steps do not follow the size of the gradient.

    >>> is_adaptive({"betas": (0.9, 0.99)}), is_adaptive({"momentum": 0.9, "dampening": 0})
    (True, False)
    """
    return not ADAPTIVE_MARKS.isdisjoint(group)


def in_proportion(hyperparameter: str, own: float, value: float, base: float) -> float:
    """Effective value of a group whose own value is ``own``, where one whose own value is ``base`` gets ``value``.

    >>> in_proportion("weight_decay", 0.02, value=0.05, base=0.1), round(in_proportion("momentum", 0.8, 0.95, 0.9), 6)
    (0.01, 0.9)
    """
    if own == base:
        return value
    if hyperparameter == "momentum":  # what levers act on is 1 - momentum
        return float(np.clip(1 - (1 - own) * (1 - value) / (1 - base), 0.0, 0.999))
    return own * (value / base) if base else own


def moved_by(lever: Lever, multiplier: float) -> Callable[[float], float]:
    """What a lever at a position makes of a group's own value; it remembers, as most groups have one value throughout.

    >>> from trimtab.inner_training.levers import LEVERS
    >>> moved_by(LEVERS["weight_decay"], 0.5)(0.1)
    0.05
    """
    factor = np.array([multiplier])
    return functools.lru_cache(maxsize=16)(lambda own: float(lever.value(np.array([own]), factor)[0]))


class EffectiveValues:
    """Writes effective values into the parameter groups and puts the scheduled ones back, object by object.

    A learning rate that is a tensor is changed and restored in place, because a compiled or captured step may hold
    that very tensor.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._replaced: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._overwritten: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """From now on a state that the optimizer gives inside a step holds the scheduled values."""
        self._handles.append(self._optimizer.register_state_dict_post_hook(self._saved))

    def detach(self) -> None:
        """Puts the scheduled values back, and lets go of the optimizer."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def scheduled(self, group: dict[str, Any]) -> dict[str, Any]:
        """A parameter group as the schedule has it: the group itself outside a step, a copy while values are in force.

        It may be asked at any time, also by whoever interrupts a step.
        """
        if not self._replaced and not self._overwritten:
            return group
        found = dict(group)
        for one, key, scheduled, effective in reversed(self._replaced):
            if one is group and found[key] is effective:
                found[key] = scheduled
        for tensor, scheduled in self._overwritten:
            found.update({key: scheduled for key, value in found.items() if value is tensor})
        return found

    def _saved(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """A state that is taken inside a step, by a hook or a signal's handler, holds the scheduled values."""
        if self._replaced or self._overwritten:
            for group, packed in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
                packed.update({key: own for key, own in self.scheduled(group).items() if own is not group[key]})

    def scale_lr(self, multiplier: float) -> None:
        """Multiplies the learning rate of every group; exactly 1 touches nothing."""
        if multiplier == 1.0:
            return
        for group in self._optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor):
                self._replace(group, "lr", rate * multiplier)
            elif all(rate is not done for done, _ in self._overwritten):  # groups may share one tensor
                self._overwritten.append((rate, rate.clone()))
                rate.mul_(multiplier)

    def assign(self, hyperparameter: str, value: float, base: float) -> None:
        """Writes an effective value, groups of another base ``in_proportion``; the base itself touches nothing."""
        if value != base:
            self.write(hyperparameter, lambda own: in_proportion(hyperparameter, own, value, base))

    def write(self, hyperparameter: str, effective: Callable[[float], float]) -> None:
        """Writes what ``effective`` makes of each group's own value."""
        for group in self._optimizer.param_groups:
            base = read_value(group, hyperparameter)
            if base is None:
                continue
            number = effective(float(base))
            value = torch.full_like(base, number) if isinstance(base, Tensor) else number
            if hyperparameter == "momentum" and "betas" in group:
                self._replace(group, "betas", (value, *group["betas"][1:]))
            else:
                self._replace(group, hyperparameter, value)

    def _replace(self, group: dict[str, Any], key: str, value: Any) -> None:
        self._replaced.append((group, key, group[key], value))
        group[key] = value

    def restore(self) -> None:
        """Puts every scheduled value back; a value that somebody else has set in the meantime is left alone."""
        for group, key, scheduled, effective in reversed(self._replaced):
            if group[key] is effective:
                group[key] = scheduled
        self._replaced.clear()
        for tensor, scheduled in self._overwritten:
            tensor.copy_(scheduled)
        self._overwritten.clear()
