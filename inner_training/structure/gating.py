"""Gates of a plain module: what touches an inactive unit is held at zero, and the values that it had are parked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.groups import Group, find_tensor


class Gates:
    """Which units and weights of a module are active, and the hold on all others.

    Held entries of parameters are zero, their optimizer state is what it begins at, and hooks on the parameters mask their
    gradients before they are accumulated. So they stay zero under any optimizer that moves no weight whose value, gradient
    and state are zero, with weight decay, momentum, accumulation, loss scaling, ``torch.compile`` and
    ``DistributedDataParallel``. No hook is on a module. Buffers of inactive units are set once (running variances to one,
    all others to zero) and not held: they belong to values that are zero.

    Attributes:
        model: the module; it is never wrapped in anything.
        optimizer: its optimizer.
        groups: by name.
        active: bool (units,) on the CPU by name of the group.
        live: bool of the shape of a parameter, by its name: which weights a weight-level mask leaves alive.
        parked: by name of a tensor, values that the held entries had, or were born with.
        steps: optimizer steps since the gates were made.
        born: int64 (units,) by group: the value of ``steps`` at which a unit became active.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, groups: Iterable[Group]) -> None:
        self.model, self.optimizer = model, optimizer
        self.groups = {group.name: group for group in groups}
        self.active = {name: torch.ones(group.units, dtype=torch.bool) for name, group in self.groups.items()}
        self.born = {name: torch.zeros(group.units, dtype=torch.int64) for name, group in self.groups.items()}
        self.live: dict[str, Tensor] = {}
        self.parked: dict[str, Tensor] = {}
        self.steps = 0
        self._held: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}
        self._open = False
        self._touching: dict[str, list[Group]] = {}
        for group in self.groups.values():
            for name in {member.parameter for member in group.members}:
                self._touching.setdefault(name, []).append(group)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the module as it is now."""
        return find_tensor(self.model, name)

    def entries(self, group: Group, units: Tensor) -> dict[str, Tensor]:
        """Bool by tensor name: the entries of some units of a group, given by their numbers."""
        found: dict[str, Tensor] = {}
        for member in group.members:
            mask = member.mask(self.tensor(member.parameter).shape, units)
            found[member.parameter] = found[member.parameter] | mask if member.parameter in found else mask
        return found

    def by_units(self, name: str) -> Tensor:
        """Bool of a tensor's shape: the entries that belong to an inactive unit of any group."""
        tensor = self.tensor(name)
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        for group in self._touching.get(name, []):
            units = (~self.active[group.name]).nonzero()[:, 0]
            for member in group.members if len(units) else ():
                if member.parameter == name:
                    mask |= member.mask(tensor.shape, units)
        return mask.to(tensor.device)

    def held(self, name: str) -> Tensor:
        """Bool of a tensor's shape: the entries that are held."""
        known = self._held.get(name)
        tensor = self.tensor(name)
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device) if known is None else known

    def virtual(self, name: str) -> Tensor:
        """A tensor with the parked values of inactive units in their places; masked weights stay zero."""
        tensor = self.tensor(name).detach()
        if name not in self.parked:
            return tensor
        dead = self.by_units(name)
        if name in self.live:
            dead &= self.live[name].to(dead.device)
        return torch.where(dead, self.parked[name], tensor)

    def set_held(self, name: str) -> tuple[Tensor, Tensor]:
        """Holds what is to be held of a tensor now.

        Returns:
            Bool of its shape: what was not held before, and what no longer is.
        """
        tensor, before = self.tensor(name), self.held(name)
        after = self.by_units(name)
        if name in self.live:
            after |= ~self.live[name].to(after.device)
        self._held[name] = after
        if not after.any():
            del self._held[name]
            if name in self._hooks:
                self._hooks.pop(name).remove()
        elif name not in self._hooks and isinstance(tensor, nn.Parameter):
            self._hooks[name] = self._hook(name, tensor)
        return after & ~before, before & ~after

    def _hook(self, name: str, parameter: nn.Parameter) -> Any:
        def mask(gradient: Tensor) -> Tensor | None:
            held = self._held.get(name)
            if held is None or self._open:
                return None
            if held.device != gradient.device:
                held = self._held[name] = held.to(gradient.device)
            return gradient.masked_fill(held, 0)

        frozen = not parameter.requires_grad  # it may be thawed later, and then the hook must be there
        parameter.requires_grad_(True)
        hook = parameter.register_hook(mask)
        parameter.requires_grad_(not frozen)
        return hook

    @torch.no_grad()
    def refresh(self, names: Iterable[str]) -> None:
        """Brings the values, gradients and optimizer state of tensors in line with what is to be held of them.

        What is newly held is parked and becomes zero; what no longer is gets its parked value, and state that begins anew.
        """
        for name in names:
            tensor = self.tensor(name)
            newly, again = self.set_held(name)
            if newly.any():
                parked = self.parked.setdefault(name, torch.zeros_like(tensor.detach()))
                parked[newly] = tensor.detach()[newly]
                tensor.masked_fill_(newly, rest_value(name))
            if again.any() and name in self.parked:
                tensor[again] = self.parked[name][again]
            if isinstance(tensor, nn.Parameter) and bool((newly | again).any()):
                state.clear(self.optimizer, tensor, newly | again)
                if tensor.grad is not None:
                    tensor.grad.masked_fill_(newly | again, 0)

    @torch.no_grad()
    def write(self, name: str, where: Tensor, values: Tensor) -> None:
        """Writes the marked entries of ``values``, of the tensor's shape: into the tensor, or where held, the park."""
        tensor, held = self.tensor(name), self.held(name)
        where = where.to(tensor.device)
        tensor[where & ~held] = values.to(tensor.dtype)[where & ~held]
        if (where & held).any():
            parked = self.parked.setdefault(name, torch.zeros_like(tensor.detach()))
            parked[where & held] = values.to(tensor.dtype)[where & held]

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside, parked values of inactive units are in their places, and gradients of held entries come through.

        Whoever reads an inactive unit here has to hold back what it gives to others: see ``collect``.
        """
        swapped: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for name in self.parked:
                tensor = self.tensor(name)
                swapped.append((tensor, tensor.detach().clone()))
                tensor.copy_(self.virtual(name))
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before
            with torch.no_grad():
                for tensor, values in swapped:
                    tensor.copy_(values)

    def count(self) -> None:
        """Notes that an optimizer step was made."""
        self.steps += 1

    def ages(self, name: str) -> Tensor:
        """int64 (units,) optimizer steps since each unit became active; -1 for inactive ones."""
        return torch.where(self.active[name], self.steps - self.born[name], -1)

    def renew(self, groups: Mapping[str, Group]) -> None:
        """Takes other groups in place of all, after their tensors changed shape; nothing is held then."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._held.clear()
        self.groups = dict(groups)
        self._touching.clear()
        for group in groups.values():
            for name in {member.parameter for member in group.members}:
                self._touching.setdefault(name, []).append(group)


def rest_value(name: str) -> float:
    """What an entry of an inactive unit is set to: zero, or one for a running variance."""
    return 1.0 if name.endswith("running_var") else 0.0
