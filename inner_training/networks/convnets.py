"""Convolutional networks with channel gates: a plain trunk, a small residual network, and their initial values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import out_of_range
from trimtab.inner_training.networks.conv import Conv2d
from trimtab.inner_training.networks.seeding import Arrays

KERNEL = 3


class ChannelNet(nn.Module):
    """What the convolutional networks share: gates on their channels, and a linear head.

    A gate is a float buffer ``gate0``, ``gate1``, ... of shape (channels,) that is multiplied onto the channels of one
    place of the network; 1 is an active channel, 0 an inactive one.

    Attributes:
        colours: channels of the images.
        channels: channels of the widest gate.
        outputs: number of outputs.
        head: linear map from the flattened (channel, row, column) features to the outputs.
    """

    head: nn.Linear

    def __init__(self, colours: int, gates: Sequence[int], outputs: int) -> None:
        super().__init__()
        for name, size in (("colours", colours), *(("channels", gate) for gate in gates), ("outputs", outputs)):
            if size < 1:
                raise out_of_range(name, size, low=1)
        self.colours, self.channels, self.outputs = colours, max(gates), outputs
        for index, gate in enumerate(gates):
            self.register_buffer(f"gate{index}", torch.ones(gate))

    def gate(self, index: int) -> Tensor:
        """(channels, 1, 1) gate of a place, to multiply images with."""
        values: Tensor = getattr(self, f"gate{index}")
        return values[:, None, None]

    def answer(self, x: Tensor) -> Tensor:
        """Maps features (B, channels, H, W) to outputs (B, outputs)."""
        # The batch comes last in memory (see Conv2d), and a few outputs times a batch is far quicker stacked.
        return (self.head.weight @ x.permute(1, 2, 3, 0).flatten(0, 2)).mT + self.head.bias


class ConvNet(ChannelNet):
    """Convolutions of 3 x 3 with a stride of 2 and relu, then a linear head on all positions or on their mean.

    Args:
        colours: channels of the images.
        size: their edge in pixels.
        channels: channels of each convolution, one entry per layer.
        outputs: number of outputs.
        pooled: whether the head sees the mean over the positions, so that it matters what is seen and not where.

    Raises:
        UserError: when a size is below 1.

    >>> ConvNet(1, 16, (8, 16), 10)(torch.zeros(5, 1, 16, 16)).shape
    torch.Size([5, 10])
    """

    def __init__(self, colours: int, size: int, channels: Sequence[int], outputs: int, *, pooled: bool = False) -> None:
        super().__init__(colours, channels, outputs)
        if size < 1:
            raise out_of_range("size", size, low=1)
        self.pooled = pooled
        # The first stride already halves the image: at full size one layer would cost as much as all the others.
        self.layers = nn.ModuleList(
            Conv2d(source, target, KERNEL, 2, KERNEL // 2)
            for source, target in itertools.pairwise((colours, *channels))
        )
        for _ in channels:
            size = -(-size // 2)
        self.head = nn.Linear(channels[-1] * (1 if pooled else size * size), outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, colours, size, size) to (B, outputs), unnormalised."""
        for index, layer in enumerate(self.layers):
            x = torch.relu(layer(x)) * self.gate(index)
        return self.answer(x.mean((2, 3), keepdim=True) if self.pooled else x)


class GatedGroupNorm(nn.Module):
    """Group normalisation (Wu and He, arXiv 1803.08494) over the active channels of each group.

    Mean and variance leave inactive channels out, so that the active ones come out as in a network without the
    inactive ones. Where every group is wholly active or inactive that network is one with ``torch.nn.GroupNorm``.

    Args:
        channels: channels of the input, a multiple of ``group``.
        group: channels per group; groups keep their size, whatever the number of channels.

    Attributes:
        weight, bias: (channels,) scale and shift after normalisation.
    """

    eps = 1e-5  # as torch.nn.GroupNorm

    def __init__(self, channels: int, group: int = 4) -> None:
        super().__init__()
        if group < 1 or channels % group:
            raise out_of_range("channels", channels, low=group, remedy=f"a multiple of the group of {group}")
        self.group = group
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Normalises (B, channels, H, W) with a gate (channels, 1, 1); inactive channels come out as zero."""
        groups, inside = x.shape[1] // self.group, (-3, -2, -1)
        split, active = (torch.unflatten(value, -3, (groups, self.group)) for value in (x, gate))
        count = active.sum(inside, keepdim=True).clamp(min=1) * (x.shape[2] * x.shape[3])
        mean = (split * active).sum(inside, keepdim=True) / count
        centred = (split - mean) * active
        variance = centred.square().sum(inside, keepdim=True) / count
        normal = (centred * (variance + self.eps).rsqrt()).flatten(1, 2)
        return normal * self.weight[:, None, None] + self.bias[:, None, None] * gate


class ResidualNet(ChannelNet):
    """A residual network with identity shortcuts and norm and relu before each convolution (He et al., arXiv
    1603.05027), with group norm instead of batch norm.

    A first convolution and then each block halve the image, shortcuts by the mean of 2 x 2 pixels. The head sees the
    mean over the positions. ``gate0`` is that of the stream, and ``gate1``, ``gate2``, ... are those inside the blocks.

    Args:
        colours: channels of the images.
        channels: channels of the stream and inside the blocks, a multiple of 4.
        outputs: number of outputs.
        blocks: residual blocks, >= 1.

    Raises:
        UserError: when a size is below 1 or the channels do not form groups of 4.

    >>> ResidualNet(1, 16, 10)(torch.zeros(5, 1, 16, 16)).shape
    torch.Size([5, 10])
    """

    def __init__(self, colours: int, channels: int, outputs: int, blocks: int = 2) -> None:
        super().__init__(colours, [channels] * (blocks + 1), outputs)
        if blocks < 1:
            raise out_of_range("blocks", blocks, low=1)
        self.stem = Conv2d(colours, channels, KERNEL, 2, KERNEL // 2)
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(blocks))
        self.norm = GatedGroupNorm(channels)
        self.head = nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, colours, H, W) to (B, outputs), unnormalised; H and W are multiples of 2 ** (blocks + 1)."""
        stream = self.gate(0)
        x = self.stem(x) * stream
        for index, block in enumerate(self.blocks):
            x = block(x, stream, self.gate(index + 1))
        return self.answer(torch.relu(self.norm(x, stream)).mean((2, 3), keepdim=True))


