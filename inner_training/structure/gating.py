"""Gates of a plain module: what touches an inactive unit is held at zero, and the values that it had are parked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.groups import Group, find_tensor
from trimtab.inner_training.structure.known import given_gates

GATES: WeakSet[Gates] = WeakSet()  # all that there are; hooks on parameters keep theirs


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
        born: int64 (units,) by group: the value of ``steps`` at which a unit became active or was reset; -1 for those that are
            there from the beginning.
        noted: where gradients of tensors that are held somewhere are added up before they are masked, by name; None for
            nowhere.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, groups: Iterable[Group]) -> None:
        self.model, self.optimizer = model, optimizer
        self._take(groups)
        self.active = {name: torch.ones(group.units, dtype=torch.bool) for name, group in self.groups.items()}
        self.born = {name: torch.full((group.units,), -1) for name, group in self.groups.items()}
        self.live: dict[str, Tensor] = {}
        self.parked: dict[str, Tensor] = {}
        self.steps = 0
        self.noted: dict[str, Tensor] | None = None
        self._held: dict[str, Tensor] = {}
        self._hooks: dict[str, Any] = {}
        self._open = False
        GATES.add(self)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the module as it is now."""
        return find_tensor(self.model, name)

    def entries(self, group: Group, units: Tensor) -> dict[str, Tensor]:
        """Bool by tensor name: the entries of some units of a group, given by their numbers (see ``check_same``)."""
        self.check_same()
        found: dict[str, Tensor] = {}
        for member in group.members:
            mask = member.mask(self.tensor(member.parameter).shape, units)
            found[member.parameter] = found[member.parameter] | mask if member.parameter in found else mask
        return found

    def by_units(self, name: str, groups: Collection[str] | None = None) -> Tensor:
        """Bool of a tensor's shape: the entries that belong to an inactive unit of some groups, or of any."""
        tensor = self.tensor(name)
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        for group in self._touching.get(name, []):
            units = (~self.active[group.name]).nonzero()[:, 0]
            if groups is not None and group.name not in groups:
                continue
            for member in group.members if len(units) else ():
                if member.parameter == name:
                    mask |= member.mask(tensor.shape, units)
        return mask.to(tensor.device)

    def held(self, name: str) -> Tensor:
        """Bool of a tensor's shape: the entries that are held."""
        known = self._held.get(name)
        tensor = self.tensor(name)
        return torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device) if known is None else known

    def virtual(self, name: str, groups: Collection[str] | None = None) -> Tensor:
        """A tensor with the parked values of inactive units of some groups, or of all, in their places.

        What is held for another reason too, by a mask or by an inactive unit of another group, stays zero.
        """
        tensor = self.tensor(name).detach()
        if name not in self.parked:
            return tensor
        dead = self.by_units(name, groups)
        if groups is not None:
            dead &= ~self.by_units(name, self.groups.keys() - groups)
        if name in self.live:
            dead &= self.live[name].to(dead.device)
        return torch.where(dead, self.parked[name].to(tensor.device), tensor)

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
            if self.noted is not None:
                self.noted[name] = gradient.detach() + self.noted.get(name, 0)
            return gradient.masked_fill(held, 0)

        frozen = not parameter.requires_grad  # it may be thawed later, and then the hook must be there
        parameter.requires_grad_(True)
        hook = parameter.register_hook(mask)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(not frozen)
        return hook

    @property
    def closed(self) -> dict[str, nn.Parameter]:
        """Parameters of which something is held, by name."""
        tensors = {name: self.tensor(name) for name in self._held}
        return {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}

    def check_same(self) -> None:
        """Raises ``MismatchError`` where the module has other parameters than those that the gates are on."""
        for name, parameter in self._known.items():
            try:
                same = self.tensor(name) is parameter
            except AttributeError:
                same = False
            if not same:
                raise MismatchError(
                    f"{name} of the model is not the parameter that the gates were put on, as where a layer was replaced; make the "
                    "optimizer and trimtab.gates anew"
                )

    def check_held(self) -> None:
        """Raises ``MismatchError`` where entries that are held are finite and not zero: weights were put in from elsewhere;
        or see ``check_same``."""
        self.check_same()
        for name, parameter in self.closed.items():
            values = parameter.detach()[self._held[name].to(parameter.device)]
            if bool((values.isfinite() & (values != 0)).any()):
                raise MismatchError(
                    f"{name} holds values of units that are not active, as where a model's state was loaded and the structure's "
                    "was not; call structure.load_state_dict after the model's, with the state saved beside it"
                )

    @torch.no_grad()
    def refresh(self, names: Iterable[str]) -> None:
        """Brings the values, gradients and optimizer state of tensors in line with what is to be held of them.

        What is newly held is parked and becomes zero; what no longer is gets its parked value, and state that begins anew.
        """
        for name in names:
            tensor = self.tensor(name)
            newly, again = self.set_held(name)
            if name in self.parked:  # the module may have been moved or cast since
                self.parked[name] = self.parked[name].to(tensor)
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
    def opened(self, groups: Collection[str]) -> Iterator[None]:
        """Inside, parked values of inactive units of some groups are in place, and no gradient is masked.

        Whoever runs the module here has to gate what these units give to others (see ``collect``).
        """
        swapped: list[tuple[Tensor, Tensor]] = []
        before, self._open = self._open, True
        try:
            with torch.no_grad():
                for name in self.parked:
                    tensor = self.tensor(name)
                    values = self.virtual(name, groups)
                    swapped.append((tensor, tensor.detach().clone()))
                    tensor.copy_(values)
            yield
        finally:
            self._open = before
            with torch.no_grad():
                for tensor, values in swapped:
                    tensor.copy_(values)

    @torch.no_grad()
    def hold(self) -> None:
        """Puts masked weights back to zero after a step, as orthogonalised ones (Muon) are moved without any gradient."""
        for name in self.live.keys() & self._held.keys():
            tensor = self.tensor(name)
            tensor.masked_fill_(self._held[name].to(tensor.device), 0)

    def count(self) -> None:
        """Notes that an optimizer step was made."""
        self.steps += 1

    def ages(self, name: str) -> Tensor:
        """int64 (units,) optimizer steps since each unit became active; -1 for inactive ones."""
        return torch.where(self.active[name], self.steps - self.born[name].clamp(min=0), -1)

    def renew(self, groups: Mapping[str, Group], cuts: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Goes on after units were cut out of the tensors.

        Args:
            groups: what is left of each group: its active units, or all where it is kept.
            cuts: by tensor name, what cuts a tensor of the old shape.
        """
        for hook in self._hooks.values():
            hook.remove()
        names = {*self._held, *self.live}
        self._hooks, self._held = {}, {}
        for name, group in groups.items():
            if not group.kept:
                self.born[name] = self.born[name][self.active[name]]
                self.active[name] = torch.ones(group.units, dtype=torch.bool)
        for kept in (self.live, self.parked):
            for name in kept.keys() & cuts.keys():
                kept[name] = cuts[name](kept[name])
        self._take(groups.values())
        for name in names:
            self.set_held(name)

    def close_as_given(self) -> None:
        """Lets units of our own networks be inactive whose gates are closed already."""
        for name, mask in given_gates(self.model, self.groups.values()).items():
            if bool(mask.all()) or not bool(mask.any()):
                continue
            self.active[name] = mask.clone()
            touched = self.entries(self.groups[name], (~mask).nonzero()[:, 0])
            self.refresh(touched)
            for member in self.groups[name].of_role("statistic"):
                self.parked[member.parameter].fill_(1.0)  # once active again, its gate is open

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "steps": self.steps,
            "active": {name: mask.clone() for name, mask in self.active.items()},
            "born": {name: steps.clone() for name, steps in self.born.items()},
            "live": {name: mask.clone() for name, mask in self.live.items()},
            "parked": {name: values.clone() for name, values in self.parked.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a saved state: what is held by it becomes zero, and nothing else changes.

        Args:
            saved: verified (see ``check_saved``).
        """
        names = {*self._held, *self.live, *saved["live"], *saved["parked"]}
        self.steps = int(saved["steps"])
        self.active = {name: mask.cpu().clone() for name, mask in saved["active"].items()}
        self.born = {name: steps.cpu().clone() for name, steps in saved["born"].items()}
        self.live = {name: mask.clone() for name, mask in saved["live"].items()}
        self.parked = {name: values.to(self.tensor(name), copy=True) for name, values in saved["parked"].items()}
        for name in names:
            self.set_held(name)
            tensor, held = self.tensor(name), self.held(name)
            if isinstance(tensor, nn.Parameter):
                with torch.no_grad():
                    tensor.masked_fill_(held, 0)
                state.clear(self.optimizer, tensor, held)
                if tensor.grad is not None:
                    tensor.grad.masked_fill_(held, 0)

    def _take(self, groups: Iterable[Group]) -> None:
        self.groups = {group.name: group for group in groups}
        self._touching: dict[str, list[Group]] = {}
        for group in self.groups.values():
            for name in {member.parameter for member in group.members}:
                self._touching.setdefault(name, []).append(group)
        tensors = {name: self.tensor(name) for name in self._touching}
        self._known = {name: one for name, one in tensors.items() if isinstance(one, nn.Parameter)}


def rest_value(name: str) -> float:
    """What an entry of an inactive unit is set to: zero, or one for a running variance."""
    return 1.0 if name.endswith("running_var") else 0.0
