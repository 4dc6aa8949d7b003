"""Outputs of units as their columns read them, with the gradients that come back, by example and place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.inner_training.structure.evidence import FREQUENT
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.watching import examples_apart

# The opening of the gates of inactive units while evidence is gathered: a power of two, so that what is divided by it again
# loses nothing, and so small that outputs and the gradients of other units stay what they are in float32.
AJAR = 2.0**-20


@dataclass
class Read:
    """One column reading once.

    Attributes:
        group, member: whose column.
        before: what comes in, from before the gate.
        after: what is read in its place.
        axis: along which the column's positions lie.
    """

    group: Group
    member: Member
    before: Tensor
    after: Tensor
    axis: int


class Reads:
    """A handler for ``watching`` that opens inactive units by a crack, and keeps what passes if it is told to."""

    def __init__(self, gates: Gates, keep: bool) -> None:
        self._gates, self._keep = gates, keep
        self.seen: list[Read] = []

    def __call__(self, group: Group, member: Member, values: Tensor, axis: int) -> Tensor:
        idle = ~self._gates.active[group.name]
        after = values.view_as(values)
        if idle.any():
            gate = torch.ones(values.shape[axis], device=values.device, dtype=values.dtype)
            gate[member.index[idle].flatten().to(values.device)] = AJAR
            after = values * gate.view(-1, *[1] * (-axis - 1))
        if self._keep:
            after = after if after.requires_grad else after.detach().requires_grad_()
            self.seen.append(Read(group, member, values, after, axis))
        return after


def by_example(values: Tensor, axis: int, examples: int, tokens_first: bool = False) -> Tensor:
    """(B, F, S) of values with F features along an axis; B is 1 where examples cannot be told apart.

    Args:
        values: with examples first, or, of sequences, second; or examples and tokens in one axis.
        axis: of the features.
        examples: B.
        tokens_first: whether, where they are in one axis, all examples of a token follow each other.

    >>> by_example(torch.zeros(5, 7, 3), -1, 5).shape, by_example(torch.zeros(35, 3), -1, 5).shape
    (torch.Size([5, 3, 7]), torch.Size([5, 3, 7]))
    """
    values = values.movedim(axis, -1)
    lead, features = values.shape[:-1], values.shape[-1]
    if lead and lead[0] == examples:
        found = values.reshape(examples, -1, features)
    elif len(lead) > 1 and lead[1] == examples:
        found = values.transpose(0, 1).reshape(examples, -1, features)
    elif values.numel() // features % examples:
        found = values.reshape(1, -1, features)
    elif tokens_first:
        found = values.reshape(-1, examples, features).transpose(0, 1)
    else:
        found = values.reshape(examples, -1, features)
    return found.movedim(-1, 1)


def units_of(values: Tensor, member: Member) -> Tensor:
    """(B, U, k S) of features (B, F, S): those of each unit, all its positions beside each other."""
    chosen = values[:, member.index.flatten().to(values.device)]
    return chosen.reshape(len(values), len(member.index), -1)


def outputs_and_gradients(
    reads: Sequence[Read], slopes: Mapping[int, Tensor], examples: int, model: nn.Module
) -> tuple[Tensor, Tensor]:
    """h and g = dL_b/dh, both (B, U, S) float32, of all reads of one group; places of several readers lie beside each other.

    Args:
        reads: of the group.
        slopes: gradient of the mean loss by the id of what was read; what is missing is zero.
        examples: of the batch.
        model: tells torch's attention, which puts tokens first.
    """
    outputs: list[Tensor] = []
    gradients: list[Tensor] = []
    for read in reads:
        parent = model.get_submodule(read.member.owner.rpartition(".")[0])
        first = isinstance(parent, nn.MultiheadAttention)
        slope = slopes.get(id(read.after))
        slope = torch.zeros_like(read.before) if slope is None else slope
        for kept, values in ((outputs, read.before), (gradients, slope * examples)):
            apart = examples if examples_apart(model, read.member) else 1
            kept.append(units_of(by_example(values.detach().float(), read.axis, apart, first), read.member))
    if len({len(one) for one in outputs}) > 1:
        outputs = [one.movedim(1, 0).reshape(1, one.shape[1], -1) for one in outputs]
        gradients = [one.movedim(1, 0).reshape(1, one.shape[1], -1) for one in gradients]
    return torch.cat(outputs, 2), torch.cat(gradients, 2)


def activity(h: Tensor, g: Tensor, examples: int) -> dict[str, Tensor]:
    """The fields of ``Evidence`` that outputs h (B, U, S) and their gradients g, of single examples, give."""
    product = h * g
    total = product.abs().sum((0, 2)) / examples
    return {
        "mean_abs": h.abs().mean((0, 2)),
        "mean": h.mean((0, 2)),
        "square": h.square().mean((0, 2)),
        "active": (h > FREQUENT).float().mean((0, 2)),
        "agf": total,
        "agf_first": total,
        "taylor": product.sum(2).abs().sum(0) / examples,
        "signed": product.sum((0, 2)) / examples,
        "output_cov": torch.einsum("bus,bvs->uv", h, h) / (h.shape[0] * h.shape[2]),
    }
