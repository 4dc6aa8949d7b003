"""Where the units of groups lie in the flat parameters of a population."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.structure.bit_masks import cleared, unset
from trimtab.inner_training.structure.groups import Group, Member


@dataclass(frozen=True, eq=False)
class Piece:
    """What of one parameter belongs to the units of a group, in a row of flat parameters.

    Attributes:
        begin, shape: of the parameter.
        axis: of units.
        index: (U k,) int64 positions along the axis; None for all of them, in order.
        units: U.
    """

    begin: int
    shape: torch.Size
    axis: int
    index: Tensor | None
    units: int

    @classmethod
    def of_member(cls, member: Member, layout: FlatLayout, device: torch.device) -> Piece:
        """That of a parameter's member."""
        shape, index = layout.shapes[member.parameter], member.index.flatten()
        whole = len(index) == shape[member.axis] and member.in_order
        place = None if whole else index.to(device)
        return cls(layout.offsets[member.parameter], shape, member.axis, place, len(member.index))

    @property
    def each(self) -> int:
        """Entries of one unit."""
        along = self.shape[self.axis] if self.index is None else len(self.index)
        return self.shape.numel() // self.shape[self.axis] * along // self.units

    def view(self, flat: Tensor) -> Tensor:
        """(N, positions, ...) view of flat (N, P)."""
        part = flat[:, self.begin : self.begin + self.shape.numel()]
        return part.view(len(flat), *self.shape).movedim(self.axis + 1, 1)

    def of(self, flat: Tensor) -> Tensor:
        """(N, U, K) entries, sometimes a view."""
        view = self.view(flat)
        return (view if self.index is None else view.index_select(1, self.index)).reshape(len(flat), self.units, -1)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Writes (N, U, K), in place."""
        view = self.view(flat)
        if self.index is None:
            view.copy_(values.reshape(view.shape))
        else:
            view.index_copy_(1, self.index, values.reshape(len(flat), len(self.index), *view.shape[2:]))

    def put_at(self, flat: Tensor, units: Tensor, values: Tensor, which: Tensor) -> None:
        """Writes (N, k, K) for different units (N, k) int64, where ``which`` (N, k) is True, in place."""
        view = self.view(flat)
        table = torch.arange(view.shape[1], device=flat.device) if self.index is None else self.index
        at = torch.arange(len(flat), device=flat.device)[:, None, None], table.view(self.units, -1)[units]
        old = view[at]  # (N, k, positions of one unit, ...)
        view[at] = torch.where(which.view(*which.shape, *[1] * (old.ndim - 2)), values.reshape(old.shape), old)

    def mark(self, mask: Tensor, units: Tensor, over: bool) -> None:
        """Marks entries of units (N, U) bool in a mask (N, P), in place; ``over`` writes the unmarked ones too."""
        view = self.view(mask)
        count = view.shape[1] if self.index is None else len(self.index)
        wide = units[..., None].expand(*units.shape, count // self.units).reshape(len(units), count)
        if self.index is not None:
            wide = torch.zeros_like(wide[:, :1]).expand(-1, view.shape[1]).index_copy(1, self.index, wide)
        wide = wide.view(*wide.shape, *[1] * (view.ndim - 2))
        if over:
            view.copy_(wide)
        else:
            view.logical_or_(wide)


@dataclass(frozen=True, eq=False)
class Part:
    """Pieces beside each other, as ``groups.joined`` lays them out."""

    pieces: tuple[Piece, ...]
    units: int

    @property
    def width(self) -> int:
        """K, entries of one unit."""
        return sum(piece.each for piece in self.pieces)

    def of(self, flat: Tensor) -> Tensor:
        """(N, U, K) entries of flat parameters (N, P), sometimes a view."""
        if len(self.pieces) == 1:
            return self.pieces[0].of(flat)
        empty = flat.new_empty(len(flat), self.units, 0)
        return torch.cat([empty, *(piece.of(flat) for piece in self.pieces)], 2)

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Writes (N, U, K), in place."""
        parts = values.split([piece.each for piece in self.pieces], 2)  # type: ignore[no-untyped-call]
        for piece, part in zip(self.pieces, parts, strict=True):
            piece.put(flat, part)

    def put_at(self, flat: Tensor, units: Tensor, values: Tensor, which: Tensor) -> None:
        """Writes (N, k, K) for different units (N, k) int64, where ``which`` (N, k) is True, in place."""
        for piece, part in zip(self.pieces, self.slices(), strict=True):
            piece.put_at(flat, units, values[..., part], which)

    def slices(self) -> list[slice]:
        """Where each piece lies among the K."""
        ends = list(accumulate(piece.each for piece in self.pieces))
        return [slice(end - piece.each, end) for piece, end in zip(self.pieces, ends, strict=True)]


