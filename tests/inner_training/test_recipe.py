"""Recipes stay in their ranges and cover them; streams and splits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.inner_training.families import each_mlp, family_of
from trimtab.errors import UserError
from trimtab.inner_training.tasks.classification import MLPFamily
from trimtab.inner_training.tasks.recipe import (
    OPTIMIZER_KINDS,
    USUAL_KINDS,
    RecipeRange,
    draw_recipe,
    halves,
    log_uniform,
    noisy_labels,
    rng_for,
    split_sizes,
)
from trimtab.inner_training.update_rules import DEFAULT_RULES, UPDATE_RULES

GOLDEN = [
    ("adam", 0.00012, 4, 850),
    ("adam", 0.063366, 8, 400),
    ("sgd-nesterov", 0.001563, 64, 250),
    ("sgd-momentum", 0.000886, 4, 400),
]


@pytest.mark.parametrize("kind", OPTIMIZER_KINDS)
@each_mlp
def test_rates_cover_more_than_three_decades(name: str, kind: str) -> None:
    family = family_of(name)
    assert isinstance(family, MLPFamily)
    rng = np.random.default_rng(0)
    recipes = [draw_recipe(rng, replace(family.recipe, kinds=(kind,)), 60) for _ in range(500)]
    rates = np.log10([recipe.optimizer.lr for recipe in recipes])
    assert np.ptp(rates) >= 3.5
    # Uniform in the logarithm and independent of the rest: each of four equal parts gets about a quarter.
    low = {"sgd": -4, "lion": -5 - np.log10(5)}.get(kind.partition("-")[0], -5)
    assert np.histogram(rates, bins=4, range=(low, low + 4))[0].min() > 90
    assert {recipe.kind for recipe in recipes} == {kind}


def test_shares_of_recipes() -> None:
    rng = np.random.default_rng(0)
    recipes = [draw_recipe(rng, RecipeRange(), 500) for _ in range(4000)]
    kinds = [recipe.kind for recipe in recipes]
    for kind, share in USUAL_KINDS.items():
        assert kinds.count(kind) / 4000 == pytest.approx(share, abs=0.03)
    assert np.mean([recipe.schedule.kind == "constant" for recipe in recipes]) == pytest.approx(0.5, abs=0.03)
    assert {recipe.schedule.kind for recipe in recipes} == {"constant", *RecipeRange().schedules}
    assert {recipe.batch_size for recipe in recipes} == {4, 8, 16, 32, 64}
    assert {recipe.steps for recipe in recipes} == set(range(200, 1001, 50))
    for recipe in recipes:
        settings = recipe.optimizer
        assert settings.nesterov == (recipe.kind == "sgd-nesterov")
        assert (settings.momentum == 0) == (recipe.kind == "sgd")
        assert 0 <= settings.momentum < 1
        low, high = (1e-3, 1e-1) if settings.rule == "adamw" else (1e-5, 1e-2)
        assert settings.weight_decay == 0 or low <= settings.weight_decay <= high
    assert np.mean([recipe.optimizer.weight_decay == 0 for recipe in recipes]) == pytest.approx(0.5, abs=0.03)


def test_the_usual_draw_stays_what_the_shipped_policy_was_trained_on() -> None:
    drawn = [draw_recipe(np.random.default_rng(seed), RecipeRange(), 500) for seed in range(4)]
    assert [(one.kind, round(one.optimizer.lr, 6), one.batch_size, one.steps) for one in drawn] == GOLDEN


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZER_KINDS if kind not in USUAL_KINDS])
def test_other_kinds_are_drawn_where_they_are_named(kind: str) -> None:
    ranges, rng = RecipeRange(kinds=(kind,)), np.random.default_rng(0)
    drawn = [draw_recipe(rng, ranges, 500).optimizer for _ in range(60)]
    rule = UPDATE_RULES[kind.partition("-")[0]]
    assert ranges.rules == (*DEFAULT_RULES, rule.name)
    assert {one.rule for one in drawn} == {rule.name}
    assert {one.beta2 for one in drawn} == {{"rmsprop": 0.99, "lion": 0.99}.get(rule.name, 0.999)}
    usual = {"rmsprop": 0.0, "muon": 0.95}.get(kind, 0.9)
    assert np.mean([one.momentum == usual for one in drawn]) == (pytest.approx(0.5, abs=0.2) if "-" in kind else 1)
    decays = [one.weight_decay for one in drawn if one.weight_decay]
    low, high = (1e-3, 1e-1) if rule.decoupled else (1e-5, 1e-2)
    factor = 5 if kind == "lion" else 1
    assert factor * low <= min(decays) and max(decays) <= factor * high * (1 + 1e-12)


@given(
    train=st.integers(1, 300),
    low=st.integers(1, 16),
    span=st.integers(1, 16),
    steps=st.tuples(st.integers(10, 300), st.integers(0, 2000)),
    multiple=st.integers(1, 10),
    seed=st.integers(0, 100),
)
def test_recipes_stay_in_any_range(
    train: int, low: int, span: int, steps: tuple[int, int], multiple: int, seed: int
) -> None:
    ranges = RecipeRange(batch=(low, low * span), steps=(steps[0], sum(steps) + multiple), steps_multiple=multiple)
    recipe = draw_recipe(np.random.default_rng(seed), ranges, train)
    assert 1 <= recipe.batch_size <= min(train, low * span)
    assert recipe.batch_size >= min(train, low)
    assert recipe.steps % multiple == 0
    assert ranges.steps[0] <= recipe.steps <= ranges.steps[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, "kinds is empty"),
        ({"kinds": ("adamm",)}, "unknown optimizer 'adamm'; did you mean 'adam'"),
        ({"schedules": ("cosin",)}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"sgd_lr": (0.0, 1.0)}, r"sgd_lr is \(0.0, 1.0\)"),
        ({"adam_lr": (0.1, float("nan"))}, "adam_lr is"),
        ({"batch": (64, 4)}, r"batch is \(64, 4\)"),
        ({"one_minus_momentum": (0.1, 1.5)}, "one_minus_momentum is 1.5"),
        ({"steps_multiple": 0}, "steps_multiple is 0; it must be at least 1"),
        ({"steps": (60, 90)}, r"steps is \(60, 90\); it must include a multiple of steps_multiple, 50"),
    ],
)
def test_recipe_range_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RecipeRange(**options)  # type: ignore[arg-type]


def test_streams_of_instances() -> None:
    arguments = [
        (name, seed, held_out) for name in ("a", "b") for seed in (0, 1, 2**32, 2**63) for held_out in (False, True)
    ]
    first = {rng_for(*each).bytes(16) for each in arguments}
    assert len(first) == len(arguments)
    assert rng_for("a", 3, True).bytes(16) == rng_for("a", 3, True).bytes(16)
    with pytest.raises(UserError, match="seed is -1; it must be at least 0"):
        rng_for("a", -1, False)


@given(count=st.integers(7, 5000))
def test_split_sizes(count: int) -> None:
    sizes = split_sizes(count)
    assert sum(sizes) == count
    assert min(sizes) >= 1
    np.testing.assert_allclose(sizes, [0.6 * count, 0.15 * count, 0.25 * count], atol=1.01)


def test_halves_are_fixed_and_complete() -> None:
    first, second = halves("data", 101)
    assert (first.size, second.size) == (50, 51)
    assert sorted([*first, *second]) == list(range(101))
    np.testing.assert_array_equal(halves("data", 101)[0], first)
    assert not np.array_equal(halves("other", 101)[0], first)


@given(low=st.floats(1e-6, 10), ratio=st.floats(1, 1e6), seed=st.integers(0, 50))
def test_log_uniform_is_within_its_ends(low: float, ratio: float, seed: int) -> None:
    assert low <= log_uniform(np.random.default_rng(seed), low, low * ratio) <= low * ratio


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_noisy_labels(share: float) -> None:
    labels = np.arange(5000) % 4
    noisy = noisy_labels(np.random.default_rng(0), labels, 4, share)
    assert np.mean(noisy != labels) == pytest.approx(share, abs=0.02)
    assert set(noisy.tolist()) == {0, 1, 2, 3}
    assert (labels == np.arange(5000) % 4).all()
    if share == 1:
        steps = np.bincount((noisy - labels) % 4, minlength=4)
        assert steps[0] == 0
        assert steps[1:].min() > 1500
