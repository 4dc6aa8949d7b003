"""Masks of whole bits, by which large tensors are put together several times quicker than by bool ones on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(mask: Tensor) -> Tensor:
    """int32 with all bits set where a mask is True, and none elsewhere."""
    return mask.to(torch.int32).neg_()


def unset(mask: Tensor) -> Tensor:
    """The ``bits`` of where a mask is False."""
    return mask.to(torch.int32).sub_(1)


def chosen(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``torch.where`` of float32 tensors of one shape by their bits, which is several times quicker on a CPU.

    Args:
        mask: bool, or its ``bits``.
        new, old: what to take where it is True, and elsewhere.

    >>> chosen(torch.tensor([True, False]), torch.tensor([1.0, 2.0]), torch.tensor([3.0, torch.nan]))
    tensor([1., nan])
    """
    before = old.view(torch.int32)
    which = bits(mask) if mask.dtype == torch.bool else mask
    return (new.view(torch.int32) ^ before).bitwise_and_(which).bitwise_xor_(before).view(torch.float32)


def cleared(mask: Tensor, *values: Tensor) -> list[Tensor]:
    """Each of the values, float32, with 0 where a mask (bool, or its ``bits``) is True."""
    return kept_at(unset(mask) if mask.dtype == torch.bool else ~mask, *values)


def kept_at(kept: Tensor, *values: Tensor) -> list[Tensor]:
    """Each of the values, float32, with 0 where ``bits`` are not set."""
    return [(kept & one.view(torch.int32)).view(torch.float32) for one in values]
