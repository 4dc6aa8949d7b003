"""Whether runs of a module can be stacked, told before any training."""

from __future__ import annotations

from collections.abc import Callable

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


@torch.no_grad()
def _changed_buffers(module: nn.Module, x: Tensor) -> list[str]:
    """Names of the buffers that a forward pass changes, in place or by assignment."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    parameters = {name: parameter.detach().float() for name, parameter in module.named_parameters()}
    held = {**parameters, **{name: buffer.clone() for name, buffer in before.items()}}
    held |= {name: held[first] for name, first in ties(module).items()}
    with seeded_rng(0):  # what the module changes is changed in ``held``
        functional_call(module, held, (x.to(next(iter(parameters.values())).device, copy=True),), tie_weights=False)
    return [name for name, buffer in before.items() if not _same(buffer, held[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and bool(((one == other) | (one.isnan() & other.isnan())).all())


def check_stackable(name: str, module: nn.Module, x: Tensor, attempt: Callable[[], object]) -> None:
    """Refuses a module that fails when stacked, or changes its buffers.

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
        changed = _changed_buffers(module, x)
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
