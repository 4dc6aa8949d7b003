"""The multilayer perceptron, and its initial values for any width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import out_of_range, unknown
from trimtab.inner_training.networks.seeding import Arrays

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh}


class MLP(nn.Module):
    """A multilayer perceptron whose hidden units have gates, so that its width varies without changing shapes.

    A gate is a float buffer ``gate0``, ``gate1``, ... of shape (hidden,), multiplied onto the activation of its
    hidden layer; 1 is an active unit, 0 an inactive one.

    Attributes:
        inputs: number of input features.
        hidden: units in each hidden layer.
        outputs: number of outputs.
        depth: number of hidden layers, >= 1.
        activation: ``relu`` or ``tanh``.

    Raises:
        UserError: when a size is below 1 or the activation is unknown.

    >>> MLP(64, 32, 10, depth=2, activation="tanh")(torch.zeros(5, 64)).shape
    torch.Size([5, 10])
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, depth: int = 1, activation: str = "relu") -> None:
        super().__init__()
        for name, size in (("inputs", inputs), ("hidden", hidden), ("outputs", outputs), ("depth", depth)):
            if size < 1:
                raise out_of_range(name, size, low=1)
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.inputs, self.hidden, self.outputs, self.depth = inputs, hidden, outputs, depth
        self.activation = activation
        sizes = [inputs, *[hidden] * depth, outputs]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(sizes))
        for index in range(depth):
            self.register_buffer(f"gate{index}", torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inputs) to (B, outputs), unnormalised."""
        activate = ACTIVATIONS[self.activation]
        for index in range(self.depth):
            x = activate(self.layers[index](x)) * getattr(self, f"gate{index}")
        last = self.layers[self.depth]
        assert isinstance(last, nn.Linear)
        # A few outputs times a batch is far quicker stacked than a batch times a few outputs, and so is its softmax.
        return (last.weight @ x.mT).mT + last.bias


def initial_parameters(
    mlp: MLP, rng: np.random.Generator, width: int, scale: float, features: int | None = None
) -> tuple[Arrays, Arrays]:
    """Draws initial parameters and gates of an MLP of which only the first ``width`` units per layer are active.

    The draw is that of ``torch.nn.Linear``, uniform in +-1/sqrt(fan_in), where fan_in counts active inputs only.
    Weights are multiplied by ``scale``; biases by ``min(scale, 1)``, so that a small initialisation is small in
    every respect while a large one does not shift the activations. Weights and biases that touch an inactive unit
    are zero. They get no gradient, so they stay zero, and norms over all parameters are those of a network that
    really has ``width`` units.

    Args:
        mlp: the network; it is read, not changed.
        rng: source of the draw.
        width: active units of each hidden layer, in [1, mlp.hidden].
        scale: factor of the weights, > 0.
        features: input features in use, in [1, mlp.inputs], when later ones are padding; None is all of them.

    Returns:
        Parameters and buffers by name, float32, in the shapes and the order of the network's own.

    Raises:
        RangeError: when the width or the number of features does not fit the network.

    >>> parameters, buffers = initial_parameters(MLP(4, 8, 2), np.random.default_rng(0), width=3, scale=1.0)
    >>> parameters["layers.0.weight"].shape, buffers["gate0"].tolist()
    ((8, 4), [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    """
    features = mlp.inputs if features is None else features
    if not 1 <= width <= mlp.hidden:
        raise out_of_range("width", width, 1, mlp.hidden)
    if not 1 <= features <= mlp.inputs:
        raise out_of_range("features", features, 1, mlp.inputs)
    full = [mlp.inputs, *[mlp.hidden] * mlp.depth, mlp.outputs]
    active = [features, *[width] * mlp.depth, mlp.outputs]
    parameters: Arrays = {}
    for index in range(mlp.depth + 1):
        fan_in, fan_out = active[index], active[index + 1]
        bound = 1 / math.sqrt(fan_in)
        weight = np.zeros((full[index + 1], full[index]), dtype=np.float32)
        # A padded input is a constant zero, whose weight never moves: zero as well.
        weight[:fan_out, :fan_in] = (2 * rng.random((fan_out, fan_in), dtype=np.float32) - 1) * (bound * scale)
        bias = np.zeros(full[index + 1], dtype=np.float32)
        bias[:fan_out] = (2 * rng.random(fan_out, dtype=np.float32) - 1) * (bound * min(scale, 1.0))
        parameters[f"layers.{index}.weight"], parameters[f"layers.{index}.bias"] = weight, bias
    gate = (np.arange(mlp.hidden) < width).astype(np.float32)
    return parameters, {f"gate{index}": gate.copy() for index in range(mlp.depth)}
