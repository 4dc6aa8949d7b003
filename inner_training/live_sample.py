"""Which elements of a live run's tensors are measured: all of them in small models, a sample of blocks in large ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

WHOLE = 2**17  # parameters up to which a model is measured whole
ELEMENTS = 2**16  # that a sample has at least
BLOCK = 64  # neighbouring elements, four cache lines: fewer would read as much memory
STRIDES = (3, 7, 13, 31, 61)  # primes, so that the blocks of a matrix do not lie in the same columns
BLOCKS = 4  # that a tensor has in the sample at least; a smaller tensor is in it whole


def wide(tensor: Tensor) -> Tensor:
    """A dense tensor of real numbers whose squares do not overflow: half precision becomes float32."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())  # as two real numbers each, which is how optimizers see them
    return dense.float() if dense.dtype in (torch.float16, torch.bfloat16) else dense


class Sample:
    """The elements to measure of tensors with the given shapes: one block of 64 in every ``stride``, always the same ones.

    What is read is scaled by the square root of what it stands for, so that norms and inner products of samples
    estimate those of the whole; with stride 1 they are those of the whole.

    >>> Sample([torch.Size([64, 32])]).stride, Sample([torch.Size([1000, 1000])]).stride
    (1, 31)
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = tuple(shapes)
        total = sum(shape.numel() for shape in shapes)
        enough = (stride for stride in reversed(STRIDES) if total >= stride * ELEMENTS)
        self.stride = 1 if total <= WHOLE else next(enough, STRIDES[0])
        self._blocks = [self._blocks_in(shape.numel()) for shape in shapes]

    def _blocks_in(self, elements: int) -> int:
        """Sampled blocks of a tensor; 0 where it is measured whole."""
        blocks = elements // (self.stride * BLOCK)
        return blocks if self.stride > 1 and blocks >= BLOCKS else 0

    @overload
    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...
    @overload
    def read(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]: ...
    def read(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Scaled copies of the sampled elements of tensors of those shapes; the tensors themselves where they are whole."""
        return [
            None if one is None else self._part(one.detach(), blocks)
            for one, blocks in zip(tensors, self._blocks, strict=True)
        ]

    def _part(self, tensor: Tensor, blocks: int) -> Tensor:
        if blocks == 0:
            return wide(tensor)
        dense = tensor.to_dense() if tensor.is_sparse else tensor
        # Dense in another order than that of its dimensions (channels last): in the order of memory nothing is copied.
        order = sorted(range(dense.ndim), key=dense.stride, reverse=True)
        flat = dense.permute(order).reshape(-1)
        first = flat.storage_offset() + self.stride // 2 * BLOCK
        part = flat.as_strided((blocks, BLOCK), (self.stride * BLOCK, 1), first)
        return wide(part) * math.sqrt(tensor.numel() / (blocks * BLOCK))
