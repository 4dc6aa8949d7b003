"""Which elements of a live run's tensors are measured: all of them in small models, a sample of blocks in large ones."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from trimtab.inner_training.layout import depth_thirds

WHOLE = 2**17  # parameters up to which a model is measured whole
ELEMENTS = 2**16  # that a sample has at least
BLOCK = 64  # neighbouring elements, four cache lines: fewer would read as much memory
STRIDES = (3, 7, 13, 31, 61)  # primes, so that the blocks of a matrix do not lie in the same columns
BLOCKS = 4  # that a tensor has in the sample at least; a smaller tensor is in it whole
# Every operation on a tensor costs microseconds whatever its size, so many small tensors are put into one.
SMALL = 2**12  # elements that such a tensor has at most
MANY = 64  # of them there must be at least
PACK = 2**16  # elements of what they are put into, at most: sums over more would be less exact


def wide(tensor: Tensor) -> Tensor:
    """A dense tensor of real numbers whose squares do not overflow: half precision becomes float32."""
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())  # as two real numbers each, which is how optimizers see them
    return dense.float() if dense.dtype in (torch.float16, torch.bfloat16) else dense


def kind_of(tensor: Tensor) -> Hashable:
    """Tensors of one kind can be put into one; None for those that cannot be put together with others."""
    return None if tensor.is_complex() else tensor.device


def packs_of(sizes: Sequence[int], kinds: Sequence[Hashable]) -> list[list[int]]:
    """Which tensors to put into one: places of small ones of the same kind, where there are many.

    >>> [len(pack) for pack in packs_of([1000] * 100 + [10**6], ["cpu"] * 101)]
    [65, 35]
    """
    groups: dict[Hashable, list[int]] = {}
    for place, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        if size <= SMALL and kind is not None:
            groups.setdefault(kind, []).append(place)
    return [pack for group in groups.values() if len(group) >= MANY for pack in _split(group, sizes)]


def _split(group: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    pack, held = list[int](), 0
    for place in group:
        if pack and held + sizes[place] > PACK:
            yield pack
            pack, held = [], 0
        pack.append(place)
        held += sizes[place]
    yield pack


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in fewer tensors, where many of them are small; in another order."""
    if len(tensors) < MANY:
        return list(tensors)
    packs = packs_of([one.numel() for one in tensors], [kind_of(one) for one in tensors])
    inside = {place for pack in packs for place in pack}
    alone = [one for place, one in enumerate(tensors) if place not in inside]
    return alone + [_flat([tensors[place] for place in pack]) for pack in packs]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of dense or sparse tensors, one after the other."""
    dense = [one.to_dense() if one.is_sparse else one for one in tensors]
    flat: Tensor = _flatten_dense_tensors(dense)  # type: ignore[no-untyped-call]
    return flat.detach()


class Sample:
    """The elements to measure of tensors with the given shapes: one block of 64 in every ``stride``, always the same ones.

    What is read is scaled by the square root of what it stands for, so that norms and inner products of samples
    estimate those of the whole; with stride 1 they are those of the whole.

    Args:
        shapes: of the tensors.
        kinds: what ``kind_of`` says of each; empty to put none of them together with others.

    Attributes:
        thirds: third of the depth of each tensor that is read (see ``depth_thirds``).

    >>> Sample([torch.Size([64, 32])]).stride, Sample([torch.Size([1000, 1000])]).stride
    (1, 13)
    """

    def __init__(self, shapes: Sequence[torch.Size], kinds: Sequence[Hashable] = ()) -> None:
        self.shapes = tuple(shapes)
        sizes = [shape.numel() for shape in shapes]
        total = sum(sizes)
        enough = (stride for stride in reversed(STRIDES) if total >= stride * ELEMENTS)
        self.stride = 1 if total <= WHOLE else next(enough, STRIDES[0])
        self._blocks = [self._blocks_in(size) for size in sizes]
        thirds = depth_thirds(shapes)
        together = [
            (third, kind) if kind is not None and blocks == 0 else None
            for third, kind, blocks in zip(thirds, kinds or [None] * len(sizes), self._blocks, strict=True)
        ]
        self._packs = packs_of(sizes, together)
        inside = {place for pack in self._packs for place in pack}
        self._alone = [place for place in range(len(sizes)) if place not in inside]
        self.thirds = [thirds[place] for place in (*self._alone, *(pack[0] for pack in self._packs))]

    def _blocks_in(self, elements: int) -> int:
        """Sampled blocks of a tensor; 0 where it is measured whole."""
        blocks = elements // (self.stride * BLOCK)
        return blocks if self.stride > 1 and blocks >= BLOCKS else 0

    @overload
    def read(self, tensors: Sequence[Tensor]) -> list[Tensor]: ...
    @overload
    def read(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]: ...
    def read(self, tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Scaled copies of the sampled elements of tensors of those shapes; the tensors themselves where they are whole.

        Many small tensors come as one, behind the others, in which zeros stand for a missing one.
        """
        if len(tensors) != len(self.shapes):
            raise ValueError(f"{len(tensors)} tensors for a sample of {len(self.shapes)}")
        parts: list[Tensor | None] = []
        for place in self._alone:
            one = tensors[place]
            parts.append(None if one is None else self._part(one.detach(), self._blocks[place]))
        return parts + [self._pack(tensors, pack) for pack in self._packs]

    def _pack(self, tensors: Sequence[Tensor | None], pack: Sequence[int]) -> Tensor | None:
        held = [tensors[place] for place in pack]
        present = [one for one in held if one is not None]
        if not present:
            return None
        if len(present) < len(held):
            like = present[0]
            nothing = (torch.zeros(self.shapes[place], dtype=like.dtype, device=like.device) for place in pack)
            present = [zeros if one is None else one for one, zeros in zip(held, nothing, strict=True)]
        return wide(_flat(present))

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
