"""Which units of a family's module populations can edit: those that stay at zero once they are there."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.func import grad

from trimtab.inner_training.feeding import first_examples
from trimtab.inner_training.networks import seeded_rng
from trimtab.inner_training.stateless import stateless, ties
from trimtab.inner_training.structure.discovery import discover
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.known import known_groups
from trimtab.inner_training.structure.running import without_trace
from trimtab.inner_training.task import TaskFamily

EXAMPLES = 8
SEED = 20260515


def stacked_groups(family: TaskFamily, groups: Iterable[Group] | None = None) -> tuple[list[Group], dict[str, str]]:
    """The groups of a family's module that populations can edit, and by name why others are not offered.

    Groups of our own networks are known; those of other modules are discovered (see ``discovery.discover``), for which
    Torch-Pruning must be installed. Each is tried on a few examples: half of its units are put to zero, and their
    gradients must be exactly zero, as they are where the activation function is 0 at 0 and nothing else feeds them.

    Args:
        family: of the population.
        groups: to choose from; None for those that are known or discovered.
    """
    x, y = first_examples(family, EXAMPLES)
    refused: dict[str, str] = {}
    if groups is None:
        groups = known_groups(family.module)
        if not groups:
            device = next(family.module.parameters()).device
            groups, refused = discover(family.module, x.to(device))
    offered = []
    shared = {*ties(family.module), *ties(family.module).values()}
    for group in groups:
        tied = [member.parameter for member in group.members if member.parameter in shared]
        reason = f"{tied[0]} is tied to another parameter" if tied else _moving(family, group, x, y)
        if reason is None:
            offered.append(group)
        else:
            refused[group.name] = reason
    return offered, refused


def _moving(family: TaskFamily, group: Group, x: Tensor, y: Tensor) -> str | None:
    """What of units at zero would not stay there, or None."""
    module, call = family.module, stateless(family.module)
    device = next(module.parameters()).device
    chosen = torch.arange(0, group.units, 2)
    parameters = {name: one.detach().clone() for name, one in module.named_parameters()}
    draws = torch.Generator().manual_seed(SEED)
    masks: dict[str, Tensor] = {}
    for value in parameters.values():
        value += 0.1 * torch.randn(value.shape, generator=draws).to(device)
    for member in group.members:
        if member.parameter in parameters:
            mask = member.mask(parameters[member.parameter].shape, chosen)
            masks[member.parameter] = masks.get(member.parameter, torch.zeros_like(mask)) | mask
    for name, mask in masks.items():
        parameters[name] = parameters[name].masked_fill(mask.to(device), 0.0)
    buffers = dict(module.named_buffers())
    with without_trace(module), seeded_rng(SEED):
        slopes = grad(lambda held: family.loss(call(held, buffers, x.to(device)), y.to(device)).mean())(parameters)
    for name, mask in masks.items():
        if bool((slopes[name][mask.to(device)] != 0).any()):
            return f"the gradient of {name} is not zero for units at zero, so they would not stay inactive"
    return None
