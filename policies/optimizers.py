"""Is an optimizer one that a controller can steer? Found out before anything is touched."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trimtab.errors import UserError, shown
from trimtab.inner_training.attached import ATTACHED
from trimtab.inner_training.live_run import LiveRun


def check_optimizer(optimizer: object, model: nn.Module | None) -> None:
    """Raises ``UserError`` unless these are a free optimizer with parameters and the model that they belong to."""
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise UserError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer; give the innermost optimizer")
    _check_free(optimizer)
    trained = [one for one in parameters_of(optimizer) if one.requires_grad]
    if not trained:
        raise UserError("the optimizer has no parameters that require a gradient, so there is nothing to steer")
    if any(hasattr(one, "device_mesh") or getattr(one, "_fsdp_flattened", False) for one in trained):
        raise UserError(
            "the optimizer's parameters are sharded (FSDP, DTensor), so no rank can measure or restore a whole one; a "
            "controller works with DistributedDataParallel"
        )
    _check_shapes("optimizer", parameters_of(optimizer))
    for place, group in enumerate(optimizer.param_groups):
        if trouble := trouble_of_rate(group.get("lr")):
            rate = group.get("lr")
            given = shown(rate) if isinstance(rate, int) else reprlib.repr(rate)
            raise UserError(
                f"{type(optimizer).__name__} has the learning rate {given} in parameter group {place}, which is {trouble}; a controller multiplies "
                "finite numbers of at least 0 (Python's, numpy's, or a tensor of one float), so give the optimizer such a rate"
            )
    if model is not None:
        _check_model(model, trained)


def hooked(optimizer: torch.optim.Optimizer, interval: int, before_first: Callable[[], None]) -> LiveRun:
    """The run behind an optimizer, whose steps are hooked from now on; ``UserError`` where it takes no hooks."""
    try:
        return LiveRun(optimizer, interval, before_first)
    except Exception as error:  # of an optimizer of somebody else's
        raise UserError(
            f"{type(optimizer).__name__} does not take the hooks of a controller ({error!r}); give an optimizer that keeps the "
            "hooks and the step of torch.optim.Optimizer"
        ) from error


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of an optimizer, also frozen ones."""
    return [one for group in optimizer.param_groups for one in group["params"]]


def trouble_of_rate(rate: Any) -> str:
    """What a learning rate is that cannot be multiplied; empty where it can be.

    >>> trouble_of_rate(np.float32(0.1)), trouble_of_rate(torch.tensor([0.1])), trouble_of_rate(1)
    ('', '', '')
    >>> trouble_of_rate(None), trouble_of_rate(torch.tensor(1))
    ('one that it sets itself', 'a tensor of torch.int64')
    """
    if rate is None:
        return "one that it sets itself"
    if isinstance(rate, Tensor):
        if not rate.is_floating_point():
            return f"a tensor of {rate.dtype}"
        if rate.numel() != 1:
            return f"a tensor of {rate.numel()} elements"
        if rate.requires_grad:
            return "a tensor that requires a gradient"
    elif isinstance(rate, bool) or not isinstance(rate, int | float | np.floating | np.integer):
        return f"a {type(rate).__name__}"
    try:
        number = float(rate)
    except (OverflowError, RuntimeError):  # a whole number too large for a float; a tensor without data
        return "no finite number"
    if not math.isfinite(number):
        return "no finite number"
    return "negative" if number < 0 else ""


def _check_free(optimizer: torch.optim.Optimizer) -> None:
    if optimizer in ATTACHED:
        raise UserError("this optimizer has a controller already; call detach() on that one first")
    own = {id(one) for one in parameters_of(optimizer)}
    for other in ATTACHED:
        shared = own & {id(one) for one in parameters_of(other)}
        if shared:
            raise UserError(
                f"{len(shared)} of the optimizer's {len(own)} parameters are also in another one ({type(other).__name__}) "
                "that has a controller already, and two would undo each other's work; call detach() on that one first, or "
                "give each optimizer parameters of its own"
            )


def _check_shapes(whose: str, tensors: Iterable[Tensor]) -> None:
    if any(is_lazy(one) for one in tensors):
        raise UserError(
            f"the {whose} has lazy parameters or buffers that have no shape yet; run one batch through the model (one forward "
            "pass), then attach"
        )


def _check_model(model: object, trained: list[Tensor]) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model is a {type(model).__name__}; it must be a torch.nn.Module, or None")
    _check_shapes("model", (*model.parameters(), *model.buffers()))
    owned = {id(parameter) for parameter in model.parameters()}
    foreign = sum(id(parameter) not in owned for parameter in trained)
    if foreign:
        raise UserError(
            f"{foreign} of the optimizer's {len(trained)} parameters do not belong to the model that was given; "
            "give the model that this optimizer trains, or model=None"
        )
