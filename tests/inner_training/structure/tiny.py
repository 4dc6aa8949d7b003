"""A network with one group of units, and everything there is to know about it, gathered slowly.

Its outputs are weighted sums over places, with weights of both signs, so that h g differs in sign from place to place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.splitting import second_derivative, split_matrices

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
}


PLACES = torch.tensor([0.9, -0.5, 0.3], dtype=torch.float64)


@dataclass(frozen=True)
class Network:
    """Units that see S places of each example. All of it is float64.

    Attributes:
        rows, bias, columns, shift: (U, I), (U,), (U, O) and (O,); no bias is None.
        inputs, targets: (B, I, S) and (B, O).
        activation: a name of ``ACTIVATIONS``.
        alive: (U,) float, the gates.
        factor: of the loss.
        places: (S,) weights of the places.
    """

    rows: Tensor
    bias: Tensor | None
    columns: Tensor
    shift: Tensor
    inputs: Tensor
    targets: Tensor
    activation: str = "relu"
    alive: Tensor | None = None
    factor: float = 1.0
    places: Tensor = field(default_factory=lambda: PLACES)

    @property
    def gate(self) -> Tensor:
        return torch.ones(len(self.rows), dtype=torch.float64) if self.alive is None else self.alive

    def before(self, inputs: Tensor) -> Tensor:
        bias = 0.0 if self.bias is None else self.bias[:, None]
        return torch.einsum("ui,bis->bus", self.rows, inputs) + bias

    def hidden(self, inputs: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.before(inputs))

    def outputs(self, inputs: Tensor | None = None) -> Tensor:
        x = self.inputs if inputs is None else inputs
        return torch.einsum("bus,s,u,uo->bo", self.hidden(x), self.places, self.gate, self.columns) + self.shift

    def loss(self) -> Tensor:
        """Half of the squared distance to the targets, mean over examples."""
        return self.factor * 0.5 * (self.outputs() - self.targets).square().sum(-1).mean()

    def examples(self) -> list[Network]:
        return [
            replace(self, inputs=self.inputs[b : b + 1], targets=self.targets[b : b + 1])
            for b in range(len(self.inputs))
        ]


def make(seed: int = 0, activation: str = "relu", bias: bool = True, units: int = 5, outputs: int = 4) -> Network:
    """A random network of 3 inputs and 6 examples, not at a minimum of its loss."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    return Network(
        draw(units, 3), 0.5 * draw(units) if bias else None, draw(units, outputs), draw(outputs), draw(6, 3, len(PLACES)),
        draw(6, outputs), activation,
    )  # fmt: skip


def flat(network: Network) -> Tensor:
    """Rows, biases and columns in one vector."""
    parts = [network.rows, network.columns] if network.bias is None else [network.rows, network.columns, network.bias]
    return torch.cat([part.flatten() for part in parts])


def unflat(network: Network, vector: Tensor) -> Network:
    rows, columns, bias = vector.split([network.rows.numel(), network.columns.numel(), vector.numel() - network.rows.numel() - network.columns.numel()])  # fmt: skip
    return replace(network, rows=rows.reshape(network.rows.shape), columns=columns.reshape(network.columns.shape),
                   bias=None if network.bias is None else bias)  # fmt: skip


def gradient(network: Network) -> Tensor:
    """Of the loss with respect to ``flat``."""
    at = flat(network).requires_grad_()
    (found,) = torch.autograd.grad(unflat(network, at).loss(), at)
    return found


def hessian(network: Network) -> Tensor:
    found = torch.autograd.functional.hessian(lambda at: unflat(network, at).loss(), flat(network))
    assert isinstance(found, Tensor)
    return found


def _named(network: Network, vector: Tensor, prefix: str) -> dict[str, Tensor]:
    parts = unflat(network, vector)
    named = {f"{prefix}_in": parts.rows, f"{prefix}_out": parts.columns}
    return named if parts.bias is None or prefix == "hess" else {**named, f"{prefix}_bias": parts.bias}


def _activity(network: Network) -> dict[str, Tensor]:
    """Sums over examples, one at a time, of what the units do."""
    total: dict[str, Tensor] = {}
    for one in network.examples():
        z = one.before(one.inputs).detach().requires_grad_()
        h = ACTIVATIONS[one.activation](z)
        # The value is that of the gated network, the gradient that of open gates.
        gate = one.gate[:, None]
        passed = gate * h + (1 - gate) * (h - h.detach())
        outputs = torch.einsum("bus,s,uo->bo", passed, one.places, one.columns) + one.shift
        loss = one.factor * 0.5 * (outputs - one.targets).square().sum()
        g, by_z = torch.autograd.grad(loss, (h, z), retain_graph=True)
        (missing,) = torch.autograd.grad(loss, outputs)
        x, h, g, by_z = one.inputs[0], h.detach()[0], g[0], by_z[0]
        places = x.shape[-1]
        bends = second_derivative(ACTIVATIONS[one.activation], z.detach()[0])
        found = {
            "mean_abs": h.abs().mean(-1), "mean": h.mean(-1), "square": h.square().mean(-1),
            "active": (h > 0.05).double().mean(-1), "agf": (h * g).abs().sum(-1), "taylor": (h * g).sum(-1).abs(),
            "signed": (h * g).sum(-1), "pre_grad": by_z.abs().mean(-1), "input_square": x.square().mean(-1),
            "input_cov": x @ x.T / places, "output_cov": h @ h.T / places,
            "bypass": missing[0][:, None] * (x @ one.places), "next_grad": missing[0] * one.places.sum(), "grad_out": (h @ one.places)[:, None] * missing[0],
            "grad_in": by_z @ x.T, "grad_bias": by_z.sum(-1), "split": split_matrices(g[None], bends[None], x[None]),
        }  # fmt: skip
        for name, value in found.items():
            total[name] = total.get(name, torch.zeros(())) + value / len(network.inputs)
    total["input_norm"] = total.pop("input_square").sqrt()
    if network.bias is None:
        del total["grad_bias"]
    return total


def _flow(network: Network) -> dict[str, Tensor]:
    ones = torch.ones_like(network.inputs[:1])
    sizes = flat(network).abs().requires_grad_()
    positive = replace(unflat(network, sizes), shift=network.shift.abs(), places=network.places.abs())
    (found,) = torch.autograd.grad(positive.outputs(ones).sum(), sizes)
    parts = _named(network, found, "flow")
    return {name: value for name, value in parts.items() if name != "flow_bias"}


def gather(network: Network) -> Evidence:
    """Every field of the evidence, one batch."""
    squares = torch.stack([gradient(one).square() for one in network.examples()]).mean(0)
    curvature = hessian(network)
    weights = {"weights_in": network.rows, "weights_out": network.columns}
    if network.bias is not None:
        weights["bias"] = network.bias
    activity = _activity(network)
    values = {
        **weights, **activity, "agf_first": activity["agf"], **_named(network, squares, "square"),
        **_named(network, curvature.diagonal(), "hess"), **_named(network, curvature @ gradient(network), "hv"), **_flow(network),
    }  # fmt: skip
    single = {name: value.detach().float() for name, value in values.items()}
    return Evidence(**single, alive=None if network.alive is None else network.alive > 0)


@lru_cache(maxsize=256)
def evidence_of(seed: int = 0, activation: str = "relu", bias: bool = True) -> Evidence:
    """``gather`` of ``make``, once; nobody may write to it."""
    return gather(make(seed, activation, bias))
