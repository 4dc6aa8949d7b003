"""Keepers of populations against keepers of plain modules on the same runs, and what they leave alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import trimtab
from tests.inner_training.structure.populations import BATCH, NETWORKS, Tiny, family_of
from trimtab.errors import MismatchError, UnknownNameError, UserError
from trimtab.inner_training.networks import build_module
from trimtab.inner_training.networks.plastic_mlp import PlasticMLP, initial_plastic_parameters
from trimtab.inner_training.networks.seeding import Arrays
from trimtab.inner_training.population import Population
from trimtab.inner_training.structure.keeping import maintain
from trimtab.inner_training.structure.maintenance import MAINTENANCE
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_keeping import kept_on, maintain_runs
from trimtab.inner_training.structure.weight_rules import unworthiness

BRISK: dict[str, dict[str, float]] = {
    "redo": {"threshold": 0.7, "every": 4, "window": 2},
    "grama": {"threshold": 0.7, "every": 4, "window": 2},
    "continual-backprop": {"rate": 0.05, "maturity": 3},
    "random-reset": {"rate": 0.05, "maturity": 3},
    "self-normalised": {"first": 1, "longest": 10, "window": 5},
    "shrink-and-perturb": {"every": 3, "noise": 0.0},
    "shrink-and-perturb-step": {"noise": 0.0},
    "l2-init": {"strength": 0.1},
    "l2-noise": {"strength": 0.1, "noise": 0.0},
    "weight-clipping": {"kappa": 0.6},
}
RULES = ("sgd", "adam")


class Crelu(Tiny):
    """Units that are read at two positions each."""

    def __init__(self) -> None:
        self.name, self.inputs = "tiny-crelu", NETWORKS["mlp"][1]
        self.module = build_module(lambda: PlasticMLP(5, 8, 3, depth=2, activation="crelu"), seed=0)

    def initial(self, rng: np.random.Generator, width: float) -> tuple[Arrays, Arrays]:
        assert isinstance(self.module, PlasticMLP)
        return initial_plastic_parameters(self.module, rng, self.module.units, 1.0)


def begun(runs: int = 4, width: float = 1.0, family: Tiny | None = None) -> Stacked:
    """Runs under SGD and Adam in turn, with whole batches and halves of them."""
    family = family_of("mlp") if family is None else family
    made = Population(family, runs, rules=RULES, mode="eager")
    instances = [
        family.made(seed, RULES[seed % 2], width, BATCH if seed < 2 else BATCH // 2, decay=0.0) for seed in range(runs)
    ]
    made.reset(range(runs), instances)
    return Stacked(made)


class Twin:
    """One run of a population as a plain module, with its own optimizer and keeper."""

    def __init__(self, structure: Stacked, run: int, name: str, settings: dict[str, float]) -> None:
        self.runs, self.run = structure.population, run
        self.model = copy.deepcopy(self.runs.family.module).train()
        self.follow()
        recipe = self.runs.instances[run].optimizer  # type: ignore[union-attr]
        self.optimizer: torch.optim.Optimizer
        if recipe.rule == "sgd":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
        else:
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), lr=recipe.lr, betas=(recipe.momentum, recipe.beta2), eps=recipe.eps
            )
        gates = trimtab.gates(self.model, self.optimizer, self.runs.batch(run, 0)[0])
        options: dict[str, Any] = {"seed": int(self.runs._feed.seed[run])}
        if MAINTENANCE[name].acts_on == "units":
            options["newborn_state"] = "zero"
        self.keeper = maintain(gates, name, **options, **settings)

    def follow(self) -> None:
        """Takes the weights of the population's run."""
        with torch.no_grad():
            for name, value in self.runs.parameters_of(self.run).items():
                self.model.get_parameter(name).copy_(value)

    def step(self, number: int) -> dict[str, Tensor]:
        x, y = self.runs.batch(self.run, number)
        self.optimizer.zero_grad()
        with self.keeper.watch():
            self.runs.family.loss(self.model(x), y).mean().backward()
        self.optimizer.step()
        return self.keeper.step()


UNITS = [name for name, one in MAINTENANCE.items() if one.acts_on == "units"]


