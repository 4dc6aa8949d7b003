"""What a stacked structure rests on: units at zero get gradients of exactly zero, so they stay there for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.inner_training.structure.populations import NETWORKS, assert_held, family_of, held, population, stacked
from trimtab.errors import UserError
from trimtab.inner_training.networks import build_module
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.groups import Group
from trimtab.inner_training.structure.known import known_groups
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_groups import stacked_groups
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.update_rules import UPDATE_RULES

RULES = tuple(UPDATE_RULES)
each_network = pytest.mark.parametrize("name", NETWORKS)


@each_network
@pytest.mark.parametrize("rule", RULES)
def test_inactive_units_stay_at_zero(name: str, rule: str) -> None:
    structure = stacked(name, (rule,), runs=2)
    structure.prune(0.5, structure.score("random"))
    assert held(structure).any()
    runs = structure.population
    runs.set_hyperparameters({"grad_clip": np.array([0.1, np.inf])})
    before = runs._learner.parameters.clone()
    runs.advance(6)
    assert_held(structure)
    assert (before != runs._learner.parameters).any(1).all()
    assert runs._learner.parameters.isfinite().all()


@each_network
def test_all_rules_share_a_population(name: str) -> None:
    structure = stacked(name, RULES, runs=len(RULES))
    structure.prune(0.5, structure.score("magnitude"))
    structure.population.advance(4)
    assert_held(structure)


@each_network
def test_gradients_of_inactive_units_are_exactly_zero(name: str) -> None:
    structure = stacked(name, runs=2)
    structure.prune(0.5, structure.score("random"))
    structure.population.advance(2)
    gradient = structure.population._last_gradient
    assert not gradient[held(structure)].any() and gradient.any(1).all()


def sizes_of(structure: Stacked) -> dict[str, torch.Tensor]:
    return {name: active.sum(1) for name, active in structure.active.items()}


@each_network
def test_groups_are_those_of_the_gates(name: str) -> None:
    structure = stacked(name, width=0.5)
    for one in structure._flat:
        assert one.gates
        expected = sum(
            (structure.population._feed.buffers[gate][:, where] != 0).any(2).float()
            for gate, where in one.gates.items()
        )
        assert torch.equal(structure.active[one.name], expected > 0)


def entries_of(group: Group, module: nn.Module, unit: int) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in module.named_parameters()}
    for member in group.members:
        if member.role != "statistic":
            found[member.parameter] |= member.mask(found[member.parameter].shape, torch.tensor([unit]))
    return found


def blind(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which entries of the parameters the outputs do not depend on, found by changing inputs of a random projection."""
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in parameters.items()}
    for seed in range(3):
        outputs = module(x).flatten()
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(seed))
        slopes = torch.autograd.grad((outputs * weights).sum(), list(parameters.values()))
        total = {name: total[name] | (slope != 0) for name, slope in zip(parameters, slopes, strict=True)}
    return {name: ~value for name, value in total.items()}


@each_network
def test_members_are_all_that_a_closed_gate_hides(name: str) -> None:
    """Brute force: what the outputs no longer depend on once the gate is closed is what the group says, and no more."""
    module, x = build_module(NETWORKS[name][0], seed=0), NETWORKS[name][1]
    for value in module.parameters():
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    for group in known_groups(module):
        for member in group.of_role("vector"):
            if member.parameter.endswith("bias"):  # no relu may close because a unit before it is gone
                module.get_parameter(member.parameter).data += 2.0
    open_ = blind(module, x)
    buffers = dict(module.named_buffers())
    for group in known_groups(module):
        for unit in {0, group.units - 1}:
            gates = [(buffers[one.parameter], one.index[unit]) for one in group.of_role("statistic")]
            for gate, where in gates:
                gate[where] = 0.0
            closed, declared = blind(module, x), entries_of(group, module, unit)
            for gate, where in gates:
                gate[where] = 1.0
            for key in closed:
                assert torch.equal(closed[key] & ~open_[key], declared[key] & ~open_[key]), (group.name, unit, key)


class Offset(nn.Module):
    """Hidden units whose activation function is 1/2 at 0, then such that are 0 there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.sigmoid(self.first(x)))))


def arrays_task(module: type[nn.Module]) -> ArrayTask:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 4)).astype(np.float32)
    return ArrayTask("own", module, inputs, (inputs[:, 0] > 0).astype(np.int64))


def test_groups_of_other_modules_are_discovered_and_tried() -> None:
    pytest.importorskip("torch_pruning")
    offered, refused = stacked_groups(arrays_task(Offset))
    assert [group.name for group in offered] == ["second"]
    assert "would not stay inactive" in refused["first"]


def test_own_modules_stay_at_zero_without_gates() -> None:
    pytest.importorskip("torch_pruning")
    family = arrays_task(Offset)
    runs = Population(family, 2, mode="eager")
    runs.reset(range(2), [family.draw(seed, held_out=False) for seed in range(2)])
    structure = Stacked(runs)
    structure.prune(0.5, structure.score("agf"))
    runs.advance(5)
    assert_held(structure)
    edit = structure.grow(0.25, "gradmax")
    assert edit.counts.tolist() == [2, 2]


def test_discovery_agrees_with_what_is_known() -> None:
    pytest.importorskip("torch_pruning")
    from trimtab.inner_training.networks.mlp import MLP
    from trimtab.inner_training.structure.discovery import discover

    class Written(nn.Module):
        """The same perceptron, written as others write it."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[2](torch.relu(self.layers[1](torch.relu(self.layers[0](x)))))

    found, _ = discover(Written(), torch.randn(4, 5))
    known = known_groups(MLP(5, 8, 3, depth=2))
    assert [group.name for group in found] == [group.name for group in known]
    for one, other in zip(found, known, strict=True):
        members = {(m.parameter, m.role, m.axis): m.index.tolist() for m in one.members}
        assert members == {
            (m.parameter, m.role, m.axis): m.index.tolist() for m in other.members if m.role != "statistic"
        }


@each_network
def test_trimtabs_own_gates_find_the_same_groups(name: str) -> None:
    pytest.importorskip("torch_pruning")
    from trimtab.inner_training.structure.discovery import discover

    family = family_of(name)
    found, _ = discover(family.module, family.inputs[:4])
    offered, refused = stacked_groups(family)
    assert [group.name for group in offered] == [group.name for group in found] and not refused


def test_a_population_without_units_is_refused() -> None:
    family = ArrayTask("line", lambda: nn.Linear(4, 2), np.ones((120, 4)), np.tile([0, 1], 60))
    runs = Population(family, 2, mode="eager")
    with pytest.raises(UserError, match="no units of 'line' can be edited"):
        Stacked(runs)
    assert runs.companion is None


def test_one_structure_for_one_population() -> None:
    runs = population("mlp")
    Stacked(runs)
    with pytest.raises(UserError, match="has a structure already"):
        Stacked(runs)
