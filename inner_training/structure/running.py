"""A module run on examples without a trace: modes, buffers, gradients and random state stay as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trimtab.errors import UserError
from trimtab.inner_training.module_parts import evaluating


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def call_on(model: nn.Module, example: Any) -> Callable[[], Any]:
    """A call of the module on an example input: a tuple or list is its arguments, a mapping its keyword arguments."""
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    example = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, example)
    if isinstance(example, Mapping):
        return lambda: model(**example)
    if isinstance(example, tuple | list):
        return lambda: model(*example)
    return lambda: model(example)


def tensors_in(outputs: Any) -> list[Tensor]:
    """The float tensors of an output of any nesting."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Inside, the module is in evaluation mode; after it, modes, buffers and all random states are what they were.

    Parameters and their gradients are left to the block.
    """
    random_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {one.device for one in model.parameters() if one.device.type == "cuda"}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(sorted(devices, key=str)), evaluating(model):
            yield
    finally:
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)


def outputs_of(call: Callable[[], Any], model: nn.Module) -> list[Tensor]:
    """The outputs of a call, without gradients.

    Raises:
        UserError: the call fails, or gives no float tensor.
    """
    try:
        with torch.no_grad():
            outputs = tensors_in(call())
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} does not run on the example input ({type(error).__name__}: {error}); "
            "give what its forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments"
        ) from error
    if not outputs:
        raise UserError(f"{type(model).__name__} gives no float tensor for the example input; units cannot be followed")
    return outputs
