"""Each update rule against its reference: torch.optim, and for Lion the algorithm of the paper, written plainly."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.inner_training.problems import GatedNet, family, plain_module, plain_optimizer
from trimtab.inner_training.layout import FlatLayout
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.orthogonal import orthogonalised
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, OptimizerSettings
from trimtab.inner_training.update_rules import DEFAULT_RULES, UPDATE_RULES, Needs, needs_of
from trimtab.inner_training.updating import muon_matrices

Settings = OptimizerSettings
SETTINGS = {
    "sgd": Settings(rule="sgd", lr=0.05, momentum=0.0),
    "adam": Settings(rule="adam", lr=3e-3, weight_decay=1e-2),
    "adamw": Settings(rule="adamw", lr=3e-3, weight_decay=0.1),
    "rmsprop": Settings(rule="rmsprop", lr=1e-3, momentum=0.0, beta2=0.99),
    "rmsprop-momentum-decay": Settings(rule="rmsprop", lr=1e-3, momentum=0.8, beta2=0.95, eps=1e-6, weight_decay=1e-2),
    "nadam": Settings(rule="nadam", lr=3e-3),
    "nadam-decay": Settings(rule="nadam", lr=3e-3, momentum=0.8, beta2=0.99, eps=1e-4, weight_decay=1e-2),
    "nadamw": Settings(rule="nadamw", lr=3e-3, weight_decay=0.1),
    "lion": Settings(rule="lion", lr=1e-3, beta2=0.99),
    "lion-decay": Settings(rule="lion", lr=1e-3, momentum=0.95, beta2=0.98, weight_decay=1.0),
    "muon": Settings(rule="muon", lr=3e-3, momentum=0.95),
    "muon-decay": Settings(rule="muon", lr=3e-3, momentum=0.8, beta2=0.95, weight_decay=0.5),
}


def train_plainly(instance: Instance, runs: Population, run: int, steps: int) -> dict[str, Tensor]:
    module = plain_module(instance)
    optimizer = plain_optimizer(module, instance.optimizer)
    for step in range(steps):
        x, y = runs.batch(run, step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def population(instances: list[Instance], rules: Iterable[str] = UPDATE_RULES) -> Population:
    made = Population(family(), len(instances), rules=tuple(rules), mode="eager")
    made.reset(range(len(instances)), instances)
    return made


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative L2 distance of two sets of parameters."""
    square = sum((one[name] - other[name]).square().sum().item() for name in one)
    return float(square / sum(value.square().sum().item() for value in other.values())) ** 0.5


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon without its rounding to bfloat16, which is the one difference (see ``orthogonalised``)."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize("name", SETTINGS)
def test_one_run_alone_equals_its_reference_over_60_steps(name: str) -> None:
    instance = family().instance(3, SETTINGS[name])
    runs = population([instance], [instance.optimizer.rule])
    wanted, start = train_plainly(instance, runs, 0, 60), runs.parameters_of(0)
    runs.advance(25), runs.advance(35)
    assert distance(start, wanted) > 0.05
    assert distance(runs.parameters_of(0), wanted) < 1e-4


@pytest.mark.usefixtures("in_float32")
def test_every_run_of_a_mixed_population_equals_its_reference_over_60_steps() -> None:
    instances = [family().instance(seed, settings) for seed, settings in enumerate(SETTINGS.values())]
    runs = population(instances)
    wanted = [train_plainly(instance, runs, run, 60) for run, instance in enumerate(instances)]
    runs.advance(60)
    for run, name in enumerate(SETTINGS):
        assert distance(runs.parameters_of(run), wanted[run]) < 1e-4, name


def test_every_rule_is_tested() -> None:
    assert {settings.rule for settings in SETTINGS.values()} == set(UPDATE_RULES)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_levers_of_momentum_and_decay_move_every_rule(rule: str) -> None:
    settings = Settings(rule=rule, lr=2e-3, weight_decay=0.1)
    instances = [family().instance(5, settings)] * 3
    runs = population(instances, [rule])
    base = runs.base
    momentum = LEVERS["momentum"].value(base["momentum"], np.array([1.0, 0.5, 1.0]))
    decay = LEVERS["weight_decay"].value(base["weight_decay"], np.array([1.0, 1.0, 10.0]))
    runs.set_hyperparameters({"momentum": momentum, "weight_decay": decay})
    runs.advance(20)
    untouched = population(instances, [rule])
    untouched.advance(20)
    assert distance(runs.parameters_of(0), untouched.parameters_of(0)) == 0
    for run in (1, 2):
        assert 1e-4 < distance(runs.parameters_of(run), untouched.parameters_of(run)) < 1, run
    changed = [family().instance(5, Settings(rule=rule, lr=2e-3, momentum=0.95, weight_decay=0.1)),
               family().instance(5, Settings(rule=rule, lr=2e-3, weight_decay=1.0))]  # fmt: skip
    made_so = population(changed, [rule])
    made_so.advance(20)
    for run in (1, 2):
        assert distance(runs.parameters_of(run), made_so.parameters_of(run - 1)) < 1e-5, run


