"""Groups of units of a user's own module: found by tracing, completed by what is known, and checked on the module."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from trimtab.errors import UserError
from trimtab.inner_training.stateless import ties
from trimtab.inner_training.structure.coupling import coupled_groups
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.known import known_groups, known_parts
from trimtab.inner_training.structure.probing import Probe
from trimtab.inner_training.structure.running import call_on, outputs_of, without_trace


def check_module(model: object) -> nn.Module:
    """Refuses what units cannot be followed in.

    Raises:
        UserError: no module, a ``torch.jit`` module, one with lazy, sharded or valueless parameters.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is a {type(model).__name__}; it must be a torch.nn.Module")
    if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
        raise UserError(
            "the model is a torch.jit module, whose layers cannot be edited; give the module it was made from"
        )
    for name, one in model.named_parameters():
        if isinstance(one, UninitializedParameter):
            raise UserError(f"{name} is lazy and has no shape yet; run a batch through the model first")
        if one.is_meta:
            raise UserError(
                f"{name} is on the device meta and has no values; give it some with model.to_empty(device='cpu')"
            )
        if type(one).__name__ == "DTensor" or type(one.data).__name__ == "DTensor":
            raise UserError(f"{name} is sharded over devices; make the gates on a model that is not sharded")
    if any("FullyShardedDataParallel" in type(part).__name__ for part in model.modules()):
        raise UserError("the model is sharded by FSDP, which flattens its parameters; make the gates on a plain module")
    return model


def discover(model: nn.Module, example: Any) -> tuple[list[Group], dict[str, str]]:
    """Groups of a module, and why other units are not offered.

    Coupled layers come from Torch-Pruning's dependency graph (Fang et al., *DepGraph*, arXiv 2301.12900), attention heads
    and the units of our own networks from what is known of them. Each group is then probed (see ``Probe``): a group whose
    units turn out to be read, fed or mixed elsewhere is refused, so that gating and compaction agree.

    Args:
        model: the module, unwrapped.
        example: an input: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        The groups in the order of the layers, and a reason by name of each group that is not offered.

    Raises:
        MissingExtraError: Torch-Pruning is not installed.
        UserError: the module does not run on the example.
    """
    with without_trace(model):
        call = call_on(model, example)
        calls = _count_calls(model, call)
        parts = known_parts(model)
        found, refused = coupled_groups(model, call, parts)
        groups = [*known_groups(model), *(group for group in found if not _speaks_of(group, parts))]
        refused = {name: why for name, why in refused.items() if name not in parts}
        reasons = {group.name: why for group in groups if (why := _shared(group, model, calls)) is not None}
        groups = [group for group in groups if group.name not in reasons]
        reasons |= Probe(model, example).failing(groups)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    groups = [group for group in groups if group.name not in reasons]
    groups.sort(key=lambda group: order.get(group.name, order.get(group.members[0].owner, 0)))
    return groups, {**refused, **reasons}


def _speaks_of(group: Group, parts: set[str]) -> bool:
    return any(member.owner in parts for member in group.members)


def _count_calls(model: nn.Module, call: Any) -> Counter[str]:
    """How often each module with parameters of its own is called in one forward pass."""
    calls: Counter[str] = Counter()
    handles = []
    for name, part in model.named_modules():
        if part._parameters:
            handles.append(part.register_forward_hook(lambda *_, name=name: calls.update([name])))
    try:
        outputs_of(call, model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _shared(group: Group, model: nn.Module, calls: Counter[str]) -> str | None:
    """Why a group cannot move because of parameters that are used twice, or None."""
    shared = ties(model)
    tied = {**shared, **{first: further for further, first in shared.items()}}
    for member in group.members:
        if member.parameter in tied:
            return f"{member.parameter} is tied to {tied[member.parameter]}"
        if getattr(model.get_submodule(member.owner), "sparse", False):
            return f"{member.owner} has sparse gradients"
        if calls[member.owner] > 1:
            return f"{member.owner or 'the model'} is called {calls[member.owner]} times in a forward pass"
    return None
