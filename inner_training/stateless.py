"""A module called with parameters and buffers that are not its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def ties(module: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that several parts share, and the first name of each.

    A part that occurs twice is one part, and has its first name only.

    >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> second.weight = first.weight
    >>> ties(nn.Sequential(first, second, first))
    {'1.weight': '0.weight'}
    """
    names: dict[int, str] = {}
    found: dict[str, str] = {}
    for prefix, part in module.named_modules():
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            name = f"{prefix}.{key}" if prefix else key
            first = name if tensor is None else names.setdefault(id(tensor), name)
            if first != name:
                found[name] = first
    return found


def stateless(module: nn.Module) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor], Any]:
    """``call(parameters, buffers, x)``, which leaves the module as it is.

    As ``torch.func.functional_call``, which by itself leaves the given tensors behind in a part that occurs twice.
    """
    tied = ties(module)

    def call(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor) -> Any:
        held = {**parameters, **buffers}
        held.update({name: held[first] for name, first in tied.items()})
        return functional_call(module, held, (x,), tie_weights=False)

    return call
