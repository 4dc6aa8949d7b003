"""A convolutional trunk of fixed width under a fully connected head whose hidden units have gates."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import out_of_range
from trimtab.inner_training.networks.conv import Conv2d
from trimtab.inner_training.networks.convnets import KERNEL, initial_layer
from trimtab.inner_training.networks.plastic_mlp import PlasticMLP, initial_plastic_parameters
from trimtab.inner_training.networks.seeding import Arrays


class ConvHead(nn.Module):
    """Convolutions of 3 x 3 with a stride of 2 and relu, then a perceptron on all positions.

    Only the hidden units of the perceptron have gates: the trunk is dense, whatever is pruned or grown above it (after
    the networks of Lillo & Cheney, arXiv 2605.15435).

    Args:
        colours: channels of the images.
        size: their edge in pixels.
        channels: of each convolution.
        hidden: outputs of each hidden layer of the head.
        outputs: number of outputs.
        depth: hidden layers of the head, >= 1.
        activation: of the head, a name of ``PLASTIC_ACTIVATIONS``.

    Attributes:
        trunk: the convolutions.
        dense: the head; its groups of units are ``dense.layers.0``, ``dense.layers.1``, ...

    Raises:
        UserError: when a size is below 1 or the activation is unknown.

    >>> ConvHead(1, 16, (8, 16), 64, 10)(torch.zeros(5, 1, 16, 16)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        colours: int,
        size: int,
        channels: Sequence[int],
        hidden: int,
        outputs: int,
        depth: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if size < 1:
            raise out_of_range("size", size, low=1)
        self.trunk = nn.ModuleList(
            Conv2d(before, after, KERNEL, 2, KERNEL // 2) for before, after in itertools.pairwise((colours, *channels))
        )
        for _ in channels:
            size = -(-size // 2)
        self.dense = PlasticMLP(channels[-1] * size * size, hidden, outputs, depth, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, colours, size, size) to (B, outputs), unnormalised."""
        for layer in self.trunk:
            x = torch.relu(layer(x))
        answer: Tensor = self.dense(x.flatten(1))
        return answer


def initial_conv_head(net: ConvHead, rng: np.random.Generator, width: int, scale: float) -> tuple[Arrays, Arrays]:
    """Draws initial parameters and gates of a network whose head has ``width`` active units in each hidden layer.

    The draw is that of ``torch.nn.Conv2d`` and ``torch.nn.Linear`` (see ``initial_plastic_parameters``).

    Args:
        net: the network; it is read, not changed.
        rng: source of the draw.
        width: active units of each hidden layer of the head, in [1, net.dense.units].
        scale: factor of the weights, > 0; biases are multiplied by ``min(scale, 1)``.

    Returns:
        Parameters and buffers by name, float32, in the shapes and the order of the network's own.

    Raises:
        RangeError: when the width does not fit the network.

    >>> net = ConvHead(1, 16, (2, 4), 8, 2)
    >>> parameters, buffers = initial_conv_head(net, np.random.default_rng(0), width=3, scale=1.0)
    >>> parameters["dense.layers.0.weight"].shape, buffers["dense.gate0"].tolist()
    ((8, 64), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """
    parameters: Arrays = {}
    for index, layer in enumerate(net.trunk):
        shape: tuple[int, ...] = tuple(layer.weight.shape)  # type: ignore[arg-type]
        weight, bias = initial_layer(rng, shape, (shape[0], shape[1]), scale)
        parameters[f"trunk.{index}.weight"], parameters[f"trunk.{index}.bias"] = weight, bias
    head, gates = initial_plastic_parameters(net.dense, rng, width, scale)
    parameters |= {f"dense.{name}": value for name, value in head.items()}
    return parameters, {f"dense.{name}": gate for name, gate in gates.items()}
