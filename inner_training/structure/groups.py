"""Groups of units that move together, and which entries of a module's tensors belong to each unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

Role = Literal["row", "column", "vector", "statistic"]
Read = Callable[[str], Tensor]  # a tensor of the shape of a parameter, by the parameter's name


@dataclass(frozen=True, eq=False)
class Member:
    """What of one parameter or buffer belongs to each unit of a group.

    Attributes:
        parameter: name of the parameter, or of the buffer where the role is ``statistic``.
        role: ``row`` computes the unit, ``vector`` is its bias or its scale and shift in a norm, ``statistic`` a buffer of
            it, ``column`` what reads it.
        axis: axis of the tensor along which units lie.
        index: (units, k) int64 positions along that axis, k >= 1 for each unit.

    >>> weight = torch.arange(8.0).view(4, 2)
    >>> member = Member("weight", "row", 0, torch.tensor([[0, 2], [1, 3]]))
    >>> member.of(weight)
    tensor([[0., 1., 4., 5.],
            [2., 3., 6., 7.]])
    >>> member.mask(weight.shape, torch.tensor([1])).any(1)
    tensor([False,  True, False,  True])
    """

    parameter: str
    role: Role
    axis: int
    index: Tensor

    @property
    def owner(self) -> str:
        """Name of the module that holds the tensor; empty for the root."""
        return self.parameter.rpartition(".")[0]

    @property
    def each(self) -> int:
        """k, the positions of one unit."""
        return self.index.shape[1]

    @cached_property
    def last(self) -> int:
        """The largest position."""
        return int(self.index.max())

    @cached_property
    def in_order(self) -> bool:
        """Whether unit u has the positions [u k, (u + 1) k)."""
        return torch.equal(self.index.flatten(), torch.arange(self.index.numel()))

    def of(self, tensor: Tensor) -> Tensor:
        """(units, entries of one) the unit's entries of a tensor of the parameter's shape, a copy."""
        index = self.index.to(tensor.device)
        return tensor.index_select(self.axis, index.flatten()).movedim(self.axis, 0).reshape(len(index), -1)

    def put(self, tensor: Tensor, units: Tensor, values: Tensor) -> None:
        """Writes entries (n, entries of one) of n units, laid out as ``of`` gives them, in place."""
        index = self.index.to(tensor.device)[units.to(tensor.device)].flatten()
        rest = tensor.movedim(self.axis, 0).shape[1:]
        values = values.to(tensor.device, tensor.dtype).reshape(len(index), *rest)
        tensor.index_copy_(self.axis, index, values.movedim(0, self.axis))

    def mask(self, shape: torch.Size, units: Tensor) -> Tensor:
        """Bool of the tensor's shape, on the CPU: which entries belong to the units, given by their numbers."""
        mask = torch.zeros(shape, dtype=torch.bool)
        return mask.index_fill_(self.axis, self.index[units.cpu()].flatten(), True)


@dataclass(frozen=True, eq=False)
class Group:
    """A named set of units that move together: hidden units, channels, or attention heads.

    Attributes:
        name: that of the module that computes the units (the first one), with ``.heads`` behind it for attention heads.
        units: how many there are, active and inactive.
        members: what of each tensor belongs to them.
        minimum: fewest units that stay active, >= 1.
        kept: physical compaction keeps the units, as the module that owns them cannot lack any.
        bare: norms without parameters or statistics that the units pass through, with the channels of one unit there.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    minimum: int = 1
    kept: bool = False
    bare: tuple[tuple[str, int], ...] = ()

    def of_role(self, role: Role) -> tuple[Member, ...]:
        """The members of one role, in order."""
        return tuple(member for member in self.members if member.role == role)

    @cached_property
    def biases(self) -> tuple[Member, ...]:
        """The vectors that are biases of the rows, as those have the same owner."""
        owners = {member.owner for member in self.of_role("row")}
        return tuple(member for member in self.of_role("vector") if member.owner in owners)

    @cached_property
    def bias(self) -> Member | None:
        """The one bias that each unit has; None where units have none or several."""
        return self.biases[0] if len(self.biases) == 1 and self.biases[0].each == 1 else None

    @cached_property
    def incoming(self) -> tuple[Member, ...]:
        """What ``weights_in`` of the evidence is made of: rows, and biases of which a unit has several.

        Such a bias is a weight of an input that is always one.
        """
        return self.of_role("row") + (self.biases if self.bias is None else ())

    @cached_property
    def others(self) -> tuple[Member, ...]:
        """Vectors and statistics that are no biases of rows: those of norms, and the like."""
        known = {id(member) for member in self.biases}
        return tuple(
            member for member in self.members if member.role in ("vector", "statistic") and id(member) not in known
        )


def joined(members: tuple[Member, ...], read: Read) -> Tensor:
    """(units, entries) of several members beside each other, float32."""
    return torch.cat([member.of(read(member.parameter)).float() for member in members], 1)


def split(members: tuple[Member, ...], shapes: Mapping[str, torch.Size], values: Tensor) -> list[tuple[Member, Tensor]]:
    """Values (n, entries), as ``joined`` lays them out, cut into those of each member."""
    sizes = [
        shapes[member.parameter].numel() // shapes[member.parameter][member.axis] * member.each for member in members
    ]
    return list(zip(members, torch.split(values, sizes, 1), strict=True))


def find_tensor(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, key = name.rpartition(".")
    found = getattr(model.get_submodule(owner), key)
    assert isinstance(found, Tensor)
    return found
