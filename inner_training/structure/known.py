"""Units of modules whose inner workings are known: attention heads of torch's attention, and our own networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trimtab.inner_training.networks.convnets import ConvNet, ResidualNet
from trimtab.inner_training.networks.graph import GraphConvolution
from trimtab.inner_training.networks.mlp import MLP
from trimtab.inner_training.networks.plastic_mlp import PlasticMLP
from trimtab.inner_training.networks.transformer import TransformerBlock
from trimtab.inner_training.structure.groups import Group, Member, Role, find_tensor

OWN = (TransformerBlock, MLP, PlasticMLP, ConvNet, ResidualNet, GraphConvolution)


def known_groups(model: nn.Module) -> list[Group]:
    """The groups of all modules in a module whose units need no tracing."""
    found: list[Group] = []
    for name, part in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, nn.MultiheadAttention):
            found.append(_attention(part, prefix))
        elif isinstance(part, TransformerBlock):
            found += _block(part, prefix)
        elif isinstance(part, MLP):
            found += _perceptron(part, prefix)
        elif isinstance(part, PlasticMLP):
            found += _plastic(part, prefix)
        elif isinstance(part, ConvNet):
            found += _convolutions(part, prefix)
        elif isinstance(part, ResidualNet):
            found += _residual(part, prefix)
        elif isinstance(part, GraphConvolution):
            found.append(_graph(part, prefix))
    return [group for group in found if group.units > 1]


def known_parts(model: nn.Module) -> set[str]:
    """Names of the modules whose tensors ``known_groups`` speaks for, as far as they compute or read units."""
    parts: set[str] = set()
    for name, part in model.named_modules():
        if isinstance(part, OWN):
            parts |= {f"{name}.{inner}" if name else inner for inner, _ in part.named_modules() if inner}
    return parts


def given_gates(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Bool (units,) by group: which units of our own networks the networks' own gates leave active."""
    masks = {}
    for group in groups:
        for member in group.of_role("statistic"):
            if member.parameter.rpartition(".")[2].startswith("gate"):
                masks[group.name] = (member.of(find_tensor(model, member.parameter)) != 0).any(1).cpu()
    return masks


Entry = tuple[Role, str, int]


def _rows(owner: str, bias: bool = True) -> list[Entry]:
    rows: list[Entry] = [("row", f"{owner}.weight", 0)]
    return [*rows, ("vector", f"{owner}.bias", 0)] if bias else rows


def _gate(name: str) -> list[Entry]:
    return [("statistic", name, 0)]


def _norm(owner: str) -> list[Entry]:
    return [("vector", f"{owner}.weight", 0), ("vector", f"{owner}.bias", 0)]


def _group(name: str, units: int, entries: list[Entry], each: int = 1) -> Group:
    """A group of which unit u has the positions [u * each, (u + 1) * each) everywhere."""
    index = torch.arange(units * each).view(units, each)
    return Group(name, units, tuple(Member(entry, role, axis, index) for role, entry, axis in entries))


def _with(group: Group, entry: Entry, index: Tensor | None = None) -> Group:
    role, name, axis = entry
    member = Member(name, role, axis, group.members[0].index if index is None else index)
    return Group(group.name, group.units, (*group.members, member))


def head_rows(heads: int, width: int, parts: int) -> Tensor:
    """(heads, parts * width) positions of each head in a projection that holds ``parts`` blocks of all heads."""
    inside = torch.arange(heads * width).view(heads, width)
    return torch.cat([inside + part * heads * width for part in range(parts)], 1)


def _attention(part: nn.MultiheadAttention, prefix: str) -> Group:
    heads, width = part.num_heads, part.head_dim
    one, three = head_rows(heads, width, 1), head_rows(heads, width, 3)
    members = [Member(f"{prefix}in_proj_weight", "row", 0, three)]
    if part.in_proj_weight is None:
        members = [Member(f"{prefix}{key}_proj_weight", "row", 0, one) for key in "qkv"]
    if part.in_proj_bias is not None:
        members.append(Member(f"{prefix}in_proj_bias", "vector", 0, three))
    if part.bias_k is not None:
        members += [Member(f"{prefix}bias_{key}", "vector", 2, one) for key in "kv"]
    members.append(Member(f"{prefix}out_proj.weight", "column", 1, one))
    return Group(f"{prefix}heads", heads, tuple(members), kept=True)


