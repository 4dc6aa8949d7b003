"""The public face: saved states, ages, diagnostics."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure.test_edits import picture
from tests.inner_training.structure.test_gating import assert_held
from tests.inner_training.structure.zoo import OPTIMIZERS, make, mean_square, train
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.structure.diagnostics import effective_rank


def test_a_saved_structure_goes_on_bit_for_bit() -> None:
    """Model, optimizer and structure restored elsewhere train on as the first ones do, newborns with their own steps too."""
    model, example = make("residual")
    chosen = OPTIMIZERS["adamw-amsgrad"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 3)
    structure.grow(0.25, "random", newborn_state="fresh-step")
    train(model, chosen, example, 2)
    structure.mask({"head.weight": torch.rand(model.head.weight.shape) > 0.2})
    file = io.BytesIO()
    torch.save([model.state_dict(), chosen.state_dict(), structure.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    other, _ = make("residual", seed=1)
    other_optimizer = OPTIMIZERS["adamw-amsgrad"](other.parameters())
    resumed = trimtab.gates(other, other_optimizer, example)
    old = resumed.prune(0.1, "magnitude")
    other.load_state_dict(saved[0])
    other_optimizer.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    with pytest.raises(UserError, match="compacted, loaded or rolled back"):
        old.undo()
    for one, optimizer, each in ((model, chosen, structure), (other, other_optimizer, resumed)):
        train(one, optimizer, example, 3)
        each.grow(0.25, "pairing")
        train(one, optimizer, example, 2)
    first, second = picture(model, chosen), picture(other, other_optimizer)
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key], key
    assert {name: steps.tolist() for name, steps in structure.ages.items()} == {
        name: steps.tolist() for name, steps in resumed.ages.items()
    }
    assert_held(resumed, other_optimizer)


def test_a_state_of_another_structure_is_refused() -> None:
    structures = []
    for name in ("residual", "perceptron"):
        model, example = make(name)
        structures.append(trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example))
    with pytest.raises(MismatchError, match="the state is of a structure with the groups"):
        structures[0].load_state_dict(structures[1].state_dict())
    with pytest.raises(MismatchError, match="version 7"):
        structures[0].load_state_dict({**structures[0].state_dict(), "version": 7})


@pytest.mark.parametrize(
    "damage",
    [
        {"active": {"layers.0": torch.ones(8, dtype=torch.int64)}},
        {"active": []},
        {"born": {}},
        {"steps": "7"},
        {"parked": {"elsewhere": torch.zeros(1)}},
        {"cohorts": [["elsewhere", torch.zeros(1), torch.zeros(1)]]},
        {"cohorts": [["0.weight", torch.tensor([10_000]), torch.tensor([1])]]},
        {"draws": None},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict[str, Any]) -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, torch.optim.SGD(model.parameters(), lr=0.1), example)
    structure.prune(0.3, "magnitude")
    before, units = {name: one.clone() for name, one in model.state_dict().items()}, structure.active
    with pytest.raises(MismatchError, match="damaged"):
        structure.load_state_dict({**structure.state_dict(), **damage})
    for name in damage:
        with pytest.raises(MismatchError, match="damaged"):
            structure.load_state_dict({key: one for key, one in structure.state_dict().items() if key != name})
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(torch.equal(mask, units[name]) for name, mask in structure.active.items())


def test_weights_from_elsewhere_are_found_before_compaction() -> None:
    model, example = make("perceptron")
    weights = {name: one.clone() for name, one in model.state_dict().items()}
    structure = trimtab.gates(model, torch.optim.SGD(model.parameters(), lr=0.1), example)
    structure.prune(0.3, "magnitude")
    model.load_state_dict(weights)
    with pytest.raises(MismatchError, match="holds values of units that are not active"):
        structure.compact()
    structure.load_state_dict(structure.state_dict())
    structure.compact()


def test_a_second_structure_of_a_pruned_model_goes_on_or_is_refused() -> None:
    model, example = make("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    structure = trimtab.gates(model, optimizer, example)
    trimtab.gates(model, optimizer, example)  # nothing is held yet
    structure.prune(0.3, "magnitude")
    with pytest.raises(MismatchError, match="an earlier structure of this model holds"):
        trimtab.gates(model, torch.optim.Adam(model.parameters()), example)
    again = trimtab.gates(model, optimizer, example)
    assert {name: mask.tolist() for name, mask in again.active.items()} == {
        name: mask.tolist() for name, mask in structure.active.items()
    }
    again.compact()
    assert trimtab.gates(model, optimizer, example).groups == again.groups == structure.groups


def test_a_compiled_model_is_compacted_as_the_refusal_says() -> None:
    model, example = make("perceptron")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    structure = trimtab.gates(torch.compile(model, backend="eager"), optimizer, example)
    structure.prune(0.5, "magnitude")
    active = sum(int(mask.sum()) for mask in structure.active.values())
    with pytest.raises(UserError, match="gates made on that"):
        structure.compact()
    inner = trimtab.gates(model, optimizer, example)
    inner.compact()
    assert sum(inner.groups.values()) == active < sum({"0": 8, "2": 7}.values())


def test_ages_count_steps_since_birth() -> None:
    model, example = make("perceptron")
    chosen = OPTIMIZERS["adam"](model.parameters())
    structure = trimtab.gates(model, chosen, example)
    train(model, chosen, example, 2)
    structure.prune(0.5, "magnitude", "layer")
    train(model, chosen, example, 3)
    edit = structure.grow(0.125, "random", groups=["0"])
    train(model, chosen, example, 4)
    ages = structure.ages["0"]
    assert ages[edit.units["0"]].tolist() == [4]
    assert sorted(ages.tolist()) == [-1] * 3 + [4] + [9] * 4


def test_parity_and_dormancy_of_newborns() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    example = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    first = structure.diagnostics(example, mean_square)["0"]
    assert first.dormant == 1 / 8 and math.isnan(first.gradient_parity)
    structure.prune(0.25, "magnitude")
    edit = structure.grow(0.25, "zero-out")
    second = structure.diagnostics(example, mean_square)["0"]
    assert second.gradient_parity == 0.0 and second.activation_parity > 0.1  # forward-active, backward-starved
    assert second.ages.tolist() == [0] * 8
    alive = torch.ones(8, dtype=torch.bool)
    alive[edit.units["0"]] = False
    h = torch.relu(model[0](example)).detach()
    shares = [(h[:, mask] > 0.05).float().mean() for mask in (~alive, alive)]
    assert second.activation_parity == pytest.approx(float(shares[0] / shares[1]), rel=1e-5)
    values = torch.linalg.svdvals(h)
    values = values[values > 0] / values.sum()
    assert second.effective_rank == pytest.approx(math.exp(-float((values * values.log()).sum())), rel=1e-3)


def test_effective_rank_of_one_direction() -> None:
    assert effective_rank(torch.ones(4, 4)) == pytest.approx(1.0, abs=1e-5)


def test_a_copy_of_the_model_is_not_gated() -> None:
    model, example = make("perceptron")
    structure = trimtab.gates(model, OPTIMIZERS["sgd"](model.parameters()), example)
    structure.prune(0.5, "magnitude")
    twin = copy.deepcopy(model)
    mean_square(twin, example).backward()
    assert not any(one._backward_hooks for one in twin.parameters())
    assert repr(structure).startswith("Structure(0: ")
