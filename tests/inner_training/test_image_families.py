"""Families of sprites and textures: their images, their labels, and which examples are kept apart."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

from tests.inner_training.families import draws, family_of
from trimtab.errors import MissingExtraError, UserError
from trimtab.inner_training.networks.convnets import ChannelNet
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.tasks import sprites, textures
from trimtab.inner_training.tasks.classification import Examples
from trimtab.inner_training.tasks.images import ImageFamily


def test_sprite_table() -> None:
    table, classes = sprites.sprite_table()
    assert table.shape == (9600, 1, 16, 16)
    assert table.dtype == np.float32
    assert classes.shape == (9600,)
    assert np.bincount(classes).tolist() == [600] * 16
    assert abs(table.mean()) < 0.05
    assert 0.3 < table.std() < 0.5
    assert len(np.unique(table.reshape(9600, -1), axis=0)) == 9600
    halves = table[:4800], table[4800:]
    assert halves[0].mean() < -0.2 < 0.2 < halves[1].mean()  # dark ground, light ground


def test_sprites_of_all_levels_are_noisy_as_said() -> None:
    blank = lambda u, v: np.full(np.broadcast_shapes(u.shape, v.shape), 9.0, dtype=np.float32)
    for noise in (0.0, *sprites.NOISE):
        drawn = sprites.draw_sprites(np.random.default_rng(0), blank, 400, sprites.TRAINING, noise)
        within = np.median(drawn.reshape(400, -1).std(1))  # the clutter covers few pixels: robust differences
        steps = np.abs(np.diff(drawn, axis=2))
        assert np.median(steps) == pytest.approx(0.954 * noise, rel=0.1, abs=1e-6)
        assert within >= 0.9 * noise


def test_shapes_can_be_told_apart() -> None:
    """Without rotation and noise, the image most like another is of the same shape."""
    upright = sprites.Style(rotation=0.0, inverted=False, clouds=False)
    rng, copies = np.random.default_rng(0), 150
    drawn = np.stack([sprites.draw_sprites(rng, shape, copies, upright, 0.0) for shape in sprites.SHAPES.values()])
    flat = drawn.reshape(16 * copies, -1) - drawn.reshape(16 * copies, -1).mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    likeness = flat @ flat.T
    np.fill_diagonal(likeness, -1)
    right = (likeness.argmax(1) // copies).reshape(16, copies) == np.arange(16)[:, None]
    assert right.mean(1).min() > 0.75  # 0.5 for two shapes that are the same


@pytest.mark.parametrize("name", ["sprites-conv", "sprites-resnet"])
def test_sprite_labels_are_the_shapes(name: str) -> None:
    family = family_of(name)
    assert isinstance(family, ImageFamily)
    classes = sprites.sprite_table()[1]
    shapes = list(sprites.SHAPES)
    for held_out in (False, True):
        for seed in range(30):
            data = family.examples(np.random.default_rng(seed), held_out)
            assert 4 <= data.classes <= 12
            assert max(200, 40 * data.classes) <= data.rows.size <= 1000
            assert ((data.rows >= 4800) == held_out).all()
            named = np.array([shapes.index(shape) for shape in data.traits["shapes"]])
            np.testing.assert_array_equal(named[data.labels], classes[data.rows])
            levels = np.unique(data.rows % 4800 // 1600)
            assert [sprites.NOISE[level] for level in levels] == [data.traits["pixel_noise"]]


def test_families_of_sprites_share_the_table() -> None:
    assert family_of("sprites-conv").inputs.data_ptr() == family_of("sprites-resnet").inputs.data_ptr()


# --- textures -----------------------------------------------------------------------------------------------------


def texture_draws(count: int) -> list[tuple[bool, Examples]]:
    return [
        (held_out, textures.texture_examples(np.random.default_rng(seed), held_out))
        for held_out in (False, True)
        for seed in range(count)
    ]


def test_texture_table() -> None:
    table, numbers = textures.texture_table()
    assert table.shape == (3456, 1, 16, 16)
    assert table.dtype == np.float32
    assert np.bincount(numbers).tolist() == [216] * 16
    for number in range(16):
        own = table[numbers == number]
        assert own.mean() == pytest.approx(0, abs=1e-4)
        assert own.std() == pytest.approx(1, abs=1e-4)


def test_tiles_are_pieces_of_the_image_that_do_not_overlap() -> None:
    image = np.arange(100 * 150, dtype=np.float32).reshape(100, 150)  # every pixel is its own place
    blocks = textures.blocks_of(image)
    assert blocks.shape == (2 * 3, 9, 16, 16)
    assert np.unique(blocks).size == blocks.size
    np.testing.assert_array_equal(blocks[0, 0], image[:16, :16])
    np.testing.assert_array_equal(blocks[4, 5], image[48 + 16 : 48 + 32, 48 + 32 : 48 + 48])


def test_texture_labels_are_the_images() -> None:
    numbers = textures.texture_table()[1]
    for held_out, data in texture_draws(40):
        stems = [Path(name).stem for name in textures.SOURCES[held_out]]
        named = np.array([stems.index(image) + 8 * held_out for image in data.traits["images"]])
        assert 3 <= data.classes == len(named) <= 6
        assert 400 <= data.rows.size == data.traits["examples"] <= 1000
        np.testing.assert_array_equal(named[data.labels], numbers[data.rows])


def test_splits_lie_in_different_squares() -> None:
    sizes = set()
    for name_seed, instance in enumerate(draws("textures-conv", 40, held_out=False)):
        squares = [set((instance.rows[instance.split(split)] // 9).tolist()) for split in ("train", "validation")]
        squares.append(set((instance.rows[instance.split("test")] // 9).tolist()))
        assert squares[0].isdisjoint(squares[1] | squares[2]), name_seed
        assert squares[1].isdisjoint(squares[2]), name_seed
        sizes.add(instance.rows.size)
    assert max(sizes) > 800


def test_every_class_is_in_every_split() -> None:
    for instance in draws("textures-conv", 30, held_out=True):
        for split in ("train", "validation", "test"):
            assert len(set(instance.labels[instance.split(split)].tolist())) == instance.traits["classes"]


def test_textures_name_the_extra_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'trimtab\[images\]'"):
        textures.texture_table.__wrapped__()


def test_an_image_that_is_not_shipped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures, "SOURCES", (("atlantis.png",), ()))
    with pytest.raises(UserError, match="does not ship the image 'atlantis.png'"):
        textures.texture_table.__wrapped__()


# --- families -----------------------------------------------------------------------------------------------------


SIZES = {"sprites-conv": ((8, 16), 16), "sprites-resnet": ((12, 12, 12), 16), "textures-conv": ((8, 32), 6)}


@pytest.mark.parametrize("name", SIZES)
def test_widths_and_outputs(name: str) -> None:
    family = family_of(name)
    assert isinstance(family.module, ChannelNet)
    gates = [gate.numel() for gate in family.module.buffers()]
    assert (tuple(gates), family.module.outputs) == SIZES[name]
    assert family.loss_cap == pytest.approx(2 * np.log(family.module.outputs))
    drawn = draws(name, 150, held_out=False)
    widths = {instance.traits["width"] for instance in drawn}
    assert (min(widths), max(widths)) == (3 * max(gates) // 8, max(gates))
    for instance in drawn:
        share = instance.traits["width"] / max(gates)
        assert [gate.sum() for gate in instance.buffers.values()] == [math.ceil(share * size) for size in gates]


@pytest.mark.parametrize("name", SIZES)
def test_stacked_runs_are_plain_runs(name: str) -> None:
    family = family_of(name)
    settings = OptimizerSettings(rule="sgd", lr=0.1, momentum=0.0)
    runs = [replace(one, optimizer=settings, schedule=BaseSchedule()) for one in draws(name, 3, held_out=True)]
    population = Population(family, 3, mode="eager", clip=False)
    population.reset(range(3), runs)
    population.advance(4)
    for place, run in enumerate(runs):
        values = {key: torch.tensor(value, requires_grad=True) for key, value in run.parameters.items()}
        buffers = {key: torch.tensor(value) for key, value in run.buffers.items()}
        for step in range(4):
            inputs, labels = population.batch(place, step)
            outputs = functional_call(family.module, {**values, **buffers}, (inputs,))
            functional.cross_entropy(outputs, labels).backward()
            with torch.no_grad():
                for value in values.values():
                    assert value.grad is not None
                    value -= settings.lr * value.grad
                    value.grad = None
        moved = population.parameters_of(place)
        assert any(np.abs(moved[key].numpy() - run.parameters[key]).max() > 1e-3 for key in values)
        for key, value in values.items():
            torch.testing.assert_close(moved[key], value.detach(), atol=1e-5, rtol=1e-4)
