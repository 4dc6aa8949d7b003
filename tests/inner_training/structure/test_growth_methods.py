"""Growth methods against loops, and against what they claim."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.inner_training.structure import tiny
from tests.inner_training.structure.test_growth import born, gated, with_newborns
from trimtab.inner_training.structure.copying_growth import SPLIT_STEP
from trimtab.inner_training.structure.evidence import Evidence
from trimtab.inner_training.structure.growth import GROWTH
from trimtab.inner_training.structure.newborns import grown, parked
from trimtab.inner_training.structure.splitting import second_derivative, split_matrices, steepest_splits


@pytest.mark.parametrize("seed", range(3))
def test_net2wider_shares_the_columns_of_its_donors(seed: int) -> None:
    evidence = replace(tiny.evidence_of(seed), alive=torch.tensor([True, False, True, True, False]))
    one = born("net2wider", evidence, 12, seed)
    assert one.donors is not None and one.donor_columns is not None
    donors, columns = one.donors.tolist(), evidence.read("weights_out")
    assert set(donors) == {0, 2, 3}
    for unit in range(5):
        copies = [index for index, donor in enumerate(donors) if donor == unit]
        total = one.donor_columns[unit] * columns[unit] + one.columns[copies].sum(0)
        torch.testing.assert_close(total, columns[unit])
        for index in copies:
            assert torch.equal(one.rows[index], evidence.read("weights_in")[unit])
            assert torch.equal(one.bias[index], evidence.read("bias")[unit])
            share = (one.columns[index] / columns[unit]).mean().item() * (len(copies) + 1)
            assert 0.9 <= share <= 1.1
        if len(copies) > 1:
            assert not torch.equal(one.columns[copies[0]], one.columns[copies[1]])


def test_pairs_oppose_each_other_and_a_lone_unit_is_silent() -> None:
    one = born("pairing", tiny.evidence_of(1), 5)
    assert torch.equal(one.rows[0], one.rows[1]) and torch.equal(one.columns[2], -one.columns[3])
    assert (one.columns[:4] != 0).all() and (one.columns[4] == 0).all() and (one.rows[4] != 0).all()
    fewer = GROWTH["pairing"].make(tiny.evidence_of(1), 4, torch.Generator().manual_seed(0), torch.tensor(3))
    assert (fewer.columns[:2] != 0).all() and (fewer.columns[2:] == 0).all()


def test_gradmax_columns_give_the_rows_the_largest_gradient() -> None:
    """In the real network with a relu, against random columns of the same norms, and against the singular values."""
    network, evidence = tiny.make(2), tiny.evidence_of(2)
    norm = evidence.read("weights_out").norm(dim=1).mean()

    def pull(columns: Tensor, bias: Tensor) -> Tensor:
        made = replace(born("gradmax", evidence, len(columns)), columns=columns, bias=bias)
        after = with_newborns(network, evidence, made)
        return tiny.unflat(after, tiny.gradient(after)).rows[5:].norm(dim=1)

    best = born("gradmax", evidence, 3)
    torch.testing.assert_close(best.columns @ best.columns.T, norm**2 * torch.eye(3), atol=1e-4, rtol=1e-4)
    found = pull(best.columns, best.bias)
    values = torch.linalg.svdvals(evidence.read("bypass"))
    torch.testing.assert_close(found.float(), values * norm, rtol=1e-3, atol=1e-5)
    rng = torch.Generator().manual_seed(0)
    for _ in range(50):
        other = torch.linalg.qr(torch.randn(4, 4, generator=rng)).Q[:3] * norm
        assert pull(other, best.bias).square().sum() <= found.square().sum() * (1 + 1e-4)
    assert (pull(best.columns, torch.zeros(3)) == 0).all()  # without the bias above the kink of relu


def test_gradmax_beyond_the_rank_of_its_gradient() -> None:
    evidence = tiny.evidence_of(3)
    flat = evidence.read("bypass")[:, :1] @ torch.tensor([[1.0, 2.0, -1.0]])
    one = born("gradmax", replace(evidence, bypass=flat), 6)
    assert one.present.all()
    torch.testing.assert_close(one.columns.norm(dim=1), evidence.read("weights_out").norm(dim=1).mean().expand(6))
    cosine = functional.normalize(one.columns, dim=1) @ functional.normalize(flat[:, 0], dim=0)
    torch.testing.assert_close(cosine.abs(), torch.ones(6))  # nothing is wasted on directions without a gradient
    full = born("gradmax", evidence, 20)
    assert len({tuple(column) for column in full.columns.tolist()}) == 20
    assert not born("gradmax", replace(evidence, bypass=torch.zeros(4, 3))).present.any()


@pytest.mark.parametrize("seed", range(5))
def test_gradmax_units_stay_open_and_lower_the_loss(seed: int) -> None:
    """One step of the newborn alone, under relu, takes about as much off the loss as its gradient promises."""
    network, evidence = tiny.make(seed), tiny.evidence_of(seed)
    columns = evidence.read("next_grad")
    one = born("gradmax", evidence, 3)
    assert ((one.columns @ columns) <= 1e-6).all()
    after = with_newborns(network, evidence, one)
    slope = tiny.unflat(after, tiny.gradient(after))
    assert after.bias is not None and slope.bias is not None
    stepped = replace(
        after,
        rows=torch.cat([after.rows[:5], after.rows[5:] - 1e-3 * slope.rows[5:]]),
        bias=torch.cat([after.bias[:5], after.bias[5:] - 1e-3 * slope.bias[5:]]),
    )
    assert stepped.loss() < after.loss()


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_a_split_lowers_the_loss_by_what_its_eigenvalue_says(activation: str) -> None:
    network, evidence = tiny.make(4, activation), tiny.evidence_of(4, activation)
    step = SPLIT_STEP * float(evidence.read("weights_in").norm(dim=1).mean())
    values, vectors = steepest_splits(evidence.read("split"))
    assert (values < 0).sum() >= 3
    order = values.argsort().tolist()
    single = born("splitting", evidence, 1)
    assert single.donors is not None and single.donors.tolist() == [order[0]]
    half = 0.5 * evidence.read("weights_out")[order[0]]
    assert torch.equal(single.columns[0], half)
    rows, _, columns = grown(evidence, single)
    torch.testing.assert_close(rows[order[0]] - rows[5], 2 * step * vectors[order[0]], rtol=1e-3, atol=1e-6)
    assert torch.equal(columns[order[0]], half)
    fall = with_newborns(network, evidence, single).loss() - network.loss()
    assert fall.item() == pytest.approx(0.5 * step**2 * values[order[0]].item(), rel=0.05)
    three = born("splitting", evidence, 3)
    assert three.donors is not None and three.donors.tolist() == order[:3]
    lowest = replace(evidence, split=evidence.read("split").abs() * 0 + torch.eye(3))
    assert not born("splitting", lowest).present.any()


def test_splitting_matrices_by_hand() -> None:
    network, total = tiny.make(5, "tanh"), torch.zeros(5, 3, 3, dtype=torch.float64)
    for one in network.examples():
        z = one.before(one.inputs)
        g = (one.outputs() - one.targets)[0] @ one.columns.T
        for j in range(5):
            for s in range(3):
                t = z[0, j, s].tanh()
                x = one.inputs[0, :, s]
                total[j] += g[j] * one.places[s] * (-2 * t * (1 - t**2)) * torch.outer(x, x) / 6
    torch.testing.assert_close(tiny.gather(network).read("split"), total.float())
    values, vectors = steepest_splits(total)
    for j in range(5):
        torch.testing.assert_close(total[j] @ vectors[j], values[j] * vectors[j])
        assert values[j] <= torch.linalg.eigvalsh(total[j])[0] + 1e-9
    g = torch.ones(7, 2, 6, 5, 1)
    assert split_matrices(g, g, torch.ones(7, 2, 6, 4, 1)[:, :, :, :, :]).shape == (7, 2, 5, 4, 4)


def test_bends_of_activations() -> None:
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    sigmoid = torch.sigmoid(3 * z)
    torch.testing.assert_close(second_derivative(torch.relu, z), 3 * sigmoid * (1 - sigmoid))
    torch.testing.assert_close(second_derivative(torch.tanh, z), -2 * z.tanh() * (1 - z.tanh() ** 2))
    assert (second_derivative(lambda x: 2 * x, z) == 0).all()
    assert (second_derivative(functional.leaky_relu, z) == 0).all()


def test_nest_joins_what_misses_a_connection_most() -> None:
    network, evidence = tiny.make(6), tiny.evidence_of(6)
    bypass = evidence.read("bypass")
    one = born("nest", evidence, 4)
    order = bypass.abs().flatten().argsort(descending=True)[:4].tolist()
    for index, place in enumerate(order):
        output, source = divmod(place, 3)
        assert one.rows[index].nonzero().flatten().tolist() == [source]
        assert one.columns[index].nonzero().flatten().tolist() == [output]
        product = one.rows[index, source] * one.columns[index, output]
        assert product.sign() == -bypass[output, source].sign()
    for made, field in ((one.rows, "weights_in"), (one.columns, "weights_out")):
        sizes = made[made != 0].abs()
        assert sizes.mean().item() == pytest.approx(evidence.read(field).abs().mean().item(), rel=1e-4)
        torch.testing.assert_close(sizes.square() / sizes[0] ** 2, bypass.abs().flatten()[order] / bypass.abs().max())
    assert {float(sign) for seed in range(9) for sign in born("nest", evidence, 1, seed).rows.sum(1).sign()} == {
        -1.0,
        1.0,
    }
    linear = replace(network, activation="tanh")
    small = replace(born("nest", tiny.gather(linear)), bias=torch.zeros(3))
    small = replace(small, rows=0.01 * small.rows, columns=0.01 * small.columns)
    assert with_newborns(linear, tiny.gather(linear), small).loss() < linear.loss()


@pytest.mark.parametrize("seed", range(4))
def test_inactive_units_are_woken_in_the_order_of_their_scores(seed: int) -> None:
    network = gated(seed)
    evidence = tiny.gather(network)
    assert network.bias is not None
    open_gates = replace(network, alive=None)
    frequency = (open_gates.hidden(network.inputs) > 0.05).double().mean((0, 2))
    gains = []
    for unit in (2, 4, 5):  # what a unit of length 1 takes off the loss, by a small gate
        parts = torch.cat([network.rows[unit], network.bias[unit, None], network.columns[unit]])
        gate = network.gate.index_fill(0, torch.tensor(unit), 1e-6)
        gains.append(-(replace(network, alive=gate).loss() - network.loss()).item() / parts.square().sum().item())
    expected = {
        "activation-frequency": [frequency[unit].item() for unit in (2, 4, 5)],
        "agf": gains,
        "gradient": [
            torch.cat([evidence.read("grad_in")[u], evidence.read("grad_out")[u], evidence.read("grad_bias")[u, None]]).norm().item()
            for u in (2, 4, 5)
        ],
    }  # fmt: skip
    for name, scores in expected.items():
        one = born(name, evidence, 2)
        assert one.chosen is not None
        best = sorted(zip(scores, (2, 4, 5), strict=True), key=lambda pair: (-pair[0], pair[1]))
        assert one.chosen.tolist() == [unit for _, unit in best[:2]], name
        assert torch.equal(one.rows, evidence.read("weights_in")[one.chosen])
        assert torch.equal(one.bias, evidence.read("bias")[one.chosen])
        assert torch.equal(one.columns, evidence.read("weights_out")[one.chosen])
    drawn = {tuple(born("random-parked", evidence, 1, seed).chosen.tolist()) for seed in range(30)}
    assert drawn == {(2,), (4,), (5,)}


def test_woken_units_take_their_own_places() -> None:
    network = gated(5)
    evidence = tiny.gather(network)
    chosen = torch.tensor([4, -1])
    rows, bias, columns = grown(evidence, parked(evidence, chosen, chosen >= 0))
    awake = replace(network, alive=network.gate.index_fill(0, torch.tensor(4), 1.0))
    after = replace(network, rows=rows.double(), bias=bias.double(), columns=columns.double(), alive=None)
    torch.testing.assert_close(after.outputs(), awake.outputs(), rtol=1e-5, atol=1e-5)
    assert (rows[6:] == 0).all() and (rows[[2, 5]] == 0).all()


def test_recruiting_asks_for_a_fall_of_the_loss() -> None:
    """A unit that would raise it comes last, however large its effect."""
    evidence = Evidence(
        alive=torch.tensor([False, False, False]), weights_in=torch.ones(3, 1), weights_out=torch.ones(3, 1),
        signed=torch.tensor([5.0, -0.1, 0.0]),
    )  # fmt: skip
    one = born("agf", evidence, 3)
    assert one.chosen is not None and one.chosen.tolist() == [1, 2, 0]
