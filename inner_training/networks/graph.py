"""A two-layer graph convolution, and its initial values for any width."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.errors import out_of_range
from trimtab.inner_training.networks.seeding import Arrays


class GraphConvolution(nn.Module):
    """Classifies the nodes of one graph: ``A relu(A X W0 + b0) W1 + b1`` (Kipf & Welling, arXiv 1609.02907, eq. 9).

    The graph lies in buffers, so that each run has its own: ``adjacency`` (nodes, nodes), symmetric and normalised (see
    ``normalised_adjacency``), and ``features`` (nodes, features). Nodes beyond those of the graph are padding: rows and
    columns of zeros. A float buffer ``gate0`` (hidden,) is multiplied onto the hidden layer; 1 is an active unit.

    Attributes:
        nodes: most nodes of a graph.
        inputs: features of a node.
        hidden: units of the hidden layer.
        outputs: number of classes.

    Raises:
        RangeError: when a size is below 1.

    >>> GraphConvolution(nodes=9, inputs=4, hidden=8, outputs=3)(torch.tensor([[0], [5]])).shape
    torch.Size([2, 3])
    """

    adjacency: Tensor
    features: Tensor
    gate0: Tensor

    def __init__(self, nodes: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        for name, size in (("nodes", nodes), ("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
            if size < 1:
                raise out_of_range(name, size, low=1)
        self.nodes, self.inputs, self.hidden, self.outputs = nodes, inputs, hidden, outputs
        self.first, self.second = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.register_buffer("adjacency", torch.eye(nodes))
        self.register_buffer("features", torch.zeros(nodes, inputs))
        self.register_buffer("gate0", torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Maps node numbers (B, 1), int64 in [0, nodes), to (B, outputs), unnormalised."""
        hidden = torch.relu(self.adjacency @ (self.features @ self.first.weight.mT) + self.first.bias) * self.gate0
        # A few outputs times many nodes is far quicker stacked than the reverse; the adjacency is its own transpose.
        every = (self.second.weight @ hidden.mT) @ self.adjacency
        # A product with zeros and ones in place of an index, whose gradient is a product too and not a scattered sum.
        asked = (torch.arange(self.nodes, device=x.device)[:, None] == x[:, 0]).to(every.dtype)
        return (every @ asked).mT + self.second.bias


def normalised_adjacency(edges: np.ndarray) -> np.ndarray:
    """``D^(-1/2) (A + I) D^(-1/2)``, where D are the degrees of A + I (Kipf & Welling, arXiv 1609.02907, section 2.2).

    Args:
        edges: (n, n) bool, symmetric, without self-loops.

    Returns:
        (n, n) float32; its largest eigenvalue is 1.

    >>> normalised_adjacency(np.array([[False, True], [True, False]])).tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """
    looped = edges + np.eye(len(edges))
    root = np.sqrt(looped.sum(0))
    normalised: np.ndarray = looped / np.outer(root, root)
    return normalised.astype(np.float32)


def initial_graph_parameters(
    module: GraphConvolution, rng: np.random.Generator, width: int, scale: float
) -> tuple[Arrays, np.ndarray]:
    """Draws initial parameters of which only the first ``width`` hidden units are active.

    Weights are uniform in +-sqrt(6 / (fan_in + fan_out)), as in the paper (Glorot & Bengio, AISTATS 2010), times ``scale``;
    biases are zero. Weights of an inactive unit are zero and stay zero.

    Args:
        module: the network; it is read, not changed.
        rng: source of the draw.
        width: active hidden units, in [1, module.hidden].
        scale: factor of the weights, > 0.

    Returns:
        Parameters by name, float32, and the gate (hidden,).

    Raises:
        RangeError: when the width does not fit the network.
    """
    if not 1 <= width <= module.hidden:
        raise out_of_range("width", width, 1, module.hidden)
    gate = (np.arange(module.hidden) < width).astype(np.float32)

    def weights(outputs: int, inputs: int, active: int) -> np.ndarray:
        bound = scale * math.sqrt(6 / active)
        return ((2 * rng.random((outputs, inputs), dtype=np.float32) - 1) * bound).astype(np.float32)

    first = weights(module.hidden, module.inputs, module.inputs + width) * gate[:, None]
    second = weights(module.outputs, module.hidden, width + module.outputs) * gate
    return {
        "first.weight": first,
        "first.bias": np.zeros(module.hidden, dtype=np.float32),
        "second.weight": second,
        "second.bias": np.zeros(module.outputs, dtype=np.float32),
    }, gate