def test_the_default_rules_need_what_they_needed() -> None:
    assert needs_of(UPDATE_RULES[name] for name in DEFAULT_RULES) == Needs(squares=True)
    assert needs_of([UPDATE_RULES["sgd"]]) == Needs()
    assert [rule.name for rule in UPDATE_RULES.values() if not rule.adaptive] == ["sgd"]


def test_a_rule_that_is_present_but_unused_changes_nothing_bit_for_bit() -> None:
    instances = [family().instance(seed, SETTINGS[name]) for seed, name in enumerate(DEFAULT_RULES)]
    few, all_rules = population(instances, DEFAULT_RULES), population(instances)
    assert torch.equal(few.advance(40).losses, all_rules.advance(40).losses)


@pytest.mark.parametrize("rule", UPDATE_RULES)
def test_a_run_that_is_lost_shows_it_and_leaves_its_neighbours(rule: str) -> None:
    calm = family().instance(1, Settings(rule=rule, lr=1e-3))
    wild = family().instance(2, Settings(rule=rule, lr=1e-3))
    wild.parameters["first.weight"][:] = np.nan  # type: ignore[index]
    pair, twins = population([calm, wild], [rule]), population([calm, calm], [rule])
    spoiled, healthy = pair.advance(5).to_host(), twins.advance(5).to_host()
    assert not np.isfinite(spoiled.losses[:, 1]).any()
    np.testing.assert_array_equal(spoiled.losses[:, 0], healthy.losses[:, 0])


def test_lion_does_not_hide_a_gradient_that_is_no_number() -> None:
    settings = Settings(rule="lion", lr=1e-3)
    runs = population([family().instance(1, settings)], ["lion"])
    runs._learner = runs._learner._replace(first=torch.full_like(runs._learner.first, torch.nan))
    runs.advance(1)
    assert runs.parameters_of(0)["first.weight"].isnan().all()


shapes = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@given(shape=shapes, seed=st.integers(0, 1000), size=st.floats(-3, 3))
def test_orthogonalised_keeps_directions_and_evens_sizes(shape: tuple[int, int, int], seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(shape[0], n, n)))[0] for n in shape[1:])
    rank = min(shape[1:])
    middle = np.zeros(shape)
    middle[:, range(rank), range(rank)] = rng.uniform(0.3, 1.0, (shape[0], rank)) * 10**size
    given_matrices = torch.from_numpy(left @ middle @ right).float()
    turned = left.transpose(0, 2, 1) @ orthogonalised(given_matrices).double().numpy() @ right.transpose(0, 2, 1)
    values = turned[:, range(rank), range(rank)]
    assert ((values > 0.5) & (values < 1.3)).all()
    turned[:, range(rank), range(rank)] = 0
    assert np.abs(turned).max() < 1e-3


def test_orthogonalised_is_torchs_own_up_to_bfloat16() -> None:
    from torch.optim._muon import _zeropower_via_newtonschulz

    matrices = torch.randn(4, 24, 8, generator=torch.Generator().manual_seed(0))
    matrices[3] = 0
    ours = orthogonalised(matrices)
    for one, matrix in zip(ours, matrices, strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
        assert (one - theirs).norm() <= 0.02 * theirs.norm()


def test_muon_leaves_embeddings_heads_and_kernels_to_adamw() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lm_head = nn.Embedding(5, 4), nn.Linear(4, 5)
            self.pos_embedding, self.heads = nn.Parameter(torch.zeros(3, 4)), nn.Linear(4, 4)
            self.kernel = nn.Conv2d(1, 2, 3)

    assert muon_matrices(FlatLayout(Net())) == ("heads.weight",)
    assert muon_matrices(FlatLayout(GatedNet())) == ("first.weight", "second.weight")


@pytest.mark.slow
def test_all_rules_compiled_equal_eager_within_1e4_over_50_steps() -> None:
    instances = [family().instance(seed, settings) for seed, settings in enumerate(SETTINGS.values())]
    fast = Population(family(), len(instances), rules=tuple(UPDATE_RULES), mode="compile")
    assert fast.mode == "compile"
    fast.reset(range(len(instances)), instances)
    slow = population(instances)
    np.testing.assert_allclose(fast.advance(50).to_host().losses, slow.advance(50).to_host().losses, atol=1e-4)
