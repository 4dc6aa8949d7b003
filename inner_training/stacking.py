"""Whether runs of a module can be stacked, told before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from trimtab.errors import MismatchError
from trimtab.inner_training.networks.seeding import seeded_rng
from trimtab.inner_training.stateless import ties

REMEDY = (
    "use layer or group norm in place of batch norm, leave dropout out, and write the rest in float32 with operations "
    "that torch.func.vmap knows"
)


def check_parameters(name: str, module: nn.Module) -> None:
    """Refuses a module whose parameters are none that runs could train.

    Args:
        name: of the family.
        module: of the family.

    Raises:
        MismatchError: naming the parameter, and what to do.
    """
    parameters = dict(module.named_parameters())
    if not parameters:
        raise MismatchError(f"the module of {name!r} has no parameters, so there is nothing to train; give it some")
    for key, tensor in (*parameters.items(), *module.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise MismatchError(
                f"{key!r} of the module of {name!r} has no shape before its first batch; use layers that are given "
                "their sizes in place of lazy ones"
            )
        if tensor.is_meta:
            raise MismatchError(f"{key!r} of the module of {name!r} has no values; make the module on the CPU")
    for key, parameter in parameters.items():
        if not parameter.requires_grad:
            raise MismatchError(
                f"parameter {key!r} of the module of {name!r} requires no gradient, but runs stacked together train "
                "every parameter; make it a buffer (register_buffer)"
            )


class _Call:
    """Forward passes with copies of a module's parameters and buffers, which a pass may change.

    Attributes:
        held: the copies by name; what the module changes is changed in them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        parameters = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
        self._device = next(iter(parameters.values())).device
        self.held = {**parameters, **{name: buffer.clone() for name, buffer in module.named_buffers()}}
        self.held |= {name: self.held[first] for name, first in ties(module).items()}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Any:
        with seeded_rng(0):
            return functional_call(self._module, self.held, (x.to(self._device, copy=True),), tie_weights=False)


def _changed_buffers(module: nn.Module, x: Tensor) -> list[str]:
    """Names of the buffers that a forward pass changes, in place or by assignment."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    call = _Call(module)
    call(x)
    return [name for name, buffer in before.items() if not _same(buffer, call.held[name])]


def _mixes(module: nn.Module, x: Tensor) -> bool:
    """Whether what a module computes of an example depends on the others of its batch."""
    among_others, among_its_like = _Call(module)(x), _Call(module)(x[:1].expand_as(x))
    if not isinstance(among_others, Tensor):
        return False  # what a loss of the family's own makes of it is not known
    return not torch.allclose(among_others[0], among_its_like[0], rtol=1e-2, atol=1e-4, equal_nan=True)


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_stackable(name: str, module: nn.Module, x: Tensor, attempt: Callable[[], object]) -> None:
    """Refuses a module that fails when stacked, changes its buffers, or mixes the examples of a batch.

    Args:
        name: of the family.
        module: of the family.
        x: a few examples, as the module sees them.
        attempt: takes a step, and evaluates.

    Raises:
        MismatchError: saying why, and what to do.
    """
    try:
        attempt()
        changed, mixed = _changed_buffers(module, x), _mixes(module, x)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise MismatchError(f"the module of {name!r} cannot be stacked: {reason}; {REMEDY}") from error
    if changed:
        raise MismatchError(
            f"the module of {name!r} changes its buffer {changed[0]!r} in the forward pass, which runs stacked "
            f"together cannot do; {REMEDY}"
        )
    if mixed:
        raise MismatchError(
            f"the module of {name!r} computes an example differently beside other examples, but the batches of runs "
            f"stacked together are filled up with repeated ones; {REMEDY}"
        )
