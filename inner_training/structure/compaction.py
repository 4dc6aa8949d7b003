"""Physically smaller modules: inactive units are cut out of parameters, buffers and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.attached import ATTACHED
from trimtab.inner_training.networks.conv import Conv2d
from trimtab.inner_training.networks.transformer import TransformerBlock
from trimtab.inner_training.stateless import ties
from trimtab.inner_training.structure import state
from trimtab.inner_training.structure.gating import Gates
from trimtab.inner_training.structure.groups import Group, Member, find_tensor
from trimtab.inner_training.structure.running import call_on, outputs_of, unwrapped, without_trace

TOLERANCE = 1e-5  # of the largest output


@dataclass(frozen=True)
class Cut:
    """What of one tensor stays.

    Attributes:
        shape: of the tensor before.
        kept: int64 positions that stay, by axis.
    """

    shape: torch.Size
    kept: dict[int, Tensor]

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the uncut shape that stays, a copy in memory of its own."""
        for axis, positions in self.kept.items():
            tensor = tensor.index_select(axis, positions.to(tensor.device))
        return tensor.contiguous()


def plan(gates: Gates) -> dict[str, Cut]:
    """What stays of each tensor when the inactive units are cut out; groups that are kept lose none."""
    dead: dict[str, dict[int, Tensor]] = {}
    for group in gates.groups.values():
        units = (~gates.active[group.name]).nonzero()[:, 0]
        for member in () if group.kept or not len(units) else group.members:
            size = gates.tensor(member.parameter).shape[member.axis]
            axes = dead.setdefault(member.parameter, {})
            gone = axes.setdefault(member.axis, torch.zeros(size, dtype=torch.bool))
            gone[member.index[units].flatten()] = True
    return {
        name: Cut(gates.tensor(name).shape, {axis: (~gone).nonzero()[:, 0] for axis, gone in axes.items()})
        for name, axes in dead.items()
    }


def check_whole_model(model: nn.Module) -> None:
    """Refuses modules whose tensors others hold on to.

    Raises:
        UserError: compiled, wrapped for several devices, sharded, or scripted; the message says what to do.
    """
    remedies = {
        "compiled": "compact the module that was given to torch.compile, through gates made on that, and compile again",
        "wrapped": "make the gates on the module inside, compact, and wrap the result again",
    }
    if unwrapped(model) is not model:
        wrapped = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
        kind = "wrapped" if wrapped else "compiled"
        raise UserError(f"the model is {kind} ({type(model).__name__}), so it cannot be compacted; {remedies[kind]}")
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise UserError(
                f"{name or 'the model'} is a torch.jit module, so it cannot be compacted; script it afterwards"
            )
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UserError(
                f"{name} is wrapped ({type(part).__name__}), so it cannot be compacted; {remedies['wrapped']}"
            )
        if getattr(part, "_orig_mod", None) is not None or getattr(part, "_compiled_call_impl", None) is not None:
            raise UserError(f"{name or 'the model'} is compiled, so it cannot be compacted; {remedies['compiled']}")
        if "FSDP" in type(part).__name__ or "FullySharded" in type(part).__name__:
            raise UserError(
                f"{name or 'the model'} is sharded, so it cannot be compacted; gather it into a plain module first"
            )


def check_free(gates: Gates) -> None:
    """Refuses models on whose tensors a controller acts, and those in which inactive units have values.

    Raises:
        UserError: see above; the message says what to do.
    """
    if gates.optimizer in ATTACHED:
        raise UserError(
            "the optimizer has a controller, whose snapshots have the sizes of now; call controller.detach(), then compact, "
            "and attach again"
        )
    gates.check_held()


