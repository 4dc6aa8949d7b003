"""Units that begin anew, and the biases that make up for what they gave."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.inner_training.structure.brain_surgeon import lost_mean
from trimtab.inner_training.structure.choosing import marked
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, joined, split
from trimtab.inner_training.structure.newborns import Newborns


def fresh_units(gates: Gates, group: Group, units: Tensor, draws: torch.Generator) -> Newborns:
    """Units with rows as ``torch.nn.Linear`` draws them, and biases and columns of zero.

    Uniform in +-1/sqrt(fan_in), where fan_in counts the inputs of a unit's row that are not held at zero; what is held
    gets zero.
    """
    pieces = []
    for member in group.incoming:
        live = (~member.of(gates.held(member.parameter)))[units].float()
        each = live.view(len(units), member.each, -1)
        fan_in = each.sum(2, keepdim=True).clamp(min=1)
        if member.role != "row":
            pieces.append(torch.zeros_like(live))
            continue
        drawn = 2 * torch.rand(each.shape, generator=draws).to(each.device) - 1
        pieces.append((drawn * each / fan_in.sqrt()).flatten(1))
    rows = torch.cat(pieces, 1)
    columns = torch.zeros(len(units), joined(group.of_role("column"), gates.tensor).shape[1], device=rows.device)
    present = torch.ones(len(units), dtype=torch.bool, device=rows.device)
    return Newborns(rows=rows, bias=torch.zeros(len(units), device=rows.device), columns=columns, present=present)


def compensated(gates: Gates, leaving: Mapping[str, tuple[Group, Tensor, Evidence]]) -> dict[str, Tensor]:
    """Biases of the consumers, by name, with what units gave on average added to them.

    Args:
        gates: with the units as they are.
        leaving: by group, the group, numbers of its units, and evidence with ``weights_out`` and ``mean`` (see
            ``sight.passed_on``, where a unit is read at several positions).

    Raises:
        UserError: something that reads the units has no bias.
    """
    biases: dict[str, Tensor] = {}
    for group, units, evidence in leaving.values():
        shapes = {member.parameter: gates.tensor(member.parameter).shape for member in group.members}
        for member, lost in split(group.of_role("column"), shapes, lost_mean(evidence, marked(units, evidence))[None]):
            owner = gates.model.get_submodule(member.owner)
            name = f"{member.owner}.bias" if member.owner else "bias"
            if getattr(owner, "groups", 1) != 1 or not isinstance(getattr(owner, "bias", None), nn.Parameter):
                raise UserError(f"{member.owner} has no bias that could compensate for units of {group.name}")
            rest = gates.tensor(member.parameter).movedim(member.axis, 0).shape[1:]
            # Each place of a kernel reads the same mean, but at borders; a transposed one reads a stride apart.
            share = lost.view(member.each, rest[0], -1).sum((0, 2)) / math.prod(
                getattr(owner, "stride", (1,)) if getattr(owner, "transposed", False) else (1,)
            )
            biases[name] = biases.get(name, gates.tensor(name).detach().clone()) + share
    return biases


@torch.no_grad()
def compensate(gates: Gates, biases: Mapping[str, Tensor]) -> None:
    """Writes biases, but for entries that are held."""
    for name, values in biases.items():
        gates.write(name, torch.ones(values.shape, dtype=torch.bool), values.to(gates.tensor(name).device))
