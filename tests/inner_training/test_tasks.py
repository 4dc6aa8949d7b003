"""Promises that every family keeps."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap

from tests.inner_training.families import (
    MAKERS,
    answer_shape,
    different,
    draws,
    each_family,
    each_mlp,
    examples,
    family_of,
    fingerprints,
)
from trimtab.inner_training.schedules import SCHEDULES
from trimtab.inner_training.task import SPLITS
from trimtab.inner_training.tasks import FAMILIES
from trimtab.inner_training.tasks.recipe import RecipeRange

ROOT = Path(__file__).parents[2]
MEMORISED = ("random-label-digits", "changing-regression")  # their splits are the same examples, on purpose


def test_instances_do_not_depend_on_the_process() -> None:
    code = "import json; from tests.inner_training.families import fingerprints; print(json.dumps(fingerprints()))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in MAKERS:
        draws(name, 3, held_out=True)  # what was drawn before makes no difference
    assert json.loads(done.stdout) == fingerprints()


@each_family
def test_seeds_and_roles_differ(name: str) -> None:
    instances = draws(name, 30, held_out=False) + draws(name, 30, held_out=True)
    assert len({instance.fingerprint() for instance in instances}) == 60
    assert len({instance.key for instance in instances}) == 60
    assert len({instance.seed for instance in instances}) == 60


@each_family
def test_splits_of_a_phase_share_no_example(name: str) -> None:
    for instance in draws(name, 50, held_out=False) + draws(name, 50, held_out=True):
        total = sum(sum(phase.sizes) for phase in instance.all_phases)
        assert total == instance.rows.size == instance.labels.size <= family_of(name).max_examples
        assert instance.all_phases[0].sizes == instance.sizes
        for number, phase in enumerate(instance.all_phases):
            parts = [examples(name, instance)[instance.split(split, number)].tolist() for split in SPLITS]
            assert tuple(len(part) for part in parts) == phase.sizes
            assert min(phase.sizes) >= 1
            if name not in MEMORISED:
                train, validation, test = (set(part) for part in parts)
                assert not train & validation and not train & test and not validation & test


@each_family
def test_phases_are_those_of_the_family(name: str) -> None:
    family = family_of(name)
    for instance in draws(name, 20, held_out=False):
        first = [phase.first_step for phase in instance.all_phases]
        assert len(first) == family.max_phases
        assert first[0] == 0 and first[-1] < instance.steps
        assert len(set(np.diff([*first, instance.steps]))) == 1  # all are equally long


@each_family
def test_held_out_instances_share_no_example_with_training(name: str) -> None:
    seen = {row for instance in draws(name, 200, held_out=False) for row in examples(name, instance).tolist()}
    kept = {row for instance in draws(name, 200, held_out=True) for row in examples(name, instance).tolist()}
    assert seen.isdisjoint(kept)
    if len(family_of(name).inputs) < 100_000:  # a table too large to be seen in so few draws says nothing
        assert min(len(seen), len(kept)) > 0.4 * different(name)


def test_digits_families_share_their_halves() -> None:
    names = [name for name in FAMILIES if "digits" in name]
    assert len(names) > 5
    seen, kept = (
        {row for name in names for one in draws(name, 60, held_out=held_out) for row in examples(name, one).tolist()}
        for held_out in (False, True)
    )
    assert seen.isdisjoint(kept)


@each_family
def test_arrays_fit_the_family(name: str) -> None:
    family = family_of(name)
    shapes = {key: tuple(value.shape) for key, value in family.module.named_parameters()}
    buffers = {key: tuple(value.shape) for key, value in family.module.named_buffers()}
    for instance in draws(name, 20, held_out=False) + draws(name, 20, held_out=True):
        assert [(key, value.shape) for key, value in instance.parameters.items()] == list(shapes.items())
        assert [(key, value.shape) for key, value in instance.buffers.items()] == list(buffers.items())
        assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in instance.parameters.values())
        assert instance.rows.dtype == np.int64
        assert 0 <= instance.rows.min() <= instance.rows.max() < len(family.inputs)
        assert torch.from_numpy(instance.labels).dtype == family.label_dtype
        if family.label_dtype == torch.int64:
            outputs = answer_shape(family)[-1]
            assert 0 <= instance.labels.min() <= instance.labels.max() < outputs
            assert instance.labels.max() < instance.traits.get("classes", outputs)
        json.dumps(dict(instance.traits))
    assert family.inputs.dtype == torch.float32 or not family.inputs.is_floating_point()


@each_family
def test_recipes_are_within_their_ranges(name: str) -> None:
    family = family_of(name)
    instances = draws(name, 200, held_out=False)
    assert len({instance.optimizer.rule for instance in instances}) == 3
    for instance in instances:
        assert 1 <= instance.batch_size <= min(family.max_batch, instance.sizes[0])
        assert math.log2(instance.batch_size).is_integer()
        assert instance.steps % 10 == 0
        assert 200 <= instance.steps <= 1000
        ranges = getattr(family, "recipe", RecipeRange())
        low, high = ranges.sgd_lr if instance.optimizer.rule == "sgd" else ranges.adam_lr
        assert low <= instance.optimizer.lr <= high
        assert instance.schedule.kind in SCHEDULES
        assert instance.input_scale > 0


def generator_states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), kind, keys.tolist(), rest, random.getstate()


@each_family
def test_global_generators_are_left_alone(name: str) -> None:
    before = generator_states()
    made = MAKERS[name]()
    made.draw(0, held_out=False)
    made.draw(0, held_out=True)
    assert generator_states() == before


@each_family
@given(losses=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=8))
def test_bounded_loss(name: str, losses: list[float]) -> None:
    family = family_of(name)
    bounded = family.bounded(np.array(losses))
    assert ((family.loss_floor <= bounded) & (bounded <= family.loss_cap)).all()
    finite = np.sort([loss for loss in losses if math.isfinite(loss)])
    assert (np.diff(family.bounded(finite)) >= 0).all()
    inside = finite[(finite >= family.loss_floor) & (finite <= family.loss_cap)]
    assert (family.bounded(inside) == inside).all()
    assert (bounded[~np.isfinite(losses)] == family.loss_cap).all()


@each_family
def test_loss_of_each_example(name: str) -> None:
    family = family_of(name)
    rng = torch.Generator().manual_seed(0)
    *places, width = answer_shape(family)  # a language model answers at every place
    outputs = 5 * torch.randn(3, 6, *places, width, generator=rng)
    if family.label_dtype == torch.int64:
        labels = torch.randint(0, width, (3, 6, *places), generator=rng)
        each = nn.functional.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="none")
        expected = each.view(3, 6, -1).mean(-1)
    else:
        labels = torch.randn(3, 6, generator=rng)
        expected = nn.functional.mse_loss(outputs[..., 0], labels, reduction="none") / (2 if name == "quadratic" else 1)
    torch.testing.assert_close(vmap(family.loss)(outputs, labels), expected)
    torch.testing.assert_close(family.loss(outputs[0], labels[0]), expected[0])


def test_loss_bounds_start_from_guessing() -> None:
    for name, outputs in (("digits-mlp", 10), ("tabular-mlp", 3), ("teacher-mlp", 8), ("images", 3)):
        assert family_of(name).loss_cap == pytest.approx(2 * math.log(outputs))


@each_mlp
def test_something_can_be_learned(name: str) -> None:
    family = family_of(name)
    ratios = []
    for seed, instance in enumerate(draws(name, 6, held_out=True)):
        parameters = {key: torch.tensor(value, requires_grad=True) for key, value in instance.parameters.items()}
        buffers = {key: torch.tensor(value) for key, value in instance.buffers.items()}
        inputs = family.inputs[torch.tensor(instance.rows)] * instance.input_scale
        labels = torch.tensor(instance.labels)
        optimizer = torch.optim.Adam(parameters.values(), lr=0.005)
        rng = np.random.default_rng(seed)
        for _ in range(120):
            batch = torch.tensor(rng.integers(0, instance.sizes[0], 32))
            outputs = functional_call(family.module, {**parameters, **buffers}, (inputs[batch],))
            optimizer.zero_grad()
            family.loss(outputs, labels[batch]).mean().backward()
            optimizer.step()
        test = instance.split("test")
        with torch.no_grad():
            outputs = functional_call(family.module, {**parameters, **buffers}, (inputs[test],))
        ratios.append(family.loss(outputs, labels[test]).mean().item() / math.log(instance.traits["classes"]))
    assert np.mean(ratios) < 0.85
