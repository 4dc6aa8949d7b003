"""Random numbers of criteria and growth methods: from a generator, or from a seed for each run."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trimtab.errors import MismatchError
from trimtab.inner_training.streams import draw_words

Source = torch.Generator | Tensor
BITS = 23  # of a uniform number: float32 holds them all, and neither 0 nor 1 comes up
STRIDE = 1 << 22  # numbers of one run that a request leaves room for


class Draws:
    """Numbers drawn for every run of a batch, one request after another.

    Args:
        source: a ``torch.Generator`` on any device, which all runs draw from in turn; or (*batch,) int64 seeds in
            [0, 2**31): then what a run gets depends on its own seed alone, on every device and in every population.
        batch: the leading axes.
        device: where the numbers are wanted.

    Raises:
        MismatchError: the seeds do not have the shape of the batch.
    """

    def __init__(self, source: Source, batch: tuple[int, ...], device: torch.device) -> None:
        if isinstance(source, Tensor) and (source.dtype != torch.int64 or tuple(source.shape) != batch):
            raise MismatchError(
                f"seeds are {source.dtype} of shape {tuple(source.shape)}; give one int64 for each run, shape {batch}"
            )
        self._source, self.batch, self._device, self._drawn = source, batch, device, 0

    def uniform(self, *shape: int) -> Tensor:
        """(*batch, *shape) float32, uniform in (0, 1)."""
        if isinstance(self._source, torch.Generator):
            drawn = torch.rand((*self.batch, *shape), generator=self._source, device=self._source.device)
            return drawn.to(self._device).clamp(min=2.0**-24)
        count = math.prod(shape)
        seeds = self._source.to(self._device)[..., None].expand(*self.batch, count)
        # A request begins at a place of its own, so that what a run gets does not depend on how much others ask for.
        counter = torch.arange(self._drawn, self._drawn + count, device=self._device).expand_as(seeds)
        self._drawn += STRIDE * math.ceil(count / STRIDE)
        words = draw_words(seeds, counter) >> (32 - BITS)
        return ((words.float() + 0.5) / 2**BITS).reshape(*self.batch, *shape)

    def normal(self, *shape: int) -> Tensor:
        """(*batch, *shape) float32, standard normal.

        >>> draws = Draws(torch.Generator().manual_seed(0), (2,), torch.device("cpu"))
        >>> draws.normal(5000).std().sub(1).abs().lt(0.03).item()
        True
        """
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(*shape) - 1)

    def signs(self, *shape: int) -> Tensor:
        """(*batch, *shape) float32, -1 or 1."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0)
