"""Families of files, from small files written in the real formats."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.inner_training.files import (
    PIXELS,
    cifar_bytes,
    write_cifar10,
    write_cifar100,
    write_images,
    write_npz,
    write_pictures,
    write_targets,
    write_text,
)
from trimtab.envs.parts import FamilyShare
from trimtab.envs.scenario import Scenario
from trimtab.errors import ConfigError, UserError
from trimtab.inner_training.networks.convnets import ConvNet
from trimtab.inner_training.population import Population
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.task import OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks import resolve_family
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.local_files import FORMATS, common
from trimtab.inner_training.tasks.local_files.cifar import cifar_task
from trimtab.inner_training.tasks.local_files.common import chosen
from trimtab.inner_training.tasks.local_files.image_folder import image_folder_task
from trimtab.inner_training.tasks.local_files.npz import npz_task

ROOT = Path(__file__).parents[2]

MADE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "cifar10": (write_cifar10, "batches", "cifar10"),
    "cifar100": (write_cifar100, "batches", "cifar100"),
    "image-folder": (write_images, "insects", "image-folder"),
    "npz": (write_npz, "table.npz", "npz"),
    "npz-images": (write_pictures, "table.npz", "npz"),
    "npz-targets": (write_targets, "table.npz", "npz"),
    "text": (write_text, "squares.txt", "text"),
}
each_format = pytest.mark.parametrize("kind", MADE)


def made(kind: str, folder: Path) -> TaskFamily:
    write, name, form = MADE[kind]
    return resolve_family(f"{form}:{write(folder / name)}")


def test_every_format_is_tested() -> None:
    assert {form for _, _, form in MADE.values()} == set(FORMATS)


@each_format
def test_a_file_becomes_runs_that_learn(kind: str, tmp_path: Path) -> None:
    family = made(kind, tmp_path)
    population = Population(family, 2, mode="eager")
    settings = {"optimizer": OptimizerSettings(rule="adam", lr=0.005), "schedule": BaseSchedule()}
    instances = [replace(family.draw(seed, held_out=bool(seed)), **settings) for seed in range(2)]  # type: ignore[arg-type]
    population.reset([0, 1], instances)
    before = population.evaluate("train")
    population.advance(30)
    after = population.evaluate("train")
    assert torch.isfinite(after).all()
    assert float(after.mean()) < 0.95 * float(before.mean())


@each_format
def test_held_out_instances_share_no_example(kind: str, tmp_path: Path) -> None:
    family = made(kind, tmp_path)
    seen, kept = (
        {row for seed in range(20) for row in family.draw(seed, held_out=held_out).rows.tolist()}
        for held_out in (False, True)
    )
    assert seen.isdisjoint(kept)
    assert len(seen | kept) == len(family.inputs)


@each_format
def test_instances_do_not_depend_on_where_the_data_lies(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    here, there = made(kind, tmp_path), made(kind, tmp_path / "elsewhere")
    assert here is not there
    assert here.draw(3, held_out=True).fingerprint() == there.draw(3, held_out=True).fingerprint()


def test_cifar10_images_and_labels(tmp_path: Path) -> None:
    task = cifar_task(write_cifar10(tmp_path), examples=None)
    records = np.concatenate([cifar_bytes(20, 10, number) for number in range(1, 7)])
    assert task.inputs.shape == (120, 3, 32, 32)
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float64)
    expected = (pixels - pixels.mean((0, 2, 3), keepdims=True)) / pixels.std((0, 2, 3), keepdims=True)
    np.testing.assert_allclose(task.inputs.numpy(), expected, atol=1e-4)
    for held_out in (False, True):
        instance = task.draw(0, held_out=held_out)
        np.testing.assert_array_equal(instance.labels, records[instance.rows, 0])


@pytest.mark.parametrize(("classes", "byte"), [(100, 1), (20, 0)])
def test_cifar100_has_fine_and_coarse_labels(classes: int, byte: int, tmp_path: Path) -> None:
    task = cifar_task(write_cifar100(tmp_path), classes=classes)
    records = np.concatenate([cifar_bytes(200, 100, 1), cifar_bytes(100, 100, 2)])
    instance = task.draw(1, held_out=False)
    np.testing.assert_array_equal(instance.labels, records[instance.rows, byte])
    assert task.loss_cap == pytest.approx(2 * np.log(classes))


def test_one_cifar_file(tmp_path: Path) -> None:
    file = write_cifar10(tmp_path) / "test_batch.bin"
    cifar_bytes(60, 10, 1).tofile(file)
    assert len(cifar_task(file).inputs) == 60


def test_images_are_cropped_resized_and_scaled(tmp_path: Path) -> None:
    task = image_folder_task(write_images(tmp_path / "insects"), size=8)
    assert task.inputs.shape == (72, 3, 8, 8)
    torch.testing.assert_close(task.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(task.inputs.std((0, 2, 3)), torch.ones(3), atol=1e-2, rtol=0)
    brightness = [float(part.mean()) for part in task.inputs.split(24)]
    assert brightness == sorted(brightness)  # classes in alphabetical order, each brighter than the one before
    for held_out in (False, True):
        instance = task.draw(0, held_out=held_out)
        np.testing.assert_array_equal(instance.labels, instance.rows // 24)


def test_npz_arrays_are_standardised(tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).normal(3, [1, 10, 100, 1000, 1, 1], (120, 6))
    inputs[:, 4] = 7
    task = npz_task(write_npz(tmp_path / "table.npz", inputs=inputs))
    np.testing.assert_allclose(task.inputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(task.inputs.std(0, correction=0), [1, 1, 1, 1, 0, 1], atol=1e-4)
    regression = npz_task(write_targets(tmp_path / "targets.npz"))
    assert regression.label_dtype == torch.float32
    assert regression.loss_cap == pytest.approx(2)


def test_too_many_examples_are_thinned_out(tmp_path: Path) -> None:
    labels = np.r_[np.zeros(900, int), np.ones(100, int), np.full(2, 2), np.full(30, 3)]
    rows = chosen("some", labels, 50)
    counts = np.bincount(labels[rows])
    assert counts.sum() == rows.size == 50
    assert counts[2] == 2
    assert counts[1:].min() >= 2
    assert counts[3] >= common.KEPT
    assert counts[0] > 30
    np.testing.assert_array_equal(rows, chosen("some", labels, 50))
    assert rows.tolist() != chosen("other", labels, 50).tolist()
    np.testing.assert_array_equal(chosen("some", labels, None), np.arange(1032))
    np.testing.assert_array_equal(chosen("some", labels, 5000), np.arange(1032))
    assert len(npz_task(write_npz(tmp_path / "table.npz"), examples=60).inputs) == 60


@pytest.mark.parametrize(
    ("shape", "layers", "seen"),
    [((1, 4, 4), 1, 4), ((3, 8, 8), 1, 16), ((3, 32, 32), 3, 16), ((3, 256, 256), 5, 64), ((3, 20, 48), 2, 1)],
)
def test_the_default_network_halves_images(shape: tuple[int, int, int], layers: int, seen: int) -> None:
    network = common.image_network(shape, 7)
    assert isinstance(network, ConvNet)
    assert len(network.layers) == layers
    assert network.head.in_features == common.CHANNELS * seen
    assert network(torch.zeros(2, *shape)).shape == (2, 7)


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 10))

    task = cifar_task(write_cifar10(tmp_path), network=network)
    assert [tuple(parameter.shape) for parameter in task.module.parameters()] == [(10, PIXELS), (10,)]


def test_the_table_of_formats_is_light() -> None:
    code = "import sys, trimtab.inner_training.tasks.local_files; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_scenario_names_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "table.npz")
    monkeypatch.chdir(tmp_path)
    scenario = Scenario.of({"id": "mine", "families": ["npz:table.npz"]})
    family = resolve_family(scenario.families[0].name)
    assert isinstance(family, ArrayTask)
    assert family.name == "npz-table"
    assert family is resolve_family("npz:table.npz") is resolve_family(f"npz:{tmp_path / 'table.npz'}")
    assert FamilyShare(name="cifar10:/some where/else").share == 1
    for name in ("npz:", "npz", "csv:table.csv"):
        with pytest.raises(ConfigError, match="unknown task family .* npz:PATH"):
            Scenario.of({"id": "mine", "families": [name]})
    with pytest.raises(UserError, match="task family 'npz:' has no path; write npz:PATH"):
        resolve_family("npz:")


def test_the_user_home_is_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npz(tmp_path / "table.npz")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_family("npz:~/table.npz") is resolve_family(f"npz:{tmp_path}/table.npz")


def test_page_of_local_data() -> None:
    page = ROOT / "docs" / "local_data.md"
    text = page.read_text(encoding="utf-8")
    for form in FORMATS:
        assert f"| `{form}:PATH` |" in text
    results = doctest.testfile(str(page), module_relative=False)
    assert results.failed == 0
    assert results.attempted > 0
