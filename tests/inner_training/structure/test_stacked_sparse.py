"""Sparse training of populations: numbers of live weights, what an update leaves alone, and single modules beside it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.inner_training.structure import slow_sparse as slow
from tests.inner_training.structure.populations import (
    NETWORKS,
    assert_held,
    differing,
    family_of,
    picture,
    population,
    stacked,
)
from tests.inner_training.structure.test_stacked_edits import NoWaiting
from tests.inner_training.structure.test_stacked_masks import assert_masked
from trimtab.errors import UserError
from trimtab.inner_training.structure.densities import DISTRIBUTIONS, live_counts
from trimtab.inner_training.structure.draws import Draws
from trimtab.inner_training.structure.sparse_keeping import SparseKeeper
from trimtab.inner_training.structure.sparse_methods import SPARSE_TRAINING, Timetable, updated_masks
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.structure.stacked_sparse import SparseTraining, dense_gradient

METHODS = tuple(SPARSE_TRAINING)
EXCHANGING = tuple(name for name, one in SPARSE_TRAINING.items() if one.grows)


def everything(name: str = "mlp", **settings: object) -> SparseTraining:
    """Each run with a method of its own."""
    structure = stacked(name, runs=len(METHODS), steps=0)
    return SparseTraining(structure, METHODS, **{"density": 0.3, "every": 4, **settings})


def train(driver: SparseTraining, updates: int, steps: int = 4) -> list[bool]:
    found = []
    for _ in range(updates):
        driver.structure.population.advance(steps)
        found.append(driver.update() is not None)
    return found


@pytest.mark.parametrize(
    ("name", "distribution"), [*((name, "erk") for name in NETWORKS), *(("conv", name) for name in DISTRIBUTIONS)]
)
def test_numbers_of_live_weights_stay_exactly(name: str, distribution: str) -> None:
    driver = everything(name, distribution=distribution)
    first, masks = driver.counts, driver.structure.masks
    assert 0.2 < driver.density[0] < 0.45 and driver.density[METHODS.index("prune-magnitude")] == 1
    assert any(train(driver, 4))
    assert_masked(driver.structure)
    for layer, counts in driver.counts.items():
        for run, method in enumerate(METHODS):
            same = torch.equal(driver.structure.masks[layer][run], masks[layer][run])
            if SPARSE_TRAINING[method].thins:
                assert counts[run] <= first[layer][run]
            else:
                assert counts[run] == first[layer][run]
                assert same or method != "static"
    moved = [any(bool((driver.structure.masks[name][run] != old[run]).any()) for name, old in masks.items())
             for run in range(len(METHODS))]  # fmt: skip
    assert moved == [name != "static" for name in METHODS]


def test_pruning_ends_at_the_counts_of_the_density() -> None:
    driver = everything(density=np.linspace(0.1, 0.5, len(METHODS)), end=0.3)
    run = METHODS.index("prune-magnitude")
    seen = []
    for _ in range(20):
        train(driver, 1)
        seen.append(float(driver.density[run]))
    assert seen == sorted(seen, reverse=True) and len(set(seen)) > 8
    exists = {name: torch.ones_like(one) for name, one in driver.structure.masks.items() if name in driver.layers}
    wanted = live_counts(exists, torch.linspace(0.1, 0.5, len(METHODS)), "erk")
    assert {name: int(counts[run]) for name, counts in driver.counts.items()} == {
        name: int(counts[run]) for name, counts in wanted.items()
    }


@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_an_update_leaves_survivors_alone_and_is_undone_bit_for_bit(rule: str) -> None:
    structure = stacked("mlp", (rule,), runs=len(METHODS), steps=0)
    driver = SparseTraining(structure, METHODS, density=0.3, every=3, end=1.0)
    structure.population.advance(9)
    before, old = picture(structure), structure.masks
    edit = driver.update()
    assert edit is not None
    learner, layout, now = structure.population._learner, structure.population.layout, structure.masks
    for field in ("parameters", "first", "second"):
        was, is_now = layout.views(before[field]), layout.views(getattr(learner, field))
        for name in was:
            same = old[name] == now[name]
            assert torch.equal(was[name][same], is_now[name][same])
            assert not is_now[name][~same].any()
    static = METHODS.index("static")
    assert edit.undo().tolist() == [run != static for run in range(len(METHODS))]
    assert differing(before, picture(structure)) == []


@pytest.mark.parametrize("name", ["mlp", "conv", "vit"])
def test_an_update_is_that_of_single_layers_and_runs(name: str) -> None:
    structure = stacked(name, runs=3, steps=0)
    driver = SparseTraining(
        structure, "rigl", density=np.array([0.2, 0.4, 0.6]), alpha=np.array([0.1, 0.3, 0.9]), every=4
    )
    structure.population.advance(4)
    old, slopes = structure.masks, dense_gradient(structure.population)
    weights = structure.population.layout.views(structure.population._learner.parameters)
    total = structure.population.total_steps
    driver.update()
    for run, alpha in enumerate((0.1, 0.3, 0.9)):
        share = alpha / 2 * (1 + np.cos(np.pi * 4 / np.ceil(0.75 * total[run])))
        for layer in driver.layers:
            live, values, gain = (one[layer][run].flatten() for one in (old, weights, slopes))
            expected = slow.exchanged(live, values, gain.abs(), share, torch.ones_like(live))
            assert torch.equal(structure.masks[layer][run].flatten(), expected), (run, layer)


@pytest.mark.parametrize("name", ["mlp", "conv", "vit", "graph"])
def test_gradients_are_those_of_an_unmasked_module(name: str) -> None:
    driver = everything(name)
    runs = driver.structure.population
    runs.advance(3)
    found = dense_gradient(runs)
    for run in range(runs.num_runs):
        model = copy.deepcopy(runs.family.module)
        model.load_state_dict({**model.state_dict(), **runs.parameters_of(run)})
        x, y = runs.batch(run, int(runs.steps_done[run]))
        runs.family.loss(model(x), y).mean().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(found[key][run], parameter.grad, rtol=1e-4, atol=1e-6)
    masked = ~driver.structure.masks[driver.layers[0]]
    assert found[driver.layers[0]][masked].any()


def alone(driver: SparseTraining, run: int, method: str, rule: str, settings: dict[str, float]) -> list[Tensor]:
    """What a run does, as a module of its own with an optimizer of torch: its live weights, layer after layer."""
    runs = driver.structure.population
    settled = runs.instances[run].optimizer
    model = copy.deepcopy(runs.family.module)
    model.load_state_dict({**model.state_dict(), **{name: torch.from_numpy(np.asarray(value))
                                                    for name, value in runs.instances[run].parameters.items()}})  # fmt: skip
    optimizer: torch.optim.Optimizer = torch.optim.SGD(
        model.parameters(), lr=settled.lr, momentum=settled.momentum, weight_decay=settled.weight_decay
    )
    if rule == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=settled.lr, weight_decay=settled.weight_decay)
    structure = trimtab.gates(model, optimizer, runs.batch(run, 0)[0])
    first = {name: driver.structure.masks[name][run] for name in driver.layers}
    keeper = SparseKeeper(structure, method, total_steps=int(runs.total_steps[run]), masks=first, **settings)

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return runs.family.loss(module(batch[0]), batch[1]).mean()

    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, runs.batch(run, step)).backward()
        optimizer.step()
        keeper.step(runs.batch(run, step + 1), loss)
        found += [one.detach().clone() for one in model.parameters()]
    return found


STEPS = 24


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["rigl", "srigl", "prune-magnitude"])
@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_runs_are_those_of_single_modules(name: str, method: str, rule: str) -> None:
    structure = stacked(name, (rule,), runs=2, steps=0)
    settings = {"density": 0.4, "every": 4, "end": 0.2} | ({"gamma": 0.9} if method == "srigl" else {})
    driver = SparseTraining(structure, method, **settings)
    singles = [alone(driver, run, method, rule, settings) for run in range(2)]
    first = {name: structure.masks[name].clone() for name in driver.layers}
    together: list[list[Tensor]] = [[], []]
    for _ in range(STEPS):
        train(driver, 1, steps=1)
        for run in range(2):
            together[run] += list(structure.population.parameters_of(run).values())
    assert any(not torch.equal(first[layer], structure.masks[layer]) for layer in driver.layers)
    for single, run in zip(singles, together, strict=True):
        for one, other in zip(single, run, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_units_are_emptied_by_gamma_alone() -> None:
    structure = stacked("mlp", runs=3, steps=0)
    driver = SparseTraining(
        structure, ["srigl", "srigl", "rigl"], density=0.3, every=2, end=1.0, gamma=np.array([0.9, 0.0, 0.5])
    )
    counts = driver.counts
    train(driver, 20)
    empty = {name: (~structure.masks[name].any(2)).sum(1).tolist() for name in driver.layers}
    assert (
        empty["layers.0.weight"][0] + empty["layers.1.weight"][0]
        > empty["layers.0.weight"][1] + empty["layers.1.weight"][1]
    )
    assert all(torch.equal(one, counts[name]) for name, one in driver.counts.items())


def test_random_exchanges_are_drawn_by_each_run_alone() -> None:
    few, many = (SparseTraining(stacked("mlp", runs=runs, steps=0), "set", every=4, density=0.4) for runs in (2, 4))
    for driver in (few, many):
        train(driver, 3)
    for name in few.layers:
        assert torch.equal(few.structure.masks[name], many.structure.masks[name][:2])
        assert not torch.equal(many.structure.masks[name][0], many.structure.masks[name][1])


def test_a_share_of_the_updates_is_due() -> None:
    """Each run has a pace of its own, and none after its end."""
    structure = stacked("mlp", runs=3, steps=0)
    driver = SparseTraining(structure, "set", every=np.array([2, 5, 10**6]), end=np.array([0.1, 1.0, 1.0]), density=0.5)
    for step in range(1, 31):
        old = structure.masks["layers.1.weight"]
        structure.population.advance(1)
        driver.update()
        changed = (structure.masks["layers.1.weight"] != old).flatten(1).any(1).tolist()
        if step < 12 or step >= 20:  # in between the share is less than one weight
            assert changed == [step % 2 == 0 and step < 20, step % 5 == 0, False], step


def test_masks_go_back_with_a_rollback_and_begin_anew_with_a_reset() -> None:
    driver = everything()
    runs, everyone = driver.structure.population, np.ones(len(METHODS), dtype=bool)
    for _ in range(2):
        runs.snapshot(everyone)
    masks, counts = driver.structure.masks, driver.counts
    train(driver, 3)
    runs.restore(everyone)
    assert all(torch.equal(one, masks[name]) for name, one in driver.structure.masks.items())
    train(driver, 2)
    runs.reset([1], [family_of("mlp").made(9, "adamw")])
    with pytest.raises(UserError, match=r"runs \[1\] have been reset"):
        driver.update()
    only = np.arange(len(METHODS)) == 1
    others = picture(driver.structure)
    driver.begin(only)
    assert differing(others, picture(driver.structure), torch.from_numpy(~only)) == []
    assert all(one[1] == counts[name][1] for name, one in driver.counts.items())
    train(driver, 2)
    assert_masked(driver.structure)


def test_weights_of_inactive_units_neither_count_nor_live() -> None:
    structure = Stacked(population("mlp", width=0.5, steps=0))
    whole = SparseTraining(stacked("mlp", steps=0), density=0.4)
    driver = SparseTraining(structure, ["rigl", "set", "prune-magnitude"], density=0.4, every=4)
    assert all((one[:2] < whole.counts[name][:2]).all() for name, one in driver.counts.items())
    counts = driver.counts
    train(driver, 3)
    assert_held(structure)
    for name, one in driver.counts.items():
        assert torch.equal(one[:2], counts[name][:2])
    idle = ~structure.active["layers.0"][2]
    assert structure.masks["layers.0.weight"][2][idle].all()  # dense runs stay so where units wake later
    structure.grow(0.25, "random")
    train(driver, 2)
    assert_masked(structure)


def test_masks_can_be_given() -> None:
    structure = stacked("mlp", runs=2, steps=0)
    masks = {
        name: torch.arange(one.numel()).view(one.shape) % 3 == 0
        for name, one in structure.masks.items()
        if name.endswith("weight")
    }
    driver = SparseTraining(structure, "static", masks=masks)
    assert all(torch.equal(one, structure.masks[name]) for name, one in masks.items())
    with pytest.raises(UserError, match="give those of"):
        driver.begin(masks={"layers.0.weight": masks["layers.0.weight"]})


def test_nothing_waits_for_the_device() -> None:
    driver = everything(end=1.0)
    train(driver, 1)
    driver.structure.population.advance(4)
    with NoWaiting():
        assert driver.update() is not None
        driver.begin()


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        ("rigll", {}, "did you mean 'rigl'"),
        (["rigl"], {}, "there are 1 methods"),
        ("rigl", {"density": 0.0}, "density of rigl"),
        ("rigl", {"density": np.ones(5)}, "one for each of 2 runs"),
        ("rigl", {"gamma": 0.5}, "setting of rigl"),
        ("set", {"every": 2.5}, "whole number"),
        ("set", {"distribution": "er-k"}, "unknown distribution"),
        ("set", {"layers": ["layers.0.wait"]}, "did you mean"),
        ("set", {"layers": ["layers.0.bias"]}, "two or more axes"),
        ("set", {"layers": []}, "give the names of layers"),
    ],
)
def test_what_does_not_fit_is_refused(methods: object, settings: dict[str, object], message: str) -> None:
    structure = stacked("mlp", runs=2)
    with pytest.raises(UserError, match=message):
        SparseTraining(structure, methods, **settings)  # type: ignore[arg-type]
    assert structure.population._feed.live is None


def test_single_layers_are_masked() -> None:
    structure = stacked("mlp", steps=0)
    driver = SparseTraining(structure, "rigl", layers=["layers.1.weight"], density=0.25, every=2)
    train(driver, 3)
    live = {name: float(one.float().mean()) for name, one in structure.masks.items()}
    assert live.pop("layers.1.weight") == 0.25 and set(live.values()) == {1.0}


def test_updates_are_pure() -> None:
    """What is given to an update is not written to."""
    driver = everything()
    driver.structure.population.advance(4)
    layers, _ = driver._state()
    copies = [{name: one.clone() for name, one in part.items()} for part in layers]
    table = Timetable(METHODS, {"density": 0.3, "every": 4})
    plan = table.plan(np.zeros(5, dtype=np.int64), np.full(5, 4), np.full(5, 100))
    assert plan is not None and plan.due.tolist() == [name != "static" for name in METHODS]
    draws = Draws(torch.arange(5), (5,), torch.device("cpu"))
    updated_masks(layers, plan, dense_gradient(driver.structure.population), "erk", draws, frozenset())
    for part, old in zip(layers, copies, strict=True):
        assert all(torch.equal(one, old[name]) for name, one in part.items())
