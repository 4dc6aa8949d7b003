"""Where the units of groups lie in the flat parameters of a population."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.structure.groups import Group, Member


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """One group of units: positions int64 in a row of the flat parameters, and in the rows of gates.

    Attributes:
        group: what it is made from.
        span: its units among those of all groups.
        incoming, columns: (U, I), (U, O) what ``weights_in`` and ``weights_out`` of the evidence are made of.
        bias: (U, 1), or (U, 0) where units have no bias of their own.
        others: (U, Z) scales and shifts of norms, and the like.
        start: (Z,) what a newborn's ``others`` begin with; NaN is the incumbents' mean.
        gates: by buffer name, (U, k) positions in it.
        rows: of what ``incoming`` consists: each part, the rows of one unit in it, and whether they are rows at all.
        readers: of what ``columns`` consists: each part, the positions of one unit in it, and the positions (o,) of the
            biases of what it feeds; None where that has no bias.
    """

    group: Group
    span: slice
    incoming: Tensor
    columns: Tensor
    bias: Tensor
    others: Tensor
    start: Tensor
    gates: dict[str, Tensor]
    rows: tuple[tuple[slice, int, bool], ...]
    readers: tuple[tuple[slice, int, Tensor | None], ...]

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    @property
    def units(self) -> int:
        """U."""
        return self.group.units

    def parts(self) -> tuple[Tensor, ...]:
        """All positions of the units' own, as (U, K) each."""
        return self.incoming, self.bias, self.columns, self.others


def _positions(members: Sequence[Member], layout: FlatLayout, units: int) -> Tensor:
    """(units, entries) positions of the members' entries, in the order of ``groups.joined``."""
    found = [torch.zeros(units, 0, dtype=torch.int64)]
    for member in members:
        shape, begin = layout.shapes[member.parameter], layout.offsets[member.parameter]
        found.append(member.of(torch.arange(begin, begin + shape.numel()).view(shape)))
    return torch.cat(found, 1)


def _start(group: Group, layout: FlatLayout, module: nn.Module) -> Tensor:
    found = [torch.zeros(0)]
    for member in _others(group):
        norm = "Norm" in type(module.get_submodule(member.owner)).__name__
        value = float(member.parameter.endswith("weight")) if norm else torch.nan
        shape = layout.shapes[member.parameter]
        found.append(torch.full((shape.numel() // shape[member.axis] * member.each,), value))
    return torch.cat(found)


def _parts(members: Sequence[Member], layout: FlatLayout) -> list[tuple[Member, slice]]:
    """Each member, and where its entries lie beside those of the others."""
    found, begin = [], 0
    for member in members:
        shape = layout.shapes[member.parameter]
        end = begin + shape.numel() // shape[member.axis] * member.each
        found.append((member, slice(begin, end)))
        begin = end
    return found


def _rows(group: Group, layout: FlatLayout) -> tuple[tuple[slice, int, bool], ...]:
    return tuple((part, member.each, member.role == "row") for member, part in _parts(group.incoming, layout))


def _readers(
    group: Group, layout: FlatLayout, module: nn.Module, device: torch.device
) -> tuple[tuple[slice, int, Tensor | None], ...]:
    found = []
    for member, part in _parts(group.of_role("column"), layout):
        bias = f"{member.owner}.bias" if member.owner else "bias"
        owner, place = module.get_submodule(member.owner), None
        plain = getattr(owner, "groups", 1) == 1 and not getattr(owner, "transposed", False)
        if bias in layout.shapes and plain:
            begin = layout.offsets[bias]
            place = torch.arange(begin, begin + layout.shapes[bias].numel(), device=device)
        found.append((part, member.each, place))
    return tuple(found)


def _others(group: Group) -> list[Member]:
    return [member for member in group.others if member.role == "vector"]


class FlatGroups:
    """All groups of a population's module.

    Attributes:
        total: T, units of all groups.
        width: P, of a row of flat parameters.
    """

    def __init__(self, groups: Iterable[Group], layout: FlatLayout, module: nn.Module, device: torch.device) -> None:
        self.width, self.total = layout.width, 0
        self._by_name: dict[str, FlatGroup] = {}
        for group in groups:
            span = slice(self.total, self.total + group.units)
            self._by_name[group.name] = self._placed(group, span, layout, module, device)
            self.total = span.stop
        self._owners = self._owned().to(device)

    @staticmethod
    def _placed(group: Group, span: slice, layout: FlatLayout, module: nn.Module, device: torch.device) -> FlatGroup:
        bias = [] if group.bias is None else [group.bias]
        members = (group.incoming, group.of_role("column"), bias, _others(group))
        incoming, columns, own, others = (_positions(part, layout, group.units).to(device) for part in members)
        gates = {one.parameter: one.index.to(device) for one in group.of_role("statistic")}
        start = _start(group, layout, module).to(device)
        rows, readers = _rows(group, layout), _readers(group, layout, module, device)
        return FlatGroup(group, span, incoming, columns, own, others, start, gates, rows, readers)

    def _owned(self) -> Tensor:
        """(D, P) units that an entry belongs to, T for none: one may lie in a row of one group and a column of another."""
        layers: list[Tensor] = []
        for one in self:
            for part in one.parts():
                place, unit = part.flatten().cpu(), torch.arange(one.span.start, one.span.stop)
                owner = unit[:, None].expand_as(part).flatten()
                free = next((layer for layer in layers if bool((layer[place] == self.total).all())), None)
                if free is None:
                    free = torch.full((self.width,), self.total)
                    layers.append(free)
                free[place] = owner
        return torch.stack(layers) if layers else torch.zeros(0, self.width, dtype=torch.int64)

    def __iter__(self) -> Iterator[FlatGroup]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> FlatGroup:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def names(self) -> list[str]:
        """Of the groups, in order."""
        return list(self._by_name)

    def entries(self, units: Tensor, where: Tensor | None = None) -> Tensor:
        """Which entries belong to marked units.

        Args:
            units: (N, T) bool.
            where: (M,) positions; None for all.

        Returns:
            (N, P) or (N, M) bool.
        """
        marked = torch.nn.functional.pad(units, (0, 1))
        owners = self._owners if where is None else self._owners[:, where]
        found = torch.zeros(len(units), owners.shape[1], dtype=torch.bool, device=units.device)
        for layer in owners:
            found |= marked.index_select(1, layer)
        return found

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Views (N, U) of values (N, T), by group."""
        return {one.name: values[:, one.span] for one in self}

    def joined(self, values: dict[str, Tensor], fill: float | bool) -> Tensor:
        """(N, T) from (N, U) by group; groups that are missing get ``fill``."""
        first = next(iter(values.values()))
        missing = first.new_full((1, 1), fill)
        parts = [values.get(one.name, missing.expand(len(first), one.units)) for one in self]
        return torch.cat(parts, 1)


def taken(flat: Tensor, where: Tensor) -> Tensor:
    """(N, U, K) entries of flat parameters (N, P) at positions (U, K), a copy."""
    return flat.index_select(1, where.flatten()).view(len(flat), *where.shape)


def put(flat: Tensor, where: Tensor, values: Tensor) -> None:
    """Writes (N, U, K) at positions (U, K) of ``flat`` (N, P), in place."""
    flat.index_copy_(1, where.flatten(), values.reshape(len(flat), -1))
