"""A multilayer perceptron built to stay able to learn: CReLU, smooth-leaky units, layer norm; and its initial values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.networks.seeding import Arrays

LEAK, STEEPNESS = 0.229, 0.6  # (0.125 + 0.333) / 2 and 3 / 5: Lillo & Cheney, arXiv 2605.15435, table 13, for CIFAR


def crelu(z: Tensor) -> Tensor:
    """Maps (..., U) to (..., 2 U): relu of z, then relu of -z (Shang et al., arXiv 1603.05201).

    >>> crelu(torch.tensor([2.0, -3.0]))
    tensor([2., 0., 0., 3.])
    """
    return torch.cat([torch.relu(z), torch.relu(-z)], -1)


def smooth_leaky(z: Tensor) -> Tensor:
    """a z + (1 - a) z sigmoid(c z): a smooth bend whose slope tends to a on the left and to 1 on the right.

    Lillo & Cheney, arXiv 2509.22562, with a = 0.229 and c = 0.6; the random slopes of their other variant are left out, as
    modules of populations may not draw random numbers.

    >>> smooth_leaky(torch.tensor([-100.0, 0.0, 100.0]))
    tensor([-22.9000,   0.0000, 100.0000])
    """
    return z * (LEAK + (1 - LEAK) * torch.sigmoid(STEEPNESS * z))


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An activation function, with f(0) = 0.

    Attributes:
        doc: the formula in one line.
        source: where it comes from.
        function: maps (..., U) to (..., outputs * U), of which unit u has the positions u, U + u, and so on.
        outputs: of one unit.
    """

    doc: str
    source: str
    function: Callable[[Tensor], Tensor]
    outputs: int = 1


PLASTIC_ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(doc="max(z, 0)", source="", function=torch.relu),
    "tanh": Activation(doc="tanh z", source="", function=torch.tanh),
    "crelu": Activation(
        doc="relu(z) and relu(-z): two outputs of each unit, of which there are half as many",
        source="Shang et al., arXiv 1603.05201; plasticity: Abbas et al., arXiv 2303.07507",
        function=crelu,
        outputs=2,
    ),
    "smooth-leaky": Activation(
        doc="a z + (1 - a) z sigmoid(c z), a = 0.229 and c = 0.6",
        source="Lillo & Cheney, arXiv 2509.22562",
        function=smooth_leaky,
    ),
}


class GatedLayerNorm(nn.Module):
    """Layer norm over the units whose gate is open: what it makes of them is what it would make without the others.

    Attributes:
        weight, bias: (units,).
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(units)), nn.Parameter(torch.zeros(units))

    def forward(self, z: Tensor, gate: Tensor) -> Tensor:
        """Maps (..., units) to the same shape.

        Args:
            z: values.
            gate: (units,) 0 or 1, at least one of them 1.
        """
        count = gate.sum()
        centred = z - (z * gate).sum(-1, keepdim=True) / count
        variance = (centred.square() * gate).sum(-1, keepdim=True) / count
        return centred * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class PlasticMLP(nn.Module):
    """A multilayer perceptron like ``MLP``, with more activation functions, and layer norm before them.

    Every hidden layer gives ``hidden`` outputs, whatever the activation function: of CReLU, whose units have two outputs,
    there are half as many units. A gate is a float buffer ``gate0``, ``gate1``, ... of shape (units,); 1 is an active unit.

    Attributes:
        inputs: number of input features.
        hidden: outputs of each hidden layer.
        units: units of each hidden layer.
        outputs: number of outputs.
        depth: number of hidden layers, >= 1.
        activation: a name of ``PLASTIC_ACTIVATIONS``.
        norm: whether there is layer norm before each activation function.

    Raises:
        UserError: when a size is below 1, the activation is unknown, or ``hidden`` is odd for CReLU.

    >>> net = PlasticMLP(64, 32, 10, depth=2, activation="crelu", norm=True)
    >>> net.units, net(torch.zeros(5, 64)).shape
    (16, torch.Size([5, 10]))
    """

    def __init__(
        self, inputs: int, hidden: int, outputs: int, depth: int = 1, activation: str = "relu", norm: bool = False
    ) -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs), ("depth", depth)):
            if size < 1:
                raise out_of_range(name, size, low=1)
        if activation not in PLASTIC_ACTIVATIONS:
            raise unknown("activation", activation, PLASTIC_ACTIVATIONS)
        each = PLASTIC_ACTIVATIONS[activation].outputs
        if hidden % each:
            raise UserError(f"hidden is {hidden}; {activation} has {each} outputs of each unit, so make it even")
        self.inputs, self.hidden, self.outputs, self.depth = inputs, hidden, outputs, depth
        self.units, self.activation, self.norm = hidden // each, activation, norm
        befores, afters = [inputs, *[hidden] * depth], [*[self.units] * depth, outputs]
        self.layers = nn.ModuleList(nn.Linear(one, other) for one, other in zip(befores, afters, strict=True))
        self.norms = nn.ModuleList(GatedLayerNorm(self.units) for _ in range(depth if norm else 0))
        for index in range(depth):
            self.register_buffer(f"gate{index}", torch.ones(self.units))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs) to (B, outputs), unnormalised."""
        chosen = PLASTIC_ACTIVATIONS[self.activation]
        for index in range(self.depth):
            gate: Tensor = getattr(self, f"gate{index}")
            z = self.layers[index](x)
            if self.norm:
                z = self.norms[index](z, gate)
            x = chosen.function(z) * gate.repeat(chosen.outputs)
        last = self.layers[self.depth]
        assert isinstance(last, nn.Linear)
        # A few outputs times a batch is far quicker stacked than a batch times a few outputs, and so is its softmax.
        return (last.weight @ x.mT).mT + last.bias


