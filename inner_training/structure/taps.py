"""Taps on a module inside ``vmap``: what columns read and layers put out gets zeros added, whose gradients are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.reads import AJAR
from trimtab.inner_training.structure.watching import watching

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Site:
    """One column reading once in a forward pass."""

    group: Group
    member: Member
    axis: int


@dataclass
class Seen:
    """What a forward pass went through: reads before their gates, in order, and inputs of layers by name.

    Attributes:
        sites, reads: of the columns.
        inputs, outputs: of layers, the latter without the zeros.
    """

    sites: list[Site] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def read_name(place: int) -> str:
    """The name of a read's zeros, by its number; no layer is called so, also where layers are called by numbers.

    >>> read_name(0)
    '.0'
    """
    return f".{place}"


def owners_in(member: Member, size: int) -> Tensor:
    """(size,) int64 the unit that each position along the member's axis belongs to, as many as there are for none."""
    units = len(member.index)
    owner = torch.full((size,), units)
    owner[member.index.flatten()] = torch.arange(units).repeat_interleave(member.each)
    return owner


class Taps:
    """A handler for ``watching``: inactive units are opened by a crack, and each read gets its zeros added.

    Args:
        active: (U,) bool by group.
        zeros: by ``read_name`` and by name of the layer; empty for none.
        seen: gets what passes.
    """

    def __init__(self, active: Mapping[str, Tensor], zeros: Mapping[str, Tensor], seen: Seen) -> None:
        self._active, self._zeros, self._seen = active, zeros, seen

    def __call__(self, group: Group, member: Member, values: Tensor, axis: int) -> Tensor:
        crack = torch.where(self._active[group.name], 1.0, AJAR)
        owner = owners_in(member, values.shape[axis]).to(values.device)
        gate = torch.cat([crack, torch.ones_like(crack[:1])])[owner]
        after = values * gate.view(-1, *[1] * (-axis - 1))
        place = read_name(len(self._seen.reads))
        self._seen.sites.append(Site(group, member, axis))
        self._seen.reads.append(values)
        return after + self._zeros[place] if place in self._zeros else after

    def layer(self, name: str) -> Any:
        """A forward hook for a layer."""

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
                return None
            self._seen.inputs[name], self._seen.outputs[name] = inputs[0], output
            return output + self._zeros[name] if name in self._zeros else None

        return hook


@contextmanager
def tapped(module: nn.Module, groups: Sequence[Group], layers: Sequence[str], taps: Taps) -> Iterator[None]:
    """Inside, calls of the module go through the taps: all groups, and the layers of these names."""
    with ExitStack() as stack:
        for name in layers:
            stack.callback(module.get_submodule(name).register_forward_hook(taps.layer(name)).remove)
        stack.enter_context(watching(module, groups, taps))
        yield


def shapes_of(
    module: nn.Module, groups: Sequence[Group], layers: Sequence[str], x: Tensor
) -> tuple[Shapes, list[Site]]:
    """Shapes of the zeros that a forward pass on examples needs, and the sites of the reads."""
    active = {group.name: torch.ones(group.units, dtype=torch.bool, device=x.device) for group in groups}
    seen = Seen()
    with torch.no_grad(), tapped(module, groups, layers, Taps(active, {}, seen)):
        module(x)
    shapes = {read_name(place): read.shape for place, read in enumerate(seen.reads)}
    return {**shapes, **{name: output.shape for name, output in seen.outputs.items()}}, seen.sites
