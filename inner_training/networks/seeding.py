"""Initial values of modules that depend on an explicit seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Arrays = dict[str, np.ndarray]


@contextmanager
def seeded_rng(seed: int) -> Iterator[None]:
    """Inside the block, torch's default CPU generator starts from ``seed``; after it, it is as it was before.

    Args:
        seed: any integer in [0, 2**63).
    """
    # Modules initialise themselves from the process-wide generator and take no other. Inside the fork that generator
    # is ours; on leaving, also by an exception, its state is put back, so nothing outside can tell.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build_module(factory: Callable[[], AnyModule], seed: int) -> AnyModule:
    """Makes a module whose own initialisation depends on ``seed`` alone.

    Args:
        factory: makes the module on the CPU, drawing from torch's default generator only.
        seed: any integer in [0, 2**63).
    """
    with seeded_rng(seed):
        return factory()


def module_parameters(factory: Callable[[], nn.Module], seed: int) -> tuple[Arrays, Arrays]:
    """Initial parameters and buffers that a module's own initialisation gives for a seed.

    Args:
        factory: makes the module (see ``build_module``).
        seed: any integer in [0, 2**63).

    Returns:
        Copies of the parameters and buffers by name, in the module's own types (bfloat16 as float32) and shapes.

    >>> first, _ = module_parameters(lambda: nn.Linear(3, 2), seed=1)
    >>> again, _ = module_parameters(lambda: nn.Linear(3, 2), seed=1)
    >>> bool((first["weight"] == again["weight"]).all()), first["weight"].shape
    (True, (2, 3))
    """
    module = build_module(factory, seed)
    return _arrays(module.named_parameters()), _arrays(module.named_buffers())


def _arrays(tensors: Iterable[tuple[str, Tensor]]) -> Arrays:
    return {
        name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy().copy()
        for name, value in tensors
    }
