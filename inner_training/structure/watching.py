"""What columns read: the activations of units at the moment that a layer takes them in, seen and gated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trimtab.inner_training.networks.graph import GraphConvolution
from trimtab.inner_training.structure.groups import Group, Member
from trimtab.inner_training.structure.known import OWN

# Gets the group, its column, what is read, and the axis along which the column's positions lie; gives what to read instead.
Handler = Callable[[Group, Member, Tensor, int], Tensor]

_PLACES = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}


def read_axis(module: nn.Module) -> int | None:
    """Axis of the units in the input of a layer that is called by itself; None for layers of other kinds."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return -1
    places = next((size for kind, size in _PLACES.items() if isinstance(module, kind)), None)
    if places is None and hasattr(module, "kernel_size") and getattr(module.weight, "ndim", 0) == 4:
        places = 2  # our own convolution
    return None if places is None else -1 - places


def _attention(model: nn.Module, member: Member) -> nn.Module | None:
    """The attention whose projection a column belongs to: torch calls no module for that."""
    parent, _, last = member.owner.rpartition(".")
    found = model.get_submodule(parent)
    return found if isinstance(found, nn.MultiheadAttention) and last == "out_proj" else None


def _multiplied(model: nn.Module, member: Member) -> bool:
    """Whether a column is of the last layer of one of our networks, which multiply its weight themselves."""
    path = member.owner.split(".")
    parents = [model.get_submodule(".".join(path[:size])) for size in range(len(path))]
    own = next((parent for parent in parents if isinstance(parent, OWN)), None)
    last = {
        "head": True,
        "layers": path[-1] == str(getattr(own, "depth", None)),
        "second": isinstance(own, GraphConvolution),
    }
    return own is not None and (last.get(path[-1], False) or (len(path) > 1 and last.get(path[-2], False)))


def examples_apart(model: nn.Module, member: Member) -> bool:
    """Whether what a column reads tells examples apart: nodes of one graph do not, as every example reads all of them."""
    return not isinstance(model.get_submodule(member.owner.rpartition(".")[0]), GraphConvolution)


def watchable(model: nn.Module, group: Group) -> bool:
    """Whether everything that reads a group's units can be seen."""
    columns = group.of_role("column")
    return all(
        _attention(model, column) is not None
        or _multiplied(model, column)
        or read_axis(model.get_submodule(column.owner)) is not None
        for column in columns
    )


@contextmanager
def watching(model: nn.Module, groups: Iterable[Group], handler: Handler) -> Iterator[None]:
    """Inside, everything that columns of the groups read passes through ``handler``, as far as it can be seen."""
    linear: list[tuple[nn.Module, Group, Member]] = []
    multiplied: list[tuple[nn.Module, Group, Member]] = []
    with ExitStack() as stack:
        for group in groups:
            for column in group.of_role("column"):
                owner = model.get_submodule(column.owner)
                if _attention(model, column) is not None:
                    linear.append((owner, group, column))
                elif _multiplied(model, column):
                    multiplied.append((owner, group, column))
                elif (axis := read_axis(owner)) is not None:
                    hook = owner.register_forward_pre_hook(_hook(group, column, axis, handler))
                    stack.callback(hook.remove)
        if linear:
            stack.enter_context(_linear_watched(linear, handler))
        if multiplied:
            stack.enter_context(_Multiplications(multiplied, handler))
        yield


def _hook(group: Group, column: Member, axis: int, handler: Handler) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (handler(group, column, inputs[0], axis), *inputs[1:])

    return hook


@contextmanager
def _linear_watched(watched: list[tuple[nn.Module, Group, Member]], handler: Handler) -> Iterator[None]:
    """Torch's attention multiplies its output projection by ``functional.linear``, with the weight of a module."""
    plain = functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for owner, group, column in watched:
            if owner.weight is weight:
                input = handler(group, column, input, -1)
        return plain(input, weight, bias)

    functional.linear = linear
    try:
        yield
    finally:
        functional.linear = plain


class _Multiplications(TorchFunctionMode):
    """Sees products of the weights of some modules with what stands to the right of them."""

    def __init__(self, watched: list[tuple[nn.Module, Group, Member]], handler: Handler) -> None:
        super().__init__()
        self._watched, self._handler = watched, handler

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hands the right factor of a watched product to the handler."""
        if function in (Tensor.__matmul__, torch.matmul, Tensor.matmul) and len(args) == 2:
            for owner, group, column in self._watched:
                if args[0] is owner.weight:
                    args = (args[0], self._handler(group, column, args[1], -2))
        return function(*args, **(kwargs or {}))