def _block(part: TransformerBlock, prefix: str) -> list[Group]:
    rows, inner = head_rows(part.heads, part.head_width, 3), head_rows(part.heads, part.head_width, 1)
    heads = (
        Member(f"{prefix}attend.weight", "row", 0, rows),
        Member(f"{prefix}attend.bias", "vector", 0, rows),
        Member(f"{prefix}project.weight", "column", 1, inner),
        Member(f"{prefix}gate0", "statistic", 0, torch.arange(part.heads)[:, None]),
    )
    units = _group(f"{prefix}up", part.units, [*_rows(f"{prefix}up"), *_gate(f"{prefix}gate1")])
    return [Group(f"{prefix}heads", part.heads, heads), _with(units, ("column", f"{prefix}down.weight", 1))]


def _perceptron(part: MLP, prefix: str) -> list[Group]:
    found = []
    for index in range(part.depth):
        own = f"{prefix}layers.{index}"
        group = _group(own, part.hidden, [*_rows(own), *_gate(f"{prefix}gate{index}")])
        found.append(_with(group, ("column", f"{prefix}layers.{index + 1}.weight", 1)))
    return found


def _plastic(part: PlasticMLP, prefix: str) -> list[Group]:
    """Each unit is read at several positions where its activation function has several outputs."""
    read = torch.arange(part.hidden).view(-1, part.units).mT
    found = []
    for index in range(part.depth):
        own = f"{prefix}layers.{index}"
        norm = _norm(f"{prefix}norms.{index}") if part.norm else []
        group = _group(own, part.units, [*_rows(own), *norm, *_gate(f"{prefix}gate{index}")])
        found.append(_with(group, ("column", f"{prefix}layers.{index + 1}.weight", 1), read))
    return found


def _convolutions(part: ConvNet, prefix: str) -> list[Group]:
    found = []
    for index, layer in enumerate(part.layers):
        own = f"{prefix}layers.{index}"
        channels = int(layer.out_channels)  # type: ignore[arg-type]
        group = _group(own, channels, [*_rows(own), *_gate(f"{prefix}gate{index}")])
        if index + 1 < len(part.layers):
            found.append(_with(group, ("column", f"{prefix}layers.{index + 1}.weight", 1)))
        else:
            flat = torch.arange(part.head.in_features).view(channels, -1)
            found.append(_with(group, ("column", f"{prefix}head.weight", 1), flat))
    return found


def _residual(part: ResidualNet, prefix: str) -> list[Group]:
    """Units are whole normalisation groups, of the stream and inside each block."""
    each = part.norm.group
    units = part.channels // each
    stream = [*_rows(f"{prefix}stem"), *_norm(f"{prefix}norm"), *_gate(f"{prefix}gate0")]
    stream.append(("column", f"{prefix}head.weight", 1))
    found = []
    for index in range(len(part.blocks)):
        own = f"{prefix}blocks.{index}"
        stream += [*_rows(f"{own}.second"), *_norm(f"{own}.first_norm"), ("column", f"{own}.first.weight", 1)]
        inside = [*_rows(f"{own}.first"), *_norm(f"{own}.second_norm"), *_gate(f"{prefix}gate{index + 1}")]
        found.append(_group(f"{own}.first", units, [*inside, ("column", f"{own}.second.weight", 1)], each))
    return [_group(f"{prefix}stem", units, stream, each), *found]


def _graph(part: GraphConvolution, prefix: str) -> Group:
    own = f"{prefix}first"
    entries = [*_rows(own), *_gate(f"{prefix}gate0"), ("column", f"{prefix}second.weight", 1)]
    return _group(own, part.hidden, entries)