def check_copies(gates: Gates, cuts: Mapping[str, Cut], copies: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules inside averaged copies, once their tensors are known to have the shapes of the model's.

    Raises:
        MismatchError: one is no copy of the model.
    """
    if not isinstance(copies, list | tuple) or not all(isinstance(copy, nn.Module) for copy in copies):
        raise UserError(
            "copies must be a list or tuple of modules, such as [averaged]; leave it out where there are none"
        )
    inner = [copy.module if isinstance(copy, torch.optim.swa_utils.AveragedModel) else copy for copy in copies]
    for copy in inner:
        tensors = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
        for name in cuts:
            if name not in tensors or tensors[name].shape != gates.tensor(name).shape:
                raise MismatchError(
                    f"{name} of a {type(copy).__name__} does not fit the model; give copies of the model"
                )
    return inner


def compact(gates: Gates, example: Any, copies: Sequence[nn.Module]) -> tuple[dict[str, Group], dict[str, Cut]]:
    """Cuts the inactive units out of a module and its optimizer, in place, and checks that the outputs are the same.

    Parameters become new objects in the same places; the optimizer holds them in the order of the old ones, and their
    state cut like them. If anything fails, module, copies and optimizer are what they were.

    Args:
        gates: the gates, whose groups and masks are not changed here.
        example: the example input to compare outputs on.
        copies: averaged copies of the module, cut likewise.

    Returns:
        The groups of the smaller module, and what was cut.

    Raises:
        UserError: see ``check_whole_model`` and ``state.check_state``; a tensor is tied; the outputs are not the same.
    """
    model = gates.model
    check_whole_model(model)
    cuts = plan(gates)
    tied = ties(model)
    for name in cuts:
        if name in tied or name in tied.values():
            raise UserError(f"{name} is tied to another parameter, so it cannot be compacted; untie them first")
    names = {id(one): name for name, one in model.named_parameters()}
    state.check_state(gates.optimizer, {names.get(id(one), "a parameter"): one for one in state.owned(gates.optimizer)})
    inner = check_copies(gates, cuts, copies)
    undo: list[Callable[[], None]] = []
    with without_trace(model):
        before = outputs_of(call_on(model, example), model)
    try:
        for module in (model, *inner):
            _cut_module(module, gates.optimizer if module is model else None, cuts, undo)
            _narrow(module, gates, undo)
        with without_trace(model):
            after = outputs_of(call_on(model, example), model)
        _compare(before, after)
    except Exception as error:
        for step in reversed(undo):
            step()
        raise UserError(
            f"{type(model).__name__} does not work without its inactive units ({error}); nothing was changed; "
            "its forward may rely on fixed sizes"
        ) from error
    return {name: _smaller(group, gates.active[name], cuts) for name, group in gates.groups.items()}, cuts


def _compare(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            raise MismatchError(f"an output has the shape {tuple(other.shape)} after {tuple(one.shape)}")
        limit = TOLERANCE * max(1.0, float(one.abs().max())) if one.numel() else 0.0
        if one.dtype in (torch.float16, torch.bfloat16):
            limit *= 1000
        if not torch.allclose(one, other, rtol=0, atol=limit, equal_nan=True):
            raise MismatchError(f"an output differs by {float((one - other).abs().max()):.1e}")


def _cut_module(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, cuts: Mapping[str, Cut], undo: list[Callable[[], None]]
) -> None:
    """Cuts the tensors of one module; each step adds its own undoing to ``undo``."""
    owners: dict[str, nn.Module] = {}
    for name, cut in cuts.items():
        path, _, key = name.rpartition(".")
        owner = owners.setdefault(path, module.get_submodule(path))
        old = find_tensor(module, name)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(cut.of(old.detach()), requires_grad=old.requires_grad)
            new.grad = None if old.grad is None else cut.of(old.grad)
            owner._parameters[key] = new
            undo.append(partial(owner._parameters.__setitem__, key, old))
            if optimizer is not None and any(one is old for one in state.owned(optimizer)):
                held = optimizer.state.get(old, {})
                sliced = {
                    entry: cut.of(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for entry, value in held.items()
                }
                state.reseat(optimizer, old, new, sliced)
                undo.append(partial(state.reseat, optimizer, new, old, held))
        else:
            owner._buffers[key] = cut.of(old)
            undo.append(partial(owner._buffers.__setitem__, key, old))
    for owner in dict.fromkeys(
        [*owners.values(), *(part for part in module.modules() if isinstance(part, TransformerBlock))]
    ):
        _resize(owner, sizes_of(owner), undo)


def _narrow(module: nn.Module, gates: Gates, undo: list[Callable[[], None]]) -> None:
    """Adjusts norms that have no tensors, only a number of channels."""
    for group in gates.groups.values():
        gone = 0 if group.kept else int((~gates.active[group.name]).sum())
        for name, each in group.bare if gone else ():
            norm = module.get_submodule(name)
            key = "num_channels" if isinstance(norm, nn.GroupNorm) else "num_features"
            before: int = getattr(norm, key)
            sizes = {key: before - gone * each}
            if isinstance(norm, nn.GroupNorm):
                sizes["num_groups"] = (before - gone * each) * norm.num_groups // before
            _resize(norm, sizes, undo)


def _resize(owner: nn.Module, sizes: Mapping[str, int], undo: list[Callable[[], None]]) -> None:
    for attribute, value in sizes.items():
        before = getattr(owner, attribute)
        if before != value:
            setattr(owner, attribute, value)
            undo.append(partial(setattr, owner, attribute, before))


def sizes_of(module: nn.Module) -> dict[str, int]:
    """The sizes that a stock layer keeps beside its tensors, as its tensors now have them."""
    tensors = {**module._parameters, **module._buffers}
    shapes = {key: tensor.shape for key, tensor in tensors.items() if tensor is not None}
    if isinstance(module, nn.Linear):
        return {"out_features": shapes["weight"][0], "in_features": shapes["weight"][1]}
    if isinstance(module, Conv2d):
        return {"out_channels": shapes["weight"][0], "in_channels": shapes["weight"][1]}
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution_sizes(module, shapes["weight"])
    if isinstance(module, TransformerBlock):
        return {"heads": shapes["gate0"][0], "units": shapes["gate1"][0]}
    if isinstance(module, nn.Embedding):
        return {"embedding_dim": shapes["weight"][1]}
    if not shapes:
        return {}
    size = next(iter(shapes.values()))[0] if next(iter(shapes.values())) else 0
    if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
        return {"num_features": size}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": size, "num_groups": size // (module.num_channels // module.num_groups)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": size}
    return {}


def _convolution_sizes(module: nn.modules.conv._ConvNd, shape: torch.Size) -> dict[str, int]:
    """A grouped convolution loses whole groups, which keep their channels."""
    into, out = module.in_channels // module.groups, module.out_channels // module.groups
    if module.groups == 1:
        out, into = (shape[1], shape[0]) if module.transposed else (shape[0], shape[1])
        return {"out_channels": out, "in_channels": into}
    groups = shape[0] // (into if module.transposed else out)
    return {"out_channels": groups * out, "in_channels": groups * into, "groups": groups}


def _smaller(group: Group, active: Tensor, cuts: Mapping[str, Cut]) -> Group:
    """The group with the positions that its units have after the cut."""
    stays = torch.ones_like(active) if group.kept else active
    members = []
    for member in group.members:
        index = member.index[stays]
        kept = cuts[member.parameter].kept.get(member.axis) if member.parameter in cuts else None
        if kept is not None:
            index = torch.searchsorted(kept, index.contiguous())
        members.append(Member(member.parameter, member.role, member.axis, index))
    return replace(group, units=int(stays.sum()), members=tuple(members))
