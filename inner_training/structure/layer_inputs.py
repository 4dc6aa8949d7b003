"""What rows see and columns feed: norms and moments of inputs, the bypass gradient, and splitting matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from trimtab.inner_training.networks.conv import Conv2d
from trimtab.inner_training.structure.groups import Group, joined
from trimtab.inner_training.structure.reads import by_example
from trimtab.inner_training.structure.splitting import RELU_BETA, split_matrices
from trimtab.inner_training.structure.watching import read_axis

FIELDS = frozenset(("input_norm", "input_cov", "bypass", "next_grad", "split", "pre_grad"))


@dataclass
class Layers:
    """Inputs and outputs of the layers of groups in one forward pass, by the layer's name; outputs in the order of calls."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, model: nn.Module, groups: list[Group]) -> list[Any]:
        """Hooks, to be removed, that note what passes through."""
        owners = {member.owner for group in groups for member in group.members if member.role != "statistic"}
        return [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in sorted(owners)]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
                return None
            output = output if output.requires_grad else output.detach().requires_grad_()
            self.inputs[name], self.outputs[name] = inputs[0], output
            return output.clone()  # an activation in place would overwrite it

        return hook


def unit_values(model: nn.Module, group: Group, layers: Layers) -> tuple[str, int, Tensor] | None:
    """Where the values of units from before their activation function are: layer, axis, and (units, k) positions.

    That is the output of the last layer or norm which has something of the units' own.
    """
    own = {member.owner: member for member in group.members if member.role in ("row", "vector")}
    found = next((name for name in reversed(layers.outputs) if name in own), None)
    if found is None:
        return None
    axis = read_axis(model.get_submodule(found))
    if axis is None:
        axis = 1 - layers.outputs[found].ndim  # a norm
    return (found, axis, own[found].index) if layers.outputs[found].shape[axis] > own[found].last else None


def _patches(module: nn.Module, values: Tensor, examples: int) -> Tensor | None:
    """(B, I, S) what each row of a linear layer, or of a convolution of one group, is multiplied with at each place."""
    if isinstance(module, nn.Linear):
        return by_example(values.detach().float(), -1, examples)
    if (
        not isinstance(module, nn.Conv2d | Conv2d)
        or getattr(module, "groups", 1) != 1
        or isinstance(module.padding, str)
    ):
        return None
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return None
    shape = {"padding": module.padding, "stride": module.stride, "dilation": getattr(module, "dilation", 1)}
    return functional.unfold(values.detach().float(), module.kernel_size, **shape)


def input_fields(model: nn.Module, group: Group, layers: Layers, examples: int) -> dict[str, Tensor]:
    """``input_norm``, and ``input_cov`` where units have one row each; empty where the inputs were not seen.

    A convolution's input has one norm per channel, for all places of the kernel; of grouped ones it is the mean norm over
    the groups. A bias among several is the weight of an input of one.
    """
    norms = []
    for member in group.incoming:
        module, values = model.get_submodule(member.owner), layers.inputs.get(member.owner)
        weight = module._parameters.get("weight")
        if member.role == "vector":
            norms.append(torch.ones(member.each, device=model.get_parameter(member.parameter).device))
            continue
        axis = read_axis(module)
        if values is None or weight is None or axis is None:
            return {}
        scale = values.detach().float().movedim(axis, 0).flatten(1).square().mean(1).sqrt()
        inputs = 0 if getattr(module, "transposed", False) else 1
        if weight.shape[inputs] != len(scale):
            scale = scale.view(-1, weight.shape[inputs]).square().mean(0).sqrt()
        shape = [-1 if place == inputs else 1 for place in range(weight.ndim)]
        norms.append(member.of(scale.view(shape).expand(weight.shape)).square().mean(0).sqrt())
    fields = {"input_norm": torch.cat(norms)}
    if len(group.incoming) == 1 and group.incoming[0].each == 1:
        owner = group.incoming[0].owner
        seen = _patches(model.get_submodule(owner), layers.inputs[owner], examples)
        if seen is not None:
            fields["input_cov"] = torch.einsum("bis,bjs->ij", seen, seen) / (seen.shape[0] * seen.shape[2])
    return fields