class ResidualBlock(nn.Module):
    """Two convolutions, of which the first halves the image, beside a shortcut that does the same by a mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = GatedGroupNorm(channels), GatedGroupNorm(channels)
        self.first = Conv2d(channels, channels, KERNEL, 2, KERNEL // 2)
        self.second = Conv2d(channels, channels, KERNEL, 1, KERNEL // 2)

    def forward(self, x: Tensor, stream: Tensor, inner: Tensor) -> Tensor:
        """Maps (B, channels, H, W) to (B, channels, H / 2, W / 2)."""
        branch = self.first(torch.relu(self.first_norm(x, stream)))
        branch = self.second(torch.relu(self.second_norm(branch, inner)))
        shortcut = torch.unflatten(torch.unflatten(x, 3, (-1, 2)), 2, (-1, 2)).mean((3, 5))
        return shortcut + branch * stream


def initial_channels(net: ChannelNet, rng: np.random.Generator, width: int, scale: float) -> tuple[Arrays, Arrays]:
    """Draws initial parameters and gates of a network of which only the first channels are active at each gate.

    The draw is that of ``torch.nn.Conv2d`` and ``torch.nn.Linear``, uniform in +-1/sqrt(fan_in), where fan_in counts
    active inputs only. Weights are multiplied by ``scale``, biases by ``min(scale, 1)``; norms start as the identity.
    Whatever touches an inactive channel is zero, gets no gradient and stays zero.

    Args:
        net: the network; it is read, not changed.
        rng: source of the draw.
        width: active channels of the widest gates, in [1, net.channels]; of the others the same share, rounded up.
        scale: factor of the weights, > 0.

    Returns:
        Parameters and buffers by name, float32, in the shapes and the order of the network's own.

    Raises:
        RangeError: when the width does not fit the network.

    >>> net = ConvNet(1, 16, (2, 4), 2)
    >>> parameters, buffers = initial_channels(net, np.random.default_rng(0), width=2, scale=1.0)
    >>> parameters["layers.1.weight"].shape, buffers["gate0"].tolist(), buffers["gate1"].tolist()
    ((4, 2, 3, 3), [1.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    """
    if not 1 <= width <= net.channels:
        raise out_of_range("width", width, 1, net.channels)

    def active(channels: int) -> int:
        return -(-width * channels // net.channels)

    def gate(channels: int) -> np.ndarray:
        return (np.arange(channels) < active(channels)).astype(np.float32)

    parameters: Arrays = {}
    before, used = net.colours, net.colours  # channels that the last convolution gives, and those of them in use
    for name, module in net.named_modules():
        if isinstance(module, Conv2d):
            drawn = (active(module.out_channels), used)
            before, used = module.out_channels, drawn[0]
        elif isinstance(module, nn.Linear):
            drawn = (net.outputs, used * (module.in_features // before))
        elif isinstance(module, GatedGroupNorm):
            inside = gate(module.weight.numel())
            parameters[f"{name}.weight"], parameters[f"{name}.bias"] = inside, np.zeros_like(inside)
            continue
        else:
            continue
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = initial_layer(rng, module.weight.shape, drawn, scale)
    return parameters, {name: gate(buffer.numel()) for name, buffer in net.named_buffers()}


def initial_layer(
    rng: np.random.Generator, shape: tuple[int, ...], drawn: tuple[int, int], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (outputs, inputs, ...) and bias (outputs,) of which the first ``drawn`` outputs and inputs are; zeros elsewhere."""
    outputs, inputs = drawn
    bound = 1 / math.sqrt(inputs * math.prod(shape[2:]))
    weight, bias = np.zeros(shape, dtype=np.float32), np.zeros(shape[0], dtype=np.float32)
    values = 2 * rng.random((outputs, inputs, *shape[2:]), dtype=np.float32) - 1
    weight[:outputs, :inputs] = values * (bound * scale)
    bias[:outputs] = (2 * rng.random(outputs, dtype=np.float32) - 1) * (bound * min(scale, 1.0))
    return weight, bias
