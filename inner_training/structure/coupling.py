"""Which channels of which layers are coupled: Torch-Pruning's dependency graph, joined into groups of equal units."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError, require_extra
from trimtab.inner_training.structure.groups import Group, Member, Role

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
PRODUCERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)
Pair = tuple[int, int]  # a position in a node, and the channel that it came from
Item = tuple[Any, Any, set[Pair]]  # a node of the graph, what would prune it, and its pairs
Node = tuple[str, str]  # name of a module or raw parameter; "in", "out", or "both" where they are the same


@dataclass
class Slots:
    """Channels of all nodes, and which of them are coupled (a union-find)."""

    first: dict[Node, int] = field(default_factory=dict)
    sizes: dict[Node, int] = field(default_factory=dict)
    parents: list[int] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # slot -> why its units cannot be offered
    reached: set[Node] = field(default_factory=set)

    def at(self, node: Node, size: int) -> int:
        """Number of the first slot of a node."""
        if node not in self.first:
            self.first[node], self.sizes[node] = len(self.parents), size
            self.parents.extend(range(len(self.parents), len(self.parents) + size))
        return self.first[node]

    def root(self, slot: int) -> int:
        """The slot that stands for all those coupled with one."""
        while self.parents[slot] != slot:
            self.parents[slot] = self.parents[self.parents[slot]]
            slot = self.parents[slot]
        return slot

    def couple(self, one: int, other: int) -> None:
        """Makes two slots move together."""
        self.parents[self.root(other)] = self.root(one)

    def refuse(self, slot: int, reason: str) -> None:
        """Notes why the units of a slot cannot be offered; the first reason stays."""
        self.reasons.setdefault(slot, reason)


@contextmanager
def all_trainable(model: nn.Module) -> Iterator[None]:
    """Inside, every float parameter requires a gradient, since tracing follows gradients."""
    frozen = [one for one in model.parameters() if not one.requires_grad and one.is_floating_point()]
    for one in frozen:
        one.requires_grad_(True)
    try:
        yield
    finally:
        for one in frozen:
            one.requires_grad_(False)


def coupled_groups(model: nn.Module, call: Callable[[], Any], skipped: set[str]) -> tuple[list[Group], dict[str, str]]:
    """Groups of a module's units, and why others are not offered, as Torch-Pruning's dependency graph has them.

    Args:
        model: the module, in evaluation mode.
        call: runs the module on an example and gives its outputs.
        skipped: names of modules whose units need not be followed.

    Raises:
        MissingExtraError: Torch-Pruning is not installed.
        UserError: the module cannot be traced.
    """
    pruning = require_extra("torch_pruning", "structure")
    graph = pruning.DependencyGraph()
    try:
        with all_trainable(model), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph.build_dependency(model, (), forward_fn=lambda *_: call(), verbose=False)
            slots = _couple(model, graph, pruning, skipped)
    except Exception as error:
        raise UserError(
            f"the layers of {type(model).__name__} could not be traced ({type(error).__name__}: {error}); "
            "check that it runs on the example input and gives tensors"
        ) from error
    return _as_groups(model, slots)


def _couple(model: nn.Module, graph: Any, pruning: Any, skipped: set[str]) -> Slots:
    slots, names = Slots(), {id(part): name for name, part in model.named_modules()}
    names |= {id(parameter): name for name, parameter in model.named_parameters()}
    limit = 4 * max([1, *(max(one.shape) for one in model.parameters() if one.ndim)])
    for module in list(graph.module2node):
        name = names.get(id(module))
        if name is None or name in skipped or not isinstance(module, PRODUCERS) or is_depthwise(module):
            continue
        if (name, "out") in slots.reached:
            continue
        pruner = graph.get_pruner_of_module(module)
        size = pruner.get_out_channels(module)
        start = slots.at((name, "both" if isinstance(module, nn.Embedding) else "out"), size)
        items = _followed(graph, pruning, module, pruner.prune_out_channels, limit)
        if items is None:
            slots.refuse(start, "its units could not be followed through the layers behind it")
            for unit in range(1, size):
                slots.couple(start, start + unit)
            continue
        for node, handler, pairs in items:
            _add_item(slots, graph, pruning, names, node, handler, pairs, start)
        if all({unit for _, unit in pairs} == set(range(size)) for _, _, pairs in items):
            slots.reached |= {
                (names[id(node.module)], "out")
                for node, handler, pairs in items
                if id(node.module) in names
                and graph.is_out_channel_pruning_fn(handler)
                and len({at for at, _ in pairs}) == graph.get_out_channels(node)
            }
    _couple_inside(model, slots)
    return slots


def _followed(graph: Any, pruning: Any, module: nn.Module, handler: Any, limit: int) -> list[Item] | None:
    """Where the output channels of a module lead to in the dependency graph: nodes, with (position, channel) pairs.

    Torch-Pruning's own walk does not end where index maps of attention multiply positions in a circle; this one visits
    no pair twice, and gives up, with None, at a node with more pairs than ``limit``, or where its maps fail.
    """
    start, root = graph.module2node[module], range(graph.get_out_channels(module))
    make = pruning._helpers._HybridIndex
    seen: dict[tuple[int, Any], Item] = {(id(start), handler): (start, handler, {(unit, unit) for unit in root})}
    waiting = [(start, handler, [make(idx=unit, root_idx=unit) for unit in root])]
    while waiting:
        node, trigger, new = waiting.pop()
        for edge in node.dependencies:
            if not edge.is_triggered_by(trigger):
                continue
            moved = new
            try:
                for mapping in edge.index_mapping:
                    moved = moved if mapping is None else mapping(moved)
            except IndexError:  # a split whose parts are not known, as inside of a GRU
                return None
            _, _, pairs = seen.setdefault((id(edge.target), edge.handler), (edge.target, edge.handler, set()))
            fresh = [index for index in moved if (index.idx, index.root_idx) not in pairs]
            if not fresh:
                continue
            pairs.update((index.idx, index.root_idx) for index in fresh)
            if len(pairs) > limit:
                return None
            waiting.append((edge.target, edge.handler, fresh))
    return list(seen.values())


def _add_item(
    slots: Slots, graph: Any, pruning: Any, names: dict[int, str], at: Any, handler: Any, pairs: set[Pair], start: int
) -> None:
    """Couples one node's channels with those of the module that they were followed from."""
    target = at.module
    if isinstance(target, pruning.ops._OutputOp):
        for _, unit in pairs:
            slots.refuse(start + unit, "its units are outputs of the model")
        return
    if id(target) not in names:
        return  # an operation, not a module
    name, outwards = names[id(target)], graph.is_out_channel_pruning_fn(handler)
    if isinstance(target, nn.LayerNorm | nn.MultiheadAttention | nn.LSTM):
        kind = "normalises over" if isinstance(target, nn.LayerNorm) else "mixes"
        for _, unit in pairs:
            slots.refuse(start + unit, f"{type(target).__name__} {name} {kind} its units")
        return
    if isinstance(target, nn.Parameter):
        size = target.shape[at.pruning_dim]
        node = (name, f"both{at.pruning_dim}")
    elif isinstance(target, nn.Linear | nn.modules.conv._ConvNd):
        node = (name, "in" if is_depthwise(target) or not outwards else "out")
        pruner = graph.get_pruner_of_module(target)
        size = pruner.get_out_channels(target) if node[1] == "out" else pruner.get_in_channels(target)
    else:
        node, size = (name, "both"), graph.get_pruner_of_module(target).get_out_channels(target)
    if size is None:
        return  # a PReLU with one slope for all
    first = slots.at(node, size)
    for position, unit in sorted(pairs):
        if not 0 <= position < size:
            slots.refuse(start + unit, f"its units could not be followed into {name}")
        else:
            slots.couple(start + unit, first + position)