@pytest.mark.parametrize(("name", "family"), [*((name, None) for name in UNITS), ("continual-backprop", Crelu())])
def test_the_same_units_are_reset_as_in_plain_modules(name: str, family: Tiny | None) -> None:
    """All but the fresh rows is compared at each step; the module takes these over."""
    structure = begun(family=family)
    keeper = maintain_runs(structure, name, settings=BRISK[name])
    twins = [Twin(structure, run, name, BRISK[name]) for run in range(4)]
    for step in range(16):
        due = [twin.step(step) for twin in twins]
        kept_on(structure.population, [keeper], 1)
        for run, twin in enumerate(twins):
            found = structure.population.parameters_of(run)
            for place, group in enumerate(structure.groups):
                units = (structure.age[group][run] == 0).nonzero()[:, 0]
                assert units.tolist() == due[run].get(group, torch.zeros(0)).tolist(), (run, step, group)
                weight = twin.model.get_parameter(f"layers.{place}.weight").detach()
                weight[units] = found[f"layers.{place}.weight"][units]
                bound = 1 / weight.shape[1] ** 0.5
                assert bool((found[f"layers.{place}.weight"][units].abs() <= bound).all())
            for key, value in twin.model.named_parameters():
                torch.testing.assert_close(found[key], value.detach(), rtol=1e-4, atol=1e-5)
            twin.follow()
    counts = torch.stack([*keeper.resets.values()], 1).tolist()  # type: ignore[union-attr]
    assert counts == [[twin.keeper.resets[group] for group in structure.groups] for twin in twins]  # type: ignore[union-attr]
    assert min(map(sum, counts)) > 0


@pytest.mark.parametrize(
    "name", [one for one in MAINTENANCE if MAINTENANCE[one].acts_on == "weights" and one != "upgd"]
)
def test_weights_go_as_in_plain_modules(name: str) -> None:
    structure = begun()
    keeper = maintain_runs(structure, name, settings=BRISK[name])
    twins = [Twin(structure, run, name, BRISK[name]) for run in range(4)]
    for step in range(10):
        for twin in twins:
            twin.step(step)
    kept_on(structure.population, [keeper], 10)
    for run, twin in enumerate(twins):
        for key, value in structure.population.parameters_of(run).items():
            torch.testing.assert_close(value, twin.model.get_parameter(key).detach(), rtol=1e-4, atol=1e-5)


