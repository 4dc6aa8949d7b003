"""Masks of single weights: held at zero under every update rule, undone, rolled back, and free for those without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.inner_training.structure.populations import assert_held, differing, family_of, picture, stacked
from trimtab.errors import UserError
from trimtab.inner_training.structure.stacked import Stacked
from trimtab.inner_training.update_rules import UPDATE_RULES

RULES = tuple(UPDATE_RULES)


def some(structure: Stacked, seed: int = 0) -> dict[str, Tensor]:
    """Random masks of all weight matrices."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, shape in structure.population.layout.shapes.items() if len(shape) > 1}
    return {name: torch.rand((structure._num_runs, *shape), generator=draws) < 0.6 for name, shape in shapes.items()}


def assert_masked(structure: Stacked) -> None:
    for value in structure.population._learner[:3]:
        views = structure.population.layout.views(value)
        for name, live in structure.masks.items():
            assert not views[name][~live].any(), name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mlp", "conv", "vit"])
def test_masked_weights_stay_at_zero(name: str, rule: str) -> None:
    structure = stacked(name, (rule,), runs=2)
    structure.mask(some(structure))
    before = structure.population._learner.parameters
    structure.population.advance(5)
    assert_masked(structure)
    assert (structure.population._learner.parameters != before).any(1).all()


def test_masked_weights_stay_at_zero_under_all_rules_together() -> None:
    structure = stacked("mlp", RULES, runs=len(RULES))
    structure.mask(some(structure))
    structure.population.advance(5)
    assert_masked(structure)


def test_a_masked_run_is_one_whose_gradients_are_masked() -> None:
    structure = stacked("mlp", ("sgd",), runs=2)
    runs, masks = structure.population, some(structure)
    structure.mask(masks)
    model = torch.nn.ParameterDict({name.replace(".", "_"): value for name, value in runs.parameters_of(0).items()})
    x, y = runs.batch(0, int(runs.steps_done[0]))
    layers = [(model[f"layers_{place}_weight"], model[f"layers_{place}_bias"]) for place in range(3)]
    h = x
    for weight, bias in layers[:2]:
        h = torch.relu(h @ weight.mT + bias)
    runs.family.loss(h @ layers[2][0].mT + layers[2][1], y).mean().backward()
    settings = runs.instances[0].optimizer
    runs.advance(1)
    for name, value in runs.parameters_of(0).items():
        old = model[name.replace(".", "_")]
        live = masks[name][0] if name in masks else torch.ones_like(old, dtype=torch.bool)
        expected = (old - settings.lr * (old.grad + settings.weight_decay * old)) * live
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-7)


def test_what_comes_to_life_begins_at_zero_and_learns() -> None:
    structure = stacked("mlp")
    structure.mask(some(structure, 0))
    structure.population.advance(2)
    old = structure.masks
    structure.mask(some(structure, 1))
    views = structure.population.layout.views(structure.population._learner.parameters)
    woken = structure.masks["layers.1.weight"] & ~old["layers.1.weight"]
    assert woken.any() and not views["layers.1.weight"][woken].any()
    structure.population.advance(2)
    assert_masked(structure)
    now = structure.population.layout.views(structure.population._learner.parameters)
    assert now["layers.1.weight"][woken].any()


def test_masks_are_undone_and_rolled_back() -> None:
    structure = stacked("conv")
    runs, everyone = structure.population, np.ones(3, dtype=bool)
    before = picture(structure)
    only = np.array([True, False, True])
    edit = structure.mask(some(structure), runs=only)
    assert differing({**before, "units.masked": torch.zeros(3, runs.layout.width, dtype=torch.bool)},
                     picture(structure), torch.from_numpy(~only)) == []  # fmt: skip
    assert edit.undo().tolist() == only.tolist()
    assert [name for name in differing(before, picture(structure)) if name != "units.masked"] == []
    assert all(live.all() for live in structure.masks.values())
    for _ in range(2):
        runs.snapshot(everyone)
    structure.mask(some(structure))
    runs.advance(1)
    runs.restore(everyone)
    assert all(live.all() for live in structure.masks.values())
    runs.advance(2)
    assert (runs._learner.parameters != 0).float().mean() > 0.7


def test_units_and_masks_go_together() -> None:
    structure = stacked("mlp")
    structure.mask(some(structure))
    structure.prune(0.4, structure.score("agf"))
    structure.population.advance(1)
    structure.grow(0.3, "random", newborn_state="transplant")
    structure.population.advance(1)
    structure.reset({"layers.0": structure.active["layers.0"]})
    assert_masked(structure)
    structure.population.advance(2)
    assert_masked(structure)
    assert_held(structure)


def test_a_reset_run_has_no_masks() -> None:
    structure = stacked("mlp")
    structure.mask(some(structure))
    structure.population.reset([1], [family_of("mlp").made(9, "adamw")])
    assert structure.masks["layers.0.weight"][1].all() and not structure.masks["layers.0.weight"][0].all()
    structure.population.advance(2)
    assert_masked(structure)


def test_populations_without_masks_have_none_in_their_step() -> None:
    structure = stacked("mlp")
    programs = structure.population._programs
    structure.prune(0.3, structure.score("agf"))
    assert structure.population._programs is programs and structure.population._feed.live is None
    assert structure._units.masked.shape == (3, 0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"layers.7.weight": torch.ones(3, 8, 8, dtype=torch.bool)}, "unknown parameter"),
        ({"layers.1.weight": torch.ones(8, 8, dtype=torch.bool)}, "give bool of"),
        ({"layers.1.weight": torch.ones(3, 8, 8)}, "give bool of"),
    ],
)
def test_bad_masks_are_refused(masks: dict[str, Tensor], message: str) -> None:
    structure = stacked("mlp")
    with pytest.raises(UserError, match=message):
        structure.mask(masks)
    assert structure.population._feed.live is None
