"""Convolution as one batched matrix product, which stacks over runs where a grouped convolution does not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from trimtab.errors import UserError, out_of_range

_RECORDING = ContextVar("recording", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Inside, convolutions do as in compiled code, for what is recorded to be compiled."""
    token = _RECORDING.set(True)
    try:
        yield
    finally:
        _RECORDING.reset(token)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """``torch.nn.functional.conv2d`` with square kernels, as a matrix product.

    Shifted copies of the input become the rows of a matrix that the weights multiply. The batch is the innermost axis
    in memory from input to output, so chained layers copy nothing in between and every shift moves whole vectors.

    Args:
        x: (B, C, H, W).
        weight: (O, C, k, k).
        bias: (O,) or None.
        stride: >= 1.
        padding: zeros on each side, >= 0.

    Returns:
        (B, O, H', W').
    """
    size = weight.shape[2]
    x = functional.pad(x.permute(1, 2, 3, 0), (0, 0, padding, padding, padding, padding))
    high, wide = ((side - size) // stride + 1 for side in x.shape[1:3])
    shifted = [
        x[:, row : row + stride * (high - 1) + 1 : stride, column : column + stride * (wide - 1) + 1 : stride]
        for row in range(size)
        for column in range(size)
    ]
    columns = torch.stack(shifted, 1).reshape(weight.shape[1] * size * size, -1)
    outputs = weight.flatten(1) @ columns
    if bias is not None:
        outputs = outputs + bias[:, None]
    return outputs.view(weight.shape[0], high, wide, -1).permute(3, 0, 1, 2)


class Conv2d(nn.Module):
    """``torch.nn.Conv2d`` with square kernels, quick in a population: the same parameters, initial draw and values.

    Compiled runs stacked under ``vmap`` share one batched matrix product (``convolve``), where
    ``torch.nn.functional.conv2d`` becomes a grouped convolution; without a compiler the latter has fewer operations.

    Args:
        in_channels: channels of the input, >= 1.
        out_channels: channels of the output, >= 1.
        kernel_size: side of the kernel, >= 1.
        stride: step of the kernel, >= 1.
        padding: zeros on each side of the input, >= 0.
        bias: whether a number per output channel is added.

    Attributes:
        weight: (out_channels, in_channels, kernel_size, kernel_size).
        bias: (out_channels,) or None.

    Raises:
        UserError: when a size is out of range or, in ``forward``, when the input does not fit the kernel.

    >>> Conv2d(3, 8, kernel_size=3, stride=2, padding=1)(torch.zeros(5, 3, 16, 16)).shape
    torch.Size([5, 8, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride}
        for name, size in sizes.items():
            if size < 1:
                raise out_of_range(name, size, low=1)
        if padding < 0:
            raise out_of_range("padding", padding, low=0)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        # As torch.nn.Conv2d: He et al. (arXiv 1502.01852) with a = sqrt(5) is uniform in +-1/sqrt(fan_in).
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W')."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(x.shape[2:]) + 2 * self.padding < self.kernel_size:
            raise UserError(
                f"a convolution of {self.in_channels} channels with a kernel of side {self.kernel_size} does not fit "
                f"an input of shape {tuple(x.shape)}; it takes (batch, {self.in_channels}, height, width)"
            )
        if torch.compiler.is_compiling() or _RECORDING.get():
            return convolve(x, self.weight, self.bias, self.stride, self.padding)
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)
