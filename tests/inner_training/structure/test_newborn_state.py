"""How newborns begin: their moments, their steps, and their pace."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.inner_training.structure import tiny
from trimtab.errors import RangeError, UnknownNameError
from trimtab.inner_training.structure.evidence import Evidence, of_runs
from trimtab.inner_training.structure.gradient_growth import matched_donors
from trimtab.inner_training.structure.newborn_state import (
    NEWBORN_STATES,
    newborn_speed,
    resolve_newborn_state,
    step_correction,
    two_speed,
)


def test_moments_of_newborns() -> None:
    held, donors = torch.arange(12.0).reshape(2, 3, 2), torch.tensor([[2, -1], [0, 0]])
    expected = torch.stack([torch.stack([held[0, 2], torch.zeros(2)]), held[1, [0, 0]]])
    assert torch.equal(NEWBORN_STATES["transplant"].moments(held, donors), expected)
    for name in ("zero", "fresh-step"):
        assert torch.equal(NEWBORN_STATES[name].moments(held, donors), torch.zeros(2, 2, 2))
    assert [state.own_steps for state in NEWBORN_STATES.values()] == [False, False, True]
    with pytest.raises(UnknownNameError, match="unknown newborn state 'transplnt'; did you mean 'transplant'"):
        resolve_newborn_state("transplnt")


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99), (0.5, 0.95)])
def test_corrected_steps_equal_those_of_a_count_of_ones_own(betas: tuple[float, float]) -> None:
    """Against torch.optim.Adam, born after 40 steps."""
    rng = torch.Generator().manual_seed(0)
    late, young = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    shared = torch.optim.Adam([late], lr=0.1, betas=betas, eps=1e-12)
    fresh = torch.optim.Adam([young], lr=0.1, betas=betas, eps=1e-12)
    for _ in range(40):
        late.grad = torch.zeros(3)
        shared.step()
    for age in range(1, 30):
        gradient = torch.randn(3, generator=rng) + 0.5
        late.grad, young.grad = gradient.clone(), gradient.clone()
        before, other = late.detach().clone(), young.detach().clone()
        shared.step()
        fresh.step()
        factor = step_correction(torch.tensor(float(age)), torch.tensor(40.0 + age), *betas)
        torch.testing.assert_close((late - before) * factor, young - other, rtol=1e-3, atol=1e-6)
    assert step_correction(torch.tensor([1.0, 7.0]), torch.tensor(7.0), 0.9, 0.999)[1] == 1.0


def test_newborns_move_faster_for_a_while_and_the_others_as_they_did() -> None:
    layer = torch.nn.Linear(3, 4)
    faster = copy.deepcopy(layer)
    for one in (layer, faster):
        one(torch.ones(2, 3)).square().sum().backward()
        torch.optim.SGD(one.parameters(), lr=0.0).step()
    before = faster.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    torch.optim.SGD(faster.parameters(), lr=0.5).step()
    age = torch.tensor([0, 3, 8, 9])
    speed = newborn_speed(age, factor=5.0, window=8)
    assert speed.tolist() == [1, 5, 5, 1]
    found = two_speed(before, layer.weight.detach(), speed[:, None])
    assert torch.equal(found[[0, 3]], layer.weight[[0, 3]])
    torch.testing.assert_close(found[[1, 2]], faster.weight.detach()[[1, 2]])
    with pytest.raises(RangeError, match="factor of newborns' steps is 0"):
        newborn_speed(age, factor=0.0)


def test_donors_are_the_incumbents_most_alike() -> None:
    evidence = tiny.evidence_of(2)
    rows, columns = evidence.read("weights_in"), evidence.read("weights_out")
    made = torch.stack([3 * rows[1], -rows[2], torch.zeros(3)])
    found = matched_donors(made, torch.stack([columns[0], columns[0], 0.1 * columns[4]]), evidence)
    cosine = torch.nn.functional.cosine_similarity(made[1], rows, dim=1)
    assert found.tolist() == [1, int(cosine.argmax()), 4]
    alive = torch.tensor([True, False, True, True, True])
    gone = Evidence(weights_in=rows, weights_out=columns, alive=alive)
    assert matched_donors(made, columns[:3], gone)[0] != 1
    none = Evidence(weights_in=rows, weights_out=columns, alive=~alive & alive)
    assert matched_donors(made, columns[:3], none).tolist() == [-1] * 3
    both = of_runs([gone, none])
    found = matched_donors(made.expand(2, 3, 3), columns[:3].expand(2, 3, 4), both)
    assert torch.equal(found[0], matched_donors(made, columns[:3], gone)) and (found[1] == -1).all()