@dataclass(frozen=True, eq=False)
class FlatGroup:
    """One group of units in flat parameters.

    Attributes:
        group: what it is made from.
        span: its units among those of all groups.
        incoming, columns: what ``weights_in`` and ``weights_out`` of the evidence are made of.
        bias: (U, 1), or of no width where units have no bias of their own.
        others: scales and shifts of norms, and the like.
        start: (Z,) what a newborn's ``others`` begin with; NaN is the incumbents' mean.
        gates: by buffer name, (U, k) positions in it.
        rows: how many rows of one unit each piece of ``incoming`` has; 0 for one that is no row.
        readers: of each piece of ``columns``, its positions of one unit, and positions (o,) in flat parameters of the biases
            of what it feeds; None where that has no bias.
    """

    group: Group
    span: slice
    incoming: Part
    columns: Part
    bias: Part
    others: Part
    start: Tensor
    gates: dict[str, Tensor]
    rows: tuple[int, ...]
    readers: tuple[tuple[int, Tensor | None], ...]

    @property
    def name(self) -> str:
        """Of the group."""
        return self.group.name

    @property
    def units(self) -> int:
        """U."""
        return self.group.units

    def parts(self) -> tuple[Part, ...]:
        """All of the units' own."""
        return self.incoming, self.bias, self.columns, self.others


def _part(members: Sequence[Member], layout: FlatLayout, units: int, device: torch.device) -> Part:
    return Part(tuple(Piece.of_member(member, layout, device) for member in members), units)


def _start(group: Group, layout: FlatLayout, module: nn.Module) -> Tensor:
    found = [torch.zeros(0)]
    for member in _others(group):
        norm = "Norm" in type(module.get_submodule(member.owner)).__name__
        value = float(member.parameter.endswith("weight")) if norm else torch.nan
        shape = layout.shapes[member.parameter]
        found.append(torch.full((shape.numel() // shape[member.axis] * member.each,), value))
    return torch.cat(found)


def _readers(
    group: Group, layout: FlatLayout, module: nn.Module, device: torch.device
) -> tuple[tuple[int, Tensor | None], ...]:
    found = []
    for member in group.of_role("column"):
        bias = f"{member.owner}.bias" if member.owner else "bias"
        owner, place = module.get_submodule(member.owner), None
        plain = getattr(owner, "groups", 1) == 1 and not getattr(owner, "transposed", False)
        if bias in layout.shapes and plain:
            begin = layout.offsets[bias]
            place = torch.arange(begin, begin + layout.shapes[bias].numel(), device=device)
        found.append((member.each, place))
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
        self._marks = self._marked()
        self._live: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def _placed(group: Group, span: slice, layout: FlatLayout, module: nn.Module, device: torch.device) -> FlatGroup:
        bias = [] if group.bias is None else [group.bias]
        members = (group.incoming, group.of_role("column"), bias, _others(group))
        incoming, columns, own, others = (_part(part, layout, group.units, device) for part in members)
        gates = {one.parameter: one.index.to(device) for one in group.of_role("statistic")}
        rows = tuple(member.each if member.role == "row" else 0 for member in group.incoming)
        start, readers = _start(group, layout, module).to(device), _readers(group, layout, module, device)
        return FlatGroup(group, span, incoming, columns, own, others, start, gates, rows, readers)

    def _marked(self) -> list[tuple[slice, Piece, bool]]:
        """How to mark entries: units, piece, and whether it is the first to cover its parameter."""
        found, covered = [], set()
        for one in self:
            for piece in (piece for part in one.parts() for piece in part.pieces):
                over = piece.index is None and piece.begin not in covered
                covered.add(piece.begin)
                found.append((one.span, piece, over))
        return found

    def __iter__(self) -> Iterator[FlatGroup]:
        return iter(self._by_name.values())

    def __getitem__(self, name: str) -> FlatGroup:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def names(self) -> list[str]:
        """Of the groups, in order."""
        return list(self._by_name)

    def entries(self, units: Tensor) -> Tensor:
        """(N, P) bool: which entries belong to marked units (N, T) bool."""
        mask = torch.zeros(len(units), self.width, dtype=torch.bool, device=units.device)
        for span, piece, over in self._marks:
            piece.mark(mask, units[:, span], over)
        return mask

    def live(self, active: Tensor) -> Tensor:
        """``bits`` (N, P) of entries that no inactive unit holds, by the active units (N, T) bool; nobody may write to either.

        Those of the tensor that was given last are remembered, as most of what is done asks for the same ones.
        """
        if self._live is None or self._live[0] is not active:
            self._live = active, unset(self.entries(~active))
        return self._live[1]

    def know_live(self, active: Tensor, live: Tensor) -> None:
        """Takes for ``live`` what somebody has found already."""
        self._live = active, live

    def own(self, one: FlatGroup, part: Part, values: Tensor, active: Tensor) -> Tensor:
        """(N, U, K) entries of a part in values (N, P), sometimes a view; 0 for what inactive units of other groups hold."""
        found = []
        for piece in part.pieces:
            others = [(span, each) for span, each, _ in self._marks if each.begin == piece.begin and span != one.span]
            region, local = values, piece
            if others:
                region = values[:, piece.begin : piece.begin + piece.shape.numel()]
                mask = torch.zeros_like(region, dtype=torch.bool)
                for span, each in others:
                    replace(each, begin=0).mark(mask, ~active[:, span], False)
                region, local = cleared(mask, region)[0], replace(piece, begin=0)
            found.append(local.of(region))
        return found[0] if len(found) == 1 else torch.cat([values.new_empty(len(values), one.units, 0), *found], 2)

    def largest(self, values: Tensor) -> Tensor:
        """(N, P): of the values (N, T) of the units that an entry belongs to, the largest; 0 for those of no unit."""
        found = values.new_zeros(len(values), self.width)
        for span, piece, _ in self._marks:
            wide = values[:, span, None].expand(-1, -1, piece.each)
            piece.put(found, torch.maximum(piece.of(found), wide))
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
