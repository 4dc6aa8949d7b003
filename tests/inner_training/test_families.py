"""What is particular to each of the built-in families."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.inner_training.families import MAKERS, draws, each_mlp, family_of
from trimtab.inner_training.networks import MLP
from trimtab.inner_training.tasks.classification import MLPFamily, Variation
from trimtab.inner_training.tasks.teacher import RAREST, balanced_classes


@each_mlp
def test_noise_is_on_training_labels_only(name: str) -> None:
    noisy, clean = (MAKERS[name]() for _ in range(2))
    assert isinstance(noisy, MLPFamily)
    assert isinstance(clean, MLPFamily)
    clean.variation = Variation(label_noise=0.0)
    wrong = expected = 0.0
    without = 0
    for seed in range(40):
        pair = [family.draw(seed, held_out=False) for family in (noisy, clean)]
        train = pair[0].sizes[0]
        np.testing.assert_array_equal(pair[0].rows, pair[1].rows)
        np.testing.assert_array_equal(pair[0].labels[train:], pair[1].labels[train:])
        wrong += float((pair[0].labels != pair[1].labels).sum())
        expected += pair[0].traits["label_noise"] * train
        without += pair[0].traits["label_noise"] == 0
        assert 0 <= pair[0].traits["label_noise"] <= 0.3
    assert wrong == pytest.approx(expected, rel=0.2)
    assert 8 <= without <= 32


@each_mlp
def test_variation_covers_its_ranges(name: str) -> None:
    instances = draws(name, 300, held_out=False)
    scales = [instance.input_scale for instance in instances]
    inits = [instance.traits["init_scale"] for instance in instances]
    widths = [int(instance.buffers["gate0"].sum()) for instance in instances]
    for values, low, high in ((scales, 0.3, 3.0), (inits, 0.5, 2.0), (widths, 8, 64)):
        assert low <= min(values) < 1.15 * low
        assert high / 1.15 < max(values) <= high
    assert widths == [instance.traits["width"] for instance in instances]
    assert all(gate.sum() == instance.traits["width"] for instance in instances for gate in instance.buffers.values())


def test_digits_networks() -> None:
    described = {}
    for name in ("digits-mlp", "digits-mlp-deep", "digits-mlp-tanh"):
        module = family_of(name).module
        assert isinstance(module, MLP)
        assert (module.inputs, module.hidden, module.outputs) == (64, 64, 10)
        described[name] = (module.depth, module.activation)
    assert described == {"digits-mlp": (1, "relu"), "digits-mlp-deep": (3, "relu"), "digits-mlp-tanh": (2, "tanh")}


def test_digits_pixel_orders() -> None:
    table = family_of("digits-mlp").inputs.reshape(8, 1797, 64)
    assert 0 <= table.min() < table.max() <= 1
    for variant in range(8):
        assert torch.equal(table[variant].sort(dim=1).values, table[0].sort(dim=1).values)
        assert not any(torch.equal(table[variant], table[other]) for other in range(variant))
    orders = [
        {int(row) // 1797 for one in draws("digits-mlp", 60, held_out=held_out) for row in one.rows}
        for held_out in (False, True)
    ]
    assert orders == [{0, 1, 2, 3}, {4, 5, 6, 7}]


def test_digits_labels_are_the_digits() -> None:
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    family = MAKERS["digits-mlp"]()
    assert isinstance(family, MLPFamily)
    family.variation = Variation(label_noise=0.0)
    np.testing.assert_allclose(family.inputs[:1797].numpy(), images / 16)
    for seed in range(30):
        instance = family.draw(seed, held_out=bool(seed % 2))
        named = np.array(instance.traits["digits"])
        assert 3 <= len(named) == instance.traits["classes"] <= 10
        assert 100 <= instance.rows.size <= 850
        np.testing.assert_array_equal(named[instance.labels], digits[instance.rows % 1797])


def test_tabular_data_sets() -> None:
    seen = {}
    for instance in draws("tabular-mlp", 60, held_out=False):
        name, used = instance.traits["data_set"], instance.parameters["layers.0.weight"].any(0).sum()
        seen[name] = (instance.traits["classes"], int(used))
        values = family_of("tabular-mlp").inputs[torch.tensor(instance.rows)]
        assert (values[:, used:] == 0).all()
        assert values.abs().max() < 15
        assert instance.rows.size >= 60
    assert seen == {"iris": (3, 4), "wine": (3, 13), "breast-cancer": (2, 30)}


def test_teacher_classes_are_balanced() -> None:
    family = MAKERS["teacher-mlp"]()
    assert isinstance(family, MLPFamily)
    family.variation = Variation(label_noise=0.0)
    for seed in range(60):
        instance = family.draw(seed, held_out=False)
        counts = np.bincount(instance.labels, minlength=instance.traits["classes"])
        assert counts.min() >= math.floor(RAREST * instance.rows.size / instance.traits["classes"])
        assert 200 <= instance.rows.size <= 1000


def test_bins_when_the_largest_output_would_be_unbalanced() -> None:
    values = np.random.default_rng(0).normal(size=100)
    labels = balanced_classes(np.stack([values, values - 1, values - 2, values - 3], axis=1))
    assert np.bincount(labels).tolist() == [25, 25, 25, 25]
    assert (np.diff(labels[values.argsort()]) >= 0).all()
