"""A run's own random state in the place of the process-wide generators while the run is computed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def _present(device: torch.device) -> dict[str, Any]:
    """States of the process-wide generators: torch's on the CPU and on ``device``, numpy's and Python's."""
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    return {**states, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _put(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def default_device() -> torch.device:
    """The device whose generator a maker of runs draws from beside the CPU's."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class ProcessRandomness:
    """The random state of the whole process, to be given to ``trimtab.attach(..., stateful=(ProcessRandomness(),))``.

    A rollback then puts it back too, so that dropout and shuffling repeat what they drew. Without it they go on: what led to
    a spike is not drawn again.

    >>> randomness = ProcessRandomness()
    >>> saved = randomness.state_dict()
    >>> first = torch.rand(2)
    >>> randomness.load_state_dict(saved)
    >>> torch.equal(first, torch.rand(2))
    True
    """

    def state_dict(self) -> dict[str, Any]:
        """States of torch's generators (of the present accelerator too), numpy's and Python's."""
        return _present(default_device())

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Puts them back."""
        _put(states, default_device())


class OwnRandomness:
    """Random state of one run, which follows from its seed alone, whatever else the process draws.

    Dropout, the shuffling of loaders and the augmentation of data draw from process-wide generators and take no other.
    Inside ``with randomness.inside(device):`` these are the run's; after it they are as they were, also after an error.

    Args:
        seed: in [0, 2**32).

    >>> randomness, cpu = OwnRandomness(3), torch.device("cpu")
    >>> with randomness.inside(cpu):
    ...     first = torch.rand(2)
    >>> with randomness.inside(cpu):
    ...     second = torch.rand(2)
    >>> bool((torch.cat([first, second]) == torch.rand(4, generator=torch.Generator().manual_seed(3))).all())
    True
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._first: dict[str, Any] = {
            "torch": torch.Generator().manual_seed(seed).get_state(),
            "numpy": np.random.RandomState(seed).get_state(),
            "python": random.Random(seed).getstate(),
        }
        self._states = dict(self._first)

    def _know(self, device: torch.device) -> None:
        """Gives the run a state for a device that it has not been on before."""
        if device.type == "cuda" and "cuda" not in self._first:
            self._first["cuda"] = torch.Generator(device).manual_seed(self._seed).get_state()
            self._states["cuda"] = self._first["cuda"]

    @contextmanager
    def inside(self, device: torch.device, *, keep: bool = True) -> Iterator[None]:
        """Puts this run's states in the place of the process's for the length of a block.

        Args:
            device: where the run is computed; its generator is the run's too if it is a CUDA device.
            keep: go on next time where this block ends; otherwise the block begins at the seed, and leaves no trace.
        """
        outside = _present(device)
        self._know(device)
        _put(self._states if keep else self._first, device)
        try:
            yield
        finally:
            if keep:
                self._states = {**self._states, **_present(device)}
            _put(outside, device)

    def state_dict(self) -> dict[str, Any]:
        """The states now; nobody writes to one, each is replaced as a whole."""
        return dict(self._states)

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Goes back to what ``state_dict`` gave."""
        self._states = dict(states)