def growth_fields(
    model: nn.Module, group: Group, layers: Layers, slopes: Mapping[int, Tensor], examples: int
) -> dict[str, Tensor]:
    """``bypass`` and ``next_grad``, where one layer computes the units, and one reads them at the same places.

    Args:
        model: the module.
        group: of units with one row each.
        layers: what was seen.
        slopes: gradient of the mean loss by the id of a layer's output.
        examples: of the batch.
    """
    rows, columns = group.of_role("row"), group.of_role("column")
    if len(rows) != 1 or len(columns) != 1 or rows[0].each != 1 or group.incoming != rows:
        return {}
    producer, consumer = (model.get_submodule(one.owner) for one in (rows[0], columns[0]))
    if rows[0].owner not in layers.inputs or columns[0].owner not in layers.outputs:
        return {}
    seen, slope = (
        _patches(producer, layers.inputs[rows[0].owner], examples),
        slopes.get(id(layers.outputs[columns[0].owner])),
    )
    if seen is None or slope is None:
        return {}
    slope = slope.detach().float()
    if isinstance(consumer, nn.Linear):
        delta = by_example(slope, -1, examples)
        if columns[0].each == 1 and seen.shape[::2] == delta.shape[::2]:
            return {"bypass": torch.einsum("bos,bis->oi", delta, seen), "next_grad": delta.sum((0, 2))}
        if delta.shape[2] == 1 and seen.shape[2] == columns[0].each:
            bypass = torch.einsum("bo,bip->poi", delta[..., 0], seen)
            return {"bypass": bypass.flatten(0, 1), "next_grad": delta.sum((0, 2)).repeat(columns[0].each)}
    elif isinstance(consumer, nn.Conv2d | Conv2d) and getattr(consumer, "groups", 1) == 1 and columns[0].each == 1:
        places = layers.inputs[columns[0].owner].shape[2:]
        if seen.shape[2] != places.numel() or isinstance(consumer.padding, str):
            return {}
        weight = consumer.get_parameter("weight")
        size, dilation = (weight.shape[0], seen.shape[1], *weight.shape[2:]), getattr(consumer, "dilation", 1)
        gradient = conv2d_weight(  # type: ignore[no-untyped-call]
            seen.view(*seen.shape[:2], *places), size, slope, consumer.stride, consumer.padding, dilation
        )
        constant = slope.sum((0, 2, 3))[:, None].expand(-1, weight[0, 0].numel())
        return {"bypass": gradient.movedim(1, -1).flatten(0, -2), "next_grad": constant.flatten()}
    return {}


def split_field(
    model: nn.Module, group: Group, layers: Layers, reading: tuple[Tensor, Tensor, Tensor], examples: int
) -> dict[str, Tensor]:
    """``split``, where an activation function is all that lies between the one layer that computes units and what is read.

    Args:
        model, group, layers, examples: see ``growth_fields``.
        reading: what was read, with its graph, as (B, U, S); and h and g of the same shape.
    """
    rows = group.of_role("row")
    place = unit_values(model, group, layers)
    if len(rows) != 1 or rows[0].each != 1 or group.incoming != rows or place is None or place[0] != rows[0].owner:
        return {}
    values, module = layers.outputs[rows[0].owner], model.get_submodule(rows[0].owner)
    seen, axis = _patches(module, layers.inputs[rows[0].owner], examples), read_axis(module)
    (graph, h, g), before = reading, by_example(values.detach().float(), axis or -1, examples)
    if seen is None or h.shape != before.shape or seen.shape[::2] != h.shape[::2]:
        return {}
    if torch.equal(h, before.relu()):
        open_ = (RELU_BETA * before).sigmoid()
        bends = RELU_BETA * open_ * (1 - open_)
    else:
        (slope,) = torch.autograd.grad(graph.sum(), values, create_graph=True, allow_unused=True)
        if slope is None:
            return {}
        (bend,) = torch.autograd.grad(slope.sum(), values, allow_unused=True) if slope.requires_grad else (None,)
        bends = torch.zeros_like(h) if bend is None else by_example(bend.float(), axis or -1, examples)
    return {"split": split_matrices(g, bends, seen)}


def incoming_like(group: Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What has the shapes of parameters, as that of rows, biases and columns: under the names ``in``, ``bias``, ``out``."""
    found = {
        "in": joined(group.incoming, values.__getitem__),
        "out": joined(group.of_role("column"), values.__getitem__),
    }
    return found if group.bias is None else {**found, "bias": group.bias.of(values[group.bias.parameter]).float()[:, 0]}