def initial_plastic_parameters(
    mlp: PlasticMLP, rng: np.random.Generator, width: int, scale: float, features: int | None = None
) -> tuple[Arrays, Arrays]:
    """Draws initial parameters and gates of which only the first ``width`` units per layer are active.

    The draw is that of ``mlp.initial_parameters``, number by number where the networks are the same: uniform in +-1/sqrt(fan_in), where fan_in counts the active outputs of the
    layer before, two for each unit of CReLU. Norms begin with scale 1 and shift 0 for active units, and zeros for the others.

    Args:
        mlp: the network; it is read, not changed.
        rng: source of the draw.
        width: active units of each hidden layer, in [1, mlp.units].
        scale: factor of the weights, > 0; biases are multiplied by ``min(scale, 1)``.
        features: input features in use, in [1, mlp.inputs], when later ones are padding; None is all of them.

    Returns:
        Parameters and buffers by name, float32, in the shapes and the order of the network's own.

    Raises:
        RangeError: when the width or the number of features does not fit the network.

    >>> net = PlasticMLP(4, 8, 2, activation="crelu")
    >>> parameters, buffers = initial_plastic_parameters(net, np.random.default_rng(0), width=3, scale=1.0)
    >>> parameters["layers.1.weight"].astype(bool).any(0).astype(int).tolist(), buffers["gate0"].tolist()
    ([1, 1, 1, 0, 1, 1, 1, 0], [1.0, 1.0, 1.0, 0.0])
    """
    features = mlp.inputs if features is None else features
    if not 1 <= width <= mlp.units:
        raise out_of_range("width", width, 1, mlp.units)
    if not 1 <= features <= mlp.inputs:
        raise out_of_range("features", features, 1, mlp.inputs)
    gate = np.arange(mlp.units) < width
    read = np.tile(gate, mlp.hidden // mlp.units)
    used = [np.arange(mlp.inputs) < features, *[read] * mlp.depth]
    made = [*[gate] * mlp.depth, np.ones(mlp.outputs, dtype=bool)]
    parameters: Arrays = {}
    for index, (before, after) in enumerate(zip(used, made, strict=True)):
        fan_in, fan_out = int(before.sum()), int(after.sum())
        bound = 1 / math.sqrt(fan_in)
        weight, bias = np.zeros((len(after), len(before)), dtype=np.float32), np.zeros(len(after), dtype=np.float32)
        drawn = 2 * rng.random((fan_out, fan_in), dtype=np.float32) - 1
        weight[np.ix_(after, before)] = drawn * (bound * scale)
        bias[after] = (2 * rng.random(fan_out, dtype=np.float32) - 1) * (bound * min(scale, 1.0))
        parameters[f"layers.{index}.weight"], parameters[f"layers.{index}.bias"] = weight, bias
    for index, key in itertools.product(range(len(mlp.norms)), ("weight", "bias")):
        parameters[f"norms.{index}.{key}"] = (gate * (key == "weight")).astype(np.float32)
    return parameters, {f"gate{index}": gate.astype(np.float32) for index in range(mlp.depth)}
