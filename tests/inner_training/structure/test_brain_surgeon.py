"""Optimal brain surgeon against exact quadratics, and against removals one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.inner_training.structure import tiny
from trimtab.errors import RangeError
from trimtab.inner_training.structure.brain_surgeon import lost_mean, removal_costs, repair
from trimtab.inner_training.structure.criteria import CRITERIA
from trimtab.inner_training.structure.evidence import Evidence, of_runs


def layer(seed: int, units: int = 6, outputs: int = 3, examples: int = 40) -> tuple[Tensor, Evidence]:
    """Correlated activations (B, U), float64, and what a consumer knows of them."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(units, units, generator=rng, dtype=torch.float64)
    h = (torch.randn(examples, units, generator=rng, dtype=torch.float64) @ mixing).relu()
    weights = torch.randn(units, outputs, generator=rng, dtype=torch.float64)
    moment, mean = h.mT @ h / examples, h.mean(0)
    return h, Evidence(weights_out=weights.float(), output_cov=moment.float(), mean=mean.float())


def change(h: Tensor, before: Tensor, after: Tensor) -> float:
    """Half the mean squared change of what the consumer gives out."""
    return float(0.5 * (h @ (after.double() - before.double())).square().sum(1).mean())


def one_by_one(evidence: Evidence, removed: list[int]) -> tuple[Tensor, float]:
    """Weights and cost by the formulas of the source, with a downdate of the inverse after each removal."""
    inverse, weights = torch.linalg.inv(evidence.read("output_cov").double()), evidence.read("weights_out").double()
    cost = 0.0
    for unit in removed:
        cost += 0.5 * float(weights[unit].square().sum() / inverse[unit, unit])
        weights = weights - inverse[:, unit, None] * weights[unit] / inverse[unit, unit]
        inverse = inverse - inverse[:, unit, None] * inverse[unit] / inverse[unit, unit]
        inverse[unit, unit] = 1.0  # out of the game
    return weights, cost


@pytest.mark.parametrize("seed", range(4))
def test_the_cost_of_a_unit_is_the_exact_change_after_repair(seed: int) -> None:
    h, evidence = layer(seed)
    moment, weights = evidence.read("output_cov"), evidence.read("weights_out")
    costs = removal_costs(moment, torch.ones(6, dtype=torch.bool), weights.square().sum(-1)[None], damping=0.0)[0]
    for unit in range(6):
        removed = torch.arange(6) == unit
        repaired = repair(evidence, removed, damping=0.0)
        assert (repaired[unit] == 0).all()
        exact = change(h, weights, repaired)
        assert costs[unit].item() == pytest.approx(exact, rel=2e-3)
        assert exact < change(h, weights, weights * ~removed[:, None])
        least = torch.linalg.lstsq(h[:, ~removed], h @ weights.double()).solution
        torch.testing.assert_close(repaired[~removed].double(), least, rtol=2e-3, atol=2e-3)


def test_a_removal_of_several_is_that_of_one_after_the_other() -> None:
    h, evidence = layer(9)
    removed = torch.tensor([True, False, True, False, False, True])
    expected, cost = one_by_one(evidence, [2, 5, 0])
    found = repair(evidence, removed, damping=0.0)
    torch.testing.assert_close(found[~removed].double(), expected[~removed], rtol=2e-3, atol=2e-3)
    assert change(h, evidence.read("weights_out"), found) == pytest.approx(cost, rel=5e-3)


def test_scores_are_the_costs() -> None:
    evidence = layer(3)[1]
    found = CRITERIA["obs"].score(evidence, torch.Generator())
    exact = torch.tensor([one_by_one(evidence, [unit])[1] for unit in range(6)])
    assert (found >= exact * 0.99).all() and (found <= exact * 1.5).all()  # damped by a hundredth
    assert torch.equal(found.argsort()[:2], exact.argsort()[:2])
    network = tiny.evidence_of(1)
    weights, moment = network.read("weights_in"), network.read("input_cov").double()
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(3)
    expected = 0.5 * weights.double().square() / torch.linalg.inv(damped).diagonal()
    torch.testing.assert_close(CRITERIA["obs"].weight_score(network, torch.Generator()), expected.float())


def test_twins_cost_nothing_and_one_takes_over_the_other() -> None:
    h = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).relu() @ torch.tensor([[1.0, 2.0]])
    evidence = Evidence(weights_out=torch.tensor([[1.0, -1.0], [3.0, 0.5]]), output_cov=h.mT @ h / 50)
    alone = 0.5 * evidence.read("weights_out").square().sum(1) * evidence.read("output_cov").diagonal()
    assert (CRITERIA["obs"].score(evidence, torch.Generator()) < 0.05 * alone).all()
    found = repair(evidence, torch.tensor([False, True]), damping=1e-6)
    torch.testing.assert_close(found, torch.tensor([[7.0, 0.0], [0.0, 0.0]]), atol=1e-3, rtol=1e-3)


def test_dead_and_inactive_units_neither_cost_nor_help() -> None:
    evidence = layer(4)[1]
    dead = torch.tensor([False, True, False, False, False, False])
    silent = replace(evidence, output_cov=evidence.read("output_cov") * ~dead * ~dead[:, None])
    off = replace(evidence, alive=~dead)
    for one in (silent, off):
        scores = CRITERIA["obs"].score(one, torch.Generator())
        assert scores[1] == 0 and (scores[~dead] > 0).all()
        removed = torch.tensor([True, False, False, False, False, False])
        found = repair(one, removed)
        assert torch.equal(found[1], evidence.read("weights_out")[1])
        assert not torch.equal(found[2], evidence.read("weights_out")[2])
        without = Evidence(
            weights_out=evidence.read("weights_out")[~dead], output_cov=evidence.read("output_cov")[~dead][:, ~dead]
        )
        torch.testing.assert_close(found[~dead], repair(without, removed[~dead]))


def test_runs_side_by_side_and_singular_moments() -> None:
    parts = [layer(seed)[1] for seed in range(3)]
    parts[1] = replace(parts[1], output_cov=torch.zeros(6, 6))
    parts[2] = replace(parts[2], output_cov=torch.ones(6, 6))
    removed = torch.tensor([[True] * 3 + [False] * 3, [True] * 6, [False] * 5 + [True]])
    together = repair(of_runs(parts), removed)
    for index, part in enumerate(parts):
        torch.testing.assert_close(together[index], repair(part, removed[index]))
    assert together.isfinite().all() and (together[1] == 0).all()
    assert repair(of_runs(parts), removed, damping=0.0).isfinite().all()
    with pytest.raises(RangeError, match="damping is -1"):
        repair(parts[0], removed[0], damping=-1)


def test_nothing_removed_changes_nothing() -> None:
    evidence = layer(5)[1]
    found = repair(evidence, torch.zeros(6, dtype=torch.bool))
    assert torch.equal(found, evidence.read("weights_out"))


def test_the_mean_that_is_lost() -> None:
    h, evidence = layer(6)
    removed = torch.tensor([True, False, True, False, False, False])
    lost = h @ (evidence.read("weights_out").double() * removed[:, None])
    torch.testing.assert_close(lost_mean(evidence, removed).double(), lost.mean(0), rtol=1e-5, atol=1e-5)
    alive = replace(evidence, alive=~removed)
    assert (lost_mean(alive, removed) == 0).all()