def test_upgd_goes_by_the_worth_of_before_the_step() -> None:
    structure = begun(2)
    runs = structure.population
    keeper = maintain_runs(structure, "upgd", noise=0.0, decay=0.5)
    value = {name: one.clone() for name, one in runs.parameters_of(0).items()}
    worth = {name: torch.zeros_like(one) for name, one in value.items()}
    recipe = runs.instances[0].optimizer  # type: ignore[union-attr]
    moment = {name: torch.zeros_like(one) for name, one in value.items()}
    gates = dict(runs.family.module.named_buffers())
    for step in range(6):
        x, y = runs.batch(0, step)

        def loss(held: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            return runs.family.loss(functional_call(runs.family.module, {**held, **gates}, (x,)), y).mean()

        slope = torch.func.grad(loss)(value)
        best = torch.stack([one.max() for one in worth.values()]).max()
        used = {name: unworthiness(worth[name], best) * slope[name] for name in value}
        worth = {name: 0.5 * worth[name] - 0.5 * slope[name] * value[name] for name in value}
        moment = {name: recipe.momentum * moment[name] + used[name] for name in value}
        value = {name: value[name] - recipe.lr * moment[name] for name in value}
        kept_on(runs, [keeper], 1)
    for name, found in runs.parameters_of(0).items():
        torch.testing.assert_close(found, value[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MAINTENANCE)
def test_other_runs_do_not_notice(name: str) -> None:
    """Keepers have runs of their own, and inactive units and the others stay as they are, bit for bit."""
    alone, kept = begun(width=0.6), begun(width=0.6)
    alone.steered(), kept.steered()
    mask = np.array([False, True, True, False])
    given = {
        **BRISK.get(name, {}),
        **({"noise": 0.01} if "noise" in {s.name for s in MAINTENANCE[name].settings} else {}),
    }
    keeper = maintain_runs(kept, name, runs=mask, settings=given)
    losses = kept_on(kept.population, [keeper], 12).losses
    kept_on(alone.population, [maintain_runs(alone, "random-reset", runs=mask, rate=1e-12)], 12)
    after, plain = kept.population._learner, alone.population._learner
    assert losses.shape == (12, 4)
    for one, other in zip(after[:3], plain[:3], strict=True):
        assert torch.equal(one[~mask], other[~mask])
    assert not torch.equal(after.parameters[mask], plain.parameters[mask])
    idle = kept._flat.entries(~kept._units.active)
    assert bool(idle.any()) and all(bool((one[idle] == 0).all()) for one in after[:3])


def test_each_run_has_its_settings() -> None:
    structure = begun()
    often = maintain_runs(structure, "random-reset", rate=torch.tensor([0.0001, 0.1, 0.1, 0.0001]), maturity=1)
    kept_on(structure.population, [often], 12)
    counts = torch.stack([*often.resets.values()]).sum(0)  # type: ignore[union-attr]
    assert counts[0] == counts[3] == 0 and counts[1] == counts[2] > 10
    shrinking = maintain_runs(structure, "shrink-and-perturb", runs=np.arange(4) < 2, every=torch.tensor([2, 5]))
    assert [shrinking.rest, shrinking.step(2), shrinking.rest, shrinking.step(2), shrinking.rest] == [
        2,
        None,
        2,
        None,
        1,
    ]


@pytest.mark.parametrize("name", ["continual-backprop", "random-reset", "redo"])
def test_what_is_due_waits_for_the_pause(name: str) -> None:
    structure, settings = begun(), {**BRISK[name]}
    keeper = maintain_runs(structure, name, pause=4, settings=settings)
    counts = []
    for _ in range(16):
        kept_on(structure.population, [keeper], 1)
        counts.append(int(torch.stack([*keeper.resets.values()]).sum()))  # type: ignore[union-attr]
    steps = np.diff([0, *counts]).nonzero()[0] + 1
    assert len(steps) > 1 and not (steps % 4).any()


def test_a_run_that_begins_anew_is_new_to_its_keeper() -> None:
    structure = begun()
    keeper = maintain_runs(structure, "random-reset", rate=0.2, maturity=8)
    kept_on(structure.population, [keeper], 8)
    structure.population.reset([0], [family_of("mlp").made(9, "sgd")])
    kept_on(structure.population, [keeper], 4)
    counts = torch.stack([*keeper.resets.values()]).sum(0)  # type: ignore[union-attr]
    assert counts[0] == 0 and bool((counts[1:] > 0).all())


def test_a_run_that_begins_anew_is_held_to_its_own_beginning() -> None:
    """Under a pull that is far stronger than the gradient, weights end where their run began."""
    structure = begun(2)
    keeper = maintain_runs(structure, "l2-init", strength=torch.tensor([10.0, 0.0]))
    kept_on(structure.population, [keeper], 3)
    instance = family_of("mlp").made(9, "adam")
    structure.population.reset([0], [instance])
    kept_on(structure.population, [keeper], 60)
    assert keeper.steps.tolist() == [60, 63]  # type: ignore[union-attr]
    for name, value in structure.population.parameters_of(0).items():
        torch.testing.assert_close(value, torch.from_numpy(np.asarray(instance.parameters[name])), atol=0.05, rtol=0)


def test_resets_of_keepers_are_not_undone() -> None:
    structure = begun()
    edit = structure.remove({"layers.0": torch.zeros(4, 8, dtype=torch.bool).index_fill(1, torch.tensor([1]), True)})
    kept_on(
        structure.population, [maintain_runs(structure, "random-reset", runs=np.arange(4) < 1, rate=0.5, maturity=0)], 3
    )
    assert edit.undo().tolist() == [False, True, True, True]


def test_bad_input_is_named() -> None:
    structure = begun()
    with pytest.raises(UnknownNameError, match="did you mean 'redo'"):
        maintain_runs(structure, "reddo")
    with pytest.raises(MismatchError, match="give one number, or the shape"):
        maintain_runs(structure, "redo", threshold=torch.zeros(3))
    with pytest.raises(MismatchError, match=r"strength has the shape \(3,\)"):
        maintain_runs(structure, "l2-init", strength=torch.zeros(3))
    with pytest.raises(UserError, match="acts on weights"):
        maintain_runs(structure, "l2-init", groups=["layers.0"])
    with pytest.raises(UserError, match="does not know what units give"):
        maintain_runs(structure, "redo", compensate=True)
    with pytest.raises(UserError, match="name at least one run"):
        maintain_runs(structure, "redo", runs=np.zeros(4, dtype=bool))
    with pytest.raises(UserError, match="give a divisor of that"):
        maintain_runs(structure, "redo", every=50, pause=20)
    with pytest.raises(UserError, match="step by one"):
        maintain_runs(structure, "redo").step(2)  # type: ignore[union-attr]


@pytest.mark.slow
def test_compiled_steps_are_steered_as_eager_ones() -> None:
    found = []
    for mode in ("compile", "eager"):
        family = family_of("mlp")
        runs = Population(family, 4, rules=RULES, mode=mode)  # type: ignore[arg-type]
        runs.reset(range(4), [family.made(seed, RULES[seed % 2]) for seed in range(4)])
        structure = Stacked(runs, compile=False)
        keepers = [
            maintain_runs(structure, "l2-init", runs=np.arange(4) < 2, strength=0.1),
            maintain_runs(structure, "upgd", runs=np.arange(4) > 1, noise=0.01),
            maintain_runs(structure, "continual-backprop", **BRISK["continual-backprop"]),
        ]
        kept_on(runs, keepers, 8)
        found.append((runs.mode, runs._learner.parameters))
    if found[0][0] == "eager":
        pytest.skip("there is no compiler here")
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)