def is_depthwise(module: nn.Module) -> bool:
    """Whether a module is a convolution in which each output channel has a group of its own."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.out_channels > 1


def _couple_inside(model: nn.Module, slots: Slots) -> None:
    """Couples the channels of each group of a grouped convolution, in and out, and of each group that a GroupNorm has."""
    for name, part in model.named_modules():
        if isinstance(part, nn.modules.conv._ConvNd) and part.groups > 1 and (name, "in") in slots.first:
            ins, outs = slots.at((name, "in"), part.in_channels), slots.at((name, "out"), part.out_channels)
            for group in range(part.groups):
                lead = ins + group * (part.in_channels // part.groups)
                for start, size in ((ins, part.in_channels), (outs, part.out_channels)):
                    each = size // part.groups
                    for slot in range(start + group * each, start + (group + 1) * each):
                        slots.couple(lead, slot)
        elif isinstance(part, nn.GroupNorm) and (name, "both") in slots.first:
            start, each = slots.first[name, "both"], part.num_channels // part.num_groups
            for slot in range(part.num_channels):
                slots.couple(start + slot // each * each, start + slot)


def _as_groups(model: nn.Module, slots: Slots) -> tuple[list[Group], dict[str, str]]:
    """Units whose slots lie in the same nodes, as many in each, form one group."""
    units: dict[int, dict[Node, list[int]]] = defaultdict(lambda: defaultdict(list))
    for node, first in slots.first.items():
        for position in range(slots.sizes[node]):
            units[slots.root(first + position)][node].append(position)
    reasons = {slots.root(slot): reason for slot, reason in slots.reasons.items()}
    alike: dict[tuple[tuple[Node, int], ...], list[int]] = defaultdict(list)
    for root, places in units.items():
        alike[tuple(sorted((node, len(found)) for node, found in places.items()))].append(root)
    order = {name: position for position, (name, _) in enumerate((*model.named_modules(), *model.named_parameters()))}
    groups: list[Group] = []
    refused: dict[str, str] = {}
    for kind, roots in sorted(alike.items(), key=lambda pair: min(order[node[0]] for node, _ in pair[0])):
        nodes = sorted((node for node, _ in kind), key=lambda node: (order[node[0]], node[1]))
        producers = [node for node in nodes if node[1] == "out" or isinstance(_part(model, node[0]), nn.Embedding)]
        if not producers:
            continue
        name = _free_name(producers[0][0], [*(group.name for group in groups), *refused])
        reason = next((reasons[root] for root in roots if root in reasons), None)
        if reason is None and any(
            side == "out" and (name, "in") not in nodes and _grouped(model, name) for name, side in nodes
        ):
            reason = "a grouped convolution reads the model's input"
        if reason is None and len(roots) < 2:
            reason = "it has a single unit"
        roots.sort(key=lambda root: units[root][producers[0]])
        members = [
            member
            for node in nodes
            for member in members_of(model, node[0], node[1], torch.tensor([units[root][node] for root in roots]))
        ]
        if reason is None and not any(member.role == "column" for member in members):
            reason = "nothing but the model's outputs reads its units"
        if reason is None:
            owners = {member.owner for member in members}
            bare = tuple((node[0], size) for node, size in kind if node[1] == "both" and node[0] not in owners)
            groups.append(Group(name, len(roots), tuple(members), bare=bare))
        else:
            refused[name] = reason
    return groups, refused


def _grouped(model: nn.Module, name: str) -> bool:
    part = _part(model, name)
    return isinstance(part, nn.modules.conv._ConvNd) and part.groups > 1


def _free_name(name: str, taken: list[str]) -> str:
    """The name, or with a number behind it where one layer has several kinds of units."""
    numbered = [name, *(f"{name}.{number}" for number in range(2, len(taken) + 3))]
    return next(one for one in numbered if one not in taken)


def _part(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


def members_of(model: nn.Module, name: str, side: str, index: Tensor) -> list[Member]:
    """What of a module's tensors belongs to units that have the positions ``index`` (units, k) on one side of it."""
    prefix, part = (f"{name}." if name else ""), _part(model, name)
    found: list[tuple[str, Role, int]] = []
    if not isinstance(part, nn.Module):  # a parameter that is used as it is
        return [Member(name, "vector", int(side.removeprefix("both")) % model.get_parameter(name).ndim, index)]
    if isinstance(part, nn.modules.conv._ConvNd):
        if part.groups > 1:  # what it reads goes with what it computes
            if part.transposed and side == "in" or not part.transposed and side == "out":
                found = [("weight", "row", 0)]
        elif side == "out":
            found = [("weight", "row", 1 if part.transposed else 0)]
        else:
            found = [("weight", "column", 0 if part.transposed else 1)]
        found += [("bias", "vector", 0)] if side == "out" else []
    elif isinstance(part, nn.Linear):
        found = [("weight", "row", 0), ("bias", "vector", 0)] if side == "out" else [("weight", "column", 1)]
    elif isinstance(part, nn.Embedding):
        found = [("weight", "row", 1)]
    else:
        found = [(key, "vector", 0) for key in ("weight", "bias")]
        found += [(key, "statistic", 0) for key in ("running_mean", "running_var")]
    tensors = {**part._parameters, **part._buffers}
    return [Member(prefix + key, role, axis, index) for key, role, axis in found if tensors.get(key) is not None]
