"""Every criterion against loops, and against what it claims to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import Tensor

from tests.inner_training.structure import tiny
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.evidence import Evidence, averaged

Rows = list[list[float]]
SIZES = range(5), range(3), range(4)  # units, inputs, outputs


def lamp(values: list[float]) -> list[float]:
    return [one**2 / sum(other**2 for other in values if abs(other) >= abs(one)) for one in values]


def ria(w: Rows, x: list[float]) -> Rows:
    return [
        [
            (abs(w[j][i]) / sum(map(abs, w[j])) + abs(w[j][i]) / sum(abs(w[k][i]) for k in SIZES[0])) * x[i] ** 0.5
            for i in SIZES[1]
        ]
        for j in SIZES[0]
    ]


def over_mean(values: list[float]) -> list[float]:
    return [value / mean(values) for value in values]


def taken(network: tiny.Network) -> dict[str, list[float]]:
    """mean |h|, standard deviation of h, share above 0.05, mean |dL/dz|, and AGF of each unit, entry by entry."""
    found: dict[str, list[float]] = {name: [] for name in ("size", "spread", "often", "pull", "agf", "taylor")}
    for j in SIZES[0]:
        h: list[float] = []
        pull: list[float] = []
        products: list[list[float]] = []
        for one in network.examples():
            z = one.before(one.inputs).detach().requires_grad_()
            out = tiny.ACTIVATIONS[one.activation](z)
            error = torch.einsum("bus,s,uo->bo", out, one.places, one.columns) + one.shift - one.targets
            by_out, by_z = torch.autograd.grad(0.5 * error.square().sum(), (out, z))
            h += out[0, j].tolist()
            pull += by_z[0, j].tolist()
            products.append([a * b for a, b in zip(out[0, j].tolist(), by_out[0, j].tolist(), strict=True)])
        found["size"].append(mean(map(abs, h)))
        found["spread"].append(mean((value - mean(h)) ** 2 for value in h) ** 0.5)
        found["often"].append(mean(value > 0.05 for value in h))
        found["pull"].append(mean(map(abs, pull)))
        found["agf"].append(mean(sum(map(abs, product)) for product in products))
        found["taylor"].append(mean(abs(sum(product)) for product in products))
    return found


def by_hand(network: tiny.Network) -> dict[str, list[float]]:
    """Scores of units, one by one."""
    w, v = network.rows.tolist(), network.columns.tolist()
    b = [0.0] * 5 if network.bias is None else network.bias.tolist()
    grads = tiny.unflat(network, tiny.gradient(network))
    g, gb = grads.rows.tolist(), [0.0] * 5 if grads.bias is None else grads.bias.tolist()
    curve = tiny.hessian(network)
    bend = tiny.unflat(network, curve.diagonal()).rows.tolist()
    flow = tiny.unflat(network, curve @ tiny.gradient(network))
    hg, hgb = flow.rows.tolist(), [0.0] * 5 if flow.bias is None else flow.bias.tolist()
    x = [mean(value**2 for value in network.inputs[:, i].flatten().tolist()) ** 0.5 for i in SIZES[1]]
    seen = taken(network)
    leaving = [mean(map(abs, v[j])) for j in SIZES[0]]
    length = [sum(e**2 for e in [*w[j], *v[j], b[j]]) for j in SIZES[0]]
    signed = [sum(v[j][o] * grads.columns[j, o].item() for o in SIZES[2]) for j in SIZES[0]]  # E h g = V . dL/dV
    return {
        "magnitude": [sum(e**2 for e in row) ** 0.5 for row in w],
        "magnitude-l1": [mean(map(abs, row)) for row in w],
        "lamp": lamp([sum(e**2 for e in row) ** 0.5 for row in w]),
        "taylor": seen["taylor"],
        "taylor-weights": [sum((w[j][i] * g[j][i]) ** 2 for i in SIZES[1]) + (b[j] * gb[j]) ** 2 for j in SIZES[0]],
        "taylor-second": [
            sum((-w[j][i] * g[j][i] + 0.5 * w[j][i] ** 2 * bend[j][i]) ** 2 for i in SIZES[1]) for j in SIZES[0]
        ],
        "snip": [sum(abs(w[j][i] * g[j][i]) for i in SIZES[1]) + abs(b[j] * gb[j]) for j in SIZES[0]],
        "grasp": [sum(w[j][i] * hg[j][i] for i in SIZES[1]) + b[j] * hgb[j] for j in SIZES[0]],
        "wanda": [sum(abs(w[j][i]) * x[i] for i in SIZES[1]) for j in SIZES[0]],
        "ria": [sum(row) for row in ria(w, x)],
        "activation-frequency": seen["often"],
        "redo": over_mean(seen["size"]),
        "grama": over_mean(seen["pull"]),
        "cbp": [seen["size"][j] * leaving[j] for j in SIZES[0]],
        "cbp-adaptable": [seen["spread"][j] * leaving[j] / mean(map(abs, w[j])) for j in SIZES[0]],
        "agf": seen["agf"],
        "agf-first": seen["agf"],
        "kunin": [-signed[j] / length[j] for j in SIZES[0]],
    }


ELSEWHERE = {"random", "obd", "obs", "synflow"}  # below, and in test_brain_surgeon.py


@pytest.mark.parametrize("activation", tiny.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_units_by_hand(activation: str, bias: bool) -> None:
    network, evidence = tiny.make(0, activation, bias), tiny.evidence_of(0, activation, bias)
    expected = by_hand(network)
    assert set(expected) == set(CRITERIA) - ELSEWHERE
    for name, scores in expected.items():
        found = CRITERIA[name].score(evidence, torch.Generator())
        torch.testing.assert_close(found, torch.tensor(scores), rtol=2e-4, atol=1e-6, msg=name)


def test_weights_by_hand() -> None:
    network, evidence = tiny.make(1), tiny.evidence_of(1)
    w, g = network.rows.tolist(), tiny.unflat(network, tiny.gradient(network)).rows.tolist()
    x = evidence.read("input_norm").tolist()
    flat = lamp([value for row in w for value in row])
    expected: dict[str, Rows] = {
        "magnitude": [[abs(value) for value in row] for row in w],
        "lamp": [flat[3 * j : 3 * j + 3] for j in SIZES[0]],
        "taylor": [[(w[j][i] * g[j][i]) ** 2 for i in SIZES[1]] for j in SIZES[0]],
        "snip": [[abs(w[j][i] * g[j][i]) for i in SIZES[1]] for j in SIZES[0]],
        "wanda": [[abs(w[j][i]) * x[i] for i in SIZES[1]] for j in SIZES[0]],
        "ria": ria(w, x),
    }
    for name, scores in expected.items():
        found = CRITERIA[name].weight_score(evidence, torch.Generator())
        torch.testing.assert_close(found, torch.tensor(scores), rtol=1e-4, atol=1e-6, msg=name)
    assert CRITERIA["wanda"].within == "row" and CRITERIA["ria"].within == "layer"


def shrunk(network: tiny.Network, unit: int, by: float) -> tiny.Network:
    """Row and bias of a unit, ``by`` of them taken away."""
    factor = torch.ones(5, dtype=torch.float64).index_fill(0, torch.tensor(unit), 1 - by)
    assert network.bias is not None
    return replace(network, rows=factor[:, None] * network.rows, bias=factor * network.bias)


def slope(function: Callable[[float], Tensor], step: float = 1e-5) -> float:
    return float((function(step) - function(-step)) / (2 * step))


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_grasp_is_the_fall_of_the_gradient_flow(activation: str) -> None:
    """A unit of a high score takes the most off |g|^2 as it shrinks, so it is kept: the sign that is easily lost."""
    network = tiny.make(2, activation)
    scores = CRITERIA["grasp"].score(tiny.gather(network), torch.Generator())

    def flow(unit: int, by: float) -> Tensor:
        return tiny.gradient(shrunk(network, unit, by)).square().sum()

    falls = torch.tensor([-slope(lambda by, unit=unit: flow(unit, by)) / 2 for unit in SIZES[0]])
    torch.testing.assert_close(scores, falls, rtol=1e-3, atol=1e-4)
    assert falls.min() < 0 < falls.max()


def test_snip_is_the_slope_of_the_loss_in_each_connection() -> None:
    network = tiny.make(3, "tanh")
    found = CRITERIA["snip"].weight_score(tiny.gather(network), torch.Generator())
    for j in SIZES[0]:
        for i in SIZES[1]:

            def loss(by: float, j: int = j, i: int = i) -> Tensor:
                mask = torch.ones_like(network.rows)
                mask[j, i] += by
                return replace(network, rows=mask * network.rows).loss()

            assert found[j, i].item() == pytest.approx(abs(slope(loss)), rel=1e-3, abs=1e-6)


def test_second_order_taylor_is_the_loss_of_one_weight_less() -> None:
    network = tiny.make(4, "tanh")
    small = replace(network, rows=0.01 * network.rows)
    found = CRITERIA["taylor-second"].weight_score(tiny.gather(small), torch.Generator())
    first = CRITERIA["taylor"].weight_score(tiny.gather(small), torch.Generator())
    exact = torch.empty(5, 3)
    for j in SIZES[0]:
        for i in SIZES[1]:
            mask = torch.ones_like(network.rows)
            mask[j, i] = 0
            exact[j, i] = (replace(small, rows=mask * small.rows).loss() - small.loss()).square()
    assert (found - exact).abs().sum() < 0.05 * (first - exact).abs().sum()
    torch.testing.assert_close(found, exact, rtol=0.05, atol=1e-9)


def test_obd_is_a_loop_over_examples() -> None:
    network = tiny.make(5)
    assert network.bias is not None
    expected = torch.zeros(5, 4, dtype=torch.float64)
    for one in network.examples():
        of_one = tiny.unflat(one, tiny.gradient(one))
        assert of_one.bias is not None
        squares = torch.cat([of_one.rows, of_one.bias[:, None]], 1).square()
        expected += 0.5 * torch.cat([network.rows, network.bias[:, None]], 1).square() * squares / 6
    evidence = tiny.gather(network)
    torch.testing.assert_close(CRITERIA["obd"].score(evidence, torch.Generator()), expected.sum(1).float())
    torch.testing.assert_close(CRITERIA["obd"].weight_score(evidence, torch.Generator()), expected[:, :3].float())


def test_obd_keeps_every_example_and_not_the_last_one() -> None:
    """Gradients 1, 2 and 3 give 14/3; an accumulator that overwrites gives 9, and the square of the mean 4."""
    ones = torch.ones(1, 1)
    evidence = averaged(Evidence(weights_in=ones, square_in=ones * gradient**2) for gradient in (1, 2, 3))
    assert CRITERIA["obd"].score(evidence, torch.Generator()).item() == pytest.approx(14 / 3 / 2)
    network = tiny.make(6)
    parts = [tiny.gather(one) for one in network.examples()]
    found = CRITERIA["obd"].score(averaged(parts), torch.Generator())
    torch.testing.assert_close(found, CRITERIA["obd"].score(tiny.gather(network), torch.Generator()))
    last = CRITERIA["obd"].score(parts[-1], torch.Generator())
    assert ((found - last).abs() > 0.1 * found).any()


def test_synflow_by_hand() -> None:
    network, ones = tiny.make(7), torch.ones(1, 3, 3, dtype=torch.float64)
    assert network.bias is not None
    positive = replace(network, rows=network.rows.abs(), bias=network.bias.abs(), columns=network.columns.abs(), places=network.places.abs())  # fmt: skip
    weights = CRITERIA["synflow"].weight_score(tiny.gather(network), torch.Generator())
    for j in SIZES[0]:
        for i in SIZES[1]:

            def total(by: float, j: int = j, i: int = i) -> Tensor:
                mask = torch.ones_like(network.rows)
                mask[j, i] += by
                return replace(positive, rows=mask * positive.rows).outputs(ones).sum()

            assert weights[j, i].item() == pytest.approx(slope(total), rel=1e-4)


@pytest.mark.parametrize("unit", SIZES[0])
def test_kunin_is_the_utility_of_a_unit_of_length_one(unit: int) -> None:
    """E<f_i, r> of the unit alone, at length 1, against the residual of the network."""
    network = tiny.make(8)
    assert network.bias is not None
    found = CRITERIA["kunin"].score(tiny.gather(network), torch.Generator())[unit]
    parts = torch.cat([network.rows[unit], network.bias[unit, None], network.columns[unit]])
    row, bias, column = (parts / parts.norm()).split([3, 1, 4])
    alone = replace(network, rows=row[None], bias=bias, columns=column[None], shift=torch.zeros(4, dtype=torch.float64))
    residual = network.targets - network.outputs()
    assert found.item() == pytest.approx((alone.outputs() * residual).sum(-1).mean().item(), rel=1e-4)
