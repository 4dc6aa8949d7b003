"""Families of files: small files written in the real formats, and every way in which one can be wrong."""

from __future__ import annotations

import doctest
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trimtab import cli
from trimtab.envs.scenario import FamilyShare, Scenario
from trimtab.errors import ConfigError, MissingExtraError, UserError
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
PIXELS = 3072


def cifar_bytes(count: int, classes: int, seed: int) -> np.ndarray:
    """Records as in the archives; the fine label of CIFAR-100 is 5 times the coarse one, and each class has its tint."""
    rng = np.random.default_rng(seed)
    fine = np.arange(count) % classes
    pixels = rng.integers(0, 128, (count, PIXELS)) + fine[:, None] % 100
    labels = [fine] if classes == 10 else [fine // 5, fine]
    return np.column_stack([*labels, pixels]).astype(np.uint8)


def write_cifar10(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(1, 6):
        cifar_bytes(20, 10, number).tofile(folder / f"data_batch_{number}.bin")
    cifar_bytes(20, 10, 6).tofile(folder / "test_batch.bin")
    return folder


def write_cifar100(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    cifar_bytes(200, 100, 1).tofile(folder / "train.bin")
    cifar_bytes(100, 100, 2).tofile(folder / "test.bin")
    return folder


def write_images(folder: Path, each: int = 24) -> Path:
    rng = np.random.default_rng(0)
    for number, (name, ending, mode) in enumerate((("ant", "png", "L"), ("bee", "jpg", "RGB"), ("cat", "bmp", "RGB"))):
        (folder / name / "more").mkdir(parents=True)
        for index in range(each):
            shape = (10 + index % 3, 12) if mode == "L" else (10 + index % 3, 12, 3)
            pixels = rng.integers(0, 100, shape) + 70 * number
            place = folder / name / ("more" if index % 2 else "") / f"{index}.{ending}"
            Image.fromarray(pixels.astype(np.uint8), mode=None).save(place)
        (folder / name / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    return folder


def write_npz(path: Path, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    arrays = {"inputs": 5 * rng.normal(size=(120, 6)) + labels[:, None], "labels": labels, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})  # type: ignore[arg-type]
    return path


def write_pictures(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (80, 1, 8, 8), dtype=np.uint8)
    return write_npz(path, inputs=pixels, labels=np.arange(80) % 2)


def write_targets(path: Path) -> Path:
    return write_npz(path, labels=1e3 + 50 * np.random.default_rng(0).normal(size=120))


MADE: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "cifar10": (write_cifar10, "batches", "cifar10"),
    "cifar100": (write_cifar100, "batches", "cifar100"),
    "image-folder": (write_images, "insects", "image-folder"),
    "npz": (write_npz, "table.npz", "npz"),
    "npz-images": (write_pictures, "table.npz", "npz"),
    "npz-targets": (write_targets, "table.npz", "npz"),
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


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 10))

    task = cifar_task(write_cifar10(tmp_path), network=network)
    assert [tuple(parameter.shape) for parameter in task.module.parameters()] == [(10, PIXELS), (10,)]


def truncated(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def cifar_without_class(folder: Path) -> Path:
    cifar_bytes(9, 10, 0).tofile(folder / "test_batch.bin")
    return folder


def cifar_mislabelled(folder: Path) -> Path:
    records = cifar_bytes(20, 10, 0)
    records[7, 0] = 10
    records.tofile(folder / "data_batch_3.bin")
    return folder


def pickled_cifar(folder: Path) -> Path:
    (folder / "data_batch_1").write_bytes(pickle.dumps({}))
    return folder


def images_with(folder: Path, *, empty: bool = False, torn: bool = False) -> Path:
    write_images(folder / "insects")
    if empty:
        (folder / "insects" / "dog").mkdir()
    if torn:
        truncated(folder / "insects" / "bee" / "2.jpg", 200)
    return folder / "insects"


def text_as(path: Path, text: str = "hello") -> Path:
    path.write_text(text)
    return path


def one_class(folder: Path) -> Path:
    (folder / "only").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "only" / "a.png")
    return folder


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


WRONG: list[tuple[str, Callable[[Path], Path], str]] = [
    (
        "cifar10",
        lambda at: at / "nowhere",
        "there is no file or folder .*nowhere'; download the binary version of CIFAR-10",
    ),
    (
        "cifar10",
        lambda at: at,
        r"holds none of data_batch_1.bin, .*; give the folder of the binary version of CIFAR-10",
    ),
    ("cifar10", pickled_cifar, "holds the Python version of CIFAR-10, which is pickled; download the binary version"),
    (
        "cifar10",
        lambda at: truncated(write_cifar10(at) / "test_batch.bin", 5000),
        r"test_batch.bin has 5000 bytes, which is no multiple of the 3073 of a record of CIFAR-10; .* download it again",
    ),
    ("cifar10", lambda at: truncated(write_cifar10(at) / "test_batch.bin", 0), "has 0 bytes"),
    ("cifar100", lambda at: write_cifar10(at) / "test_batch.bin", "no multiple of the 3074 of a record of CIFAR-100"),
    ("cifar10", cifar_mislabelled, "data_batch_3.bin: record 7 has label 10, but CIFAR-10 has labels 0 to 9"),
    ("cifar10", cifar_without_class, "class '9' has no example; give the folder with all files of CIFAR-10"),
    ("cifar10", lambda at: cifar_20(at), "number of examples is 20; it must be at least 40"),
    ("image-folder", lambda at: at / "nowhere", "there is no file or folder .* one folder of images for each class"),
    ("image-folder", lambda at: text_as(at / "a.txt"), "a.txt is a file; give a folder that holds one folder"),
    ("image-folder", lambda at: at, "holds no folders; give a folder that holds one folder of images for each class"),
    ("image-folder", one_class, "holds 1 class; give at least two"),
    ("image-folder", lambda at: images_with(at, empty=True), "class 'dog' has no example; put images .* or remove"),
    (
        "image-folder",
        lambda at: images_with(at, torn=True),
        r"cannot read image '.*bee/2.jpg' \(OSError: .*\); repair or",
    ),
    ("image-folder", lambda at: text_image(at), "cannot read image .*UnidentifiedImageError.* repair or remove it"),
    ("npz", lambda at: at / "nowhere.npz", "there is no file or folder .* that numpy.savez has written"),
    ("npz", lambda at: at, r"cannot be read as .npz \(IsADirectoryError"),
    ("npz", lambda at: text_as(at / "a.npz"), "cannot be read as .npz .* write it again from arrays of numbers"),
    ("npz", lambda at: text_as(at / "a.npz", ""), r"cannot be read as .npz \(EOFError"),
    ("npz", lambda at: truncated(write_npz(at / "a.npz"), 3000), r"cannot be read as .npz \(BadZipFile"),
    ("npz", lambda at: save(at / "a.npy", np.ones((50, 2))), "is a single array; it must hold the arrays 'inputs'"),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=None, y=np.ones(3)),
        "holds inputs, y but no 'labels'; it must hold",
    ),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.ones(120)), r"inputs have shape \(120,\) and labels \(120,\)"),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones((120, 1))), r"labels \(120, 1\); it must hold"),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones(119)), r"\(120, 6\) and labels \(119,\)"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), "a")), "inputs are of type <U1; give real"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), None)), "holds pickled objects"),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", inputs=np.full((120, 2), np.nan)),
        "inputs hold NaN, infinity or a number beyond",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.full(120, np.inf)),
        "labels hold NaN, infinity or a number beyond 1e.30; remove",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", inputs=np.linspace(0, 1e300, 240).reshape(120, 2)),
        "a number beyond 1e.30",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.arange(120) % 3 - 1),
        "labels go down to -1; number the classes",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=10**12 * (np.arange(120) % 2)),
        "class 1 has no example, but class 1000000000000 has; number the classes from 0 without gaps",
    ),
    (
        "npz",
        lambda at: write_npz(at / "a.npz", labels=np.zeros(120, int)),
        "every label is 0; give at least two classes",
    ),
    ("npz", lambda at: write_npz(at / "a.npz", labels=np.ones(120)), "labels that are all alike cannot be learned"),
    ("npz", lambda at: write_npz(at / "a.npz", inputs=np.ones((3, 2)), labels=np.arange(3)), "number of examples is 3"),
]


def cifar_20(folder: Path) -> Path:
    cifar_bytes(20, 10, 1).tofile(folder / "data_batch_1.bin")
    return folder


def text_image(folder: Path) -> Path:
    text_as(write_images(folder / "insects") / "cat" / "4.bmp")
    return folder / "insects"


@pytest.mark.parametrize(("form", "write", "message"), WRONG, ids=[f"{form}-{text[:40]}" for form, _, text in WRONG])
def test_what_is_wrong_is_said_in_one_line(
    form: str, write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        resolve_family(f"{form}:{path}")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_options_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classes is 50; give 10 for CIFAR-10, 100 or 20"):
        cifar_task(tmp_path, classes=50)
    with pytest.raises(UserError, match="size is 1000; it must be between 4 and 256"):
        image_folder_task(tmp_path, size=1000)
    with pytest.raises(UserError, match="examples is 10; it must be at least 40"):
        npz_task(write_npz(tmp_path / "a.npz"), examples=10)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 9)), r"to shape \(2, 9\); .* it must be \(2, 10\)"),
        (
            lambda: nn.Linear(5, 10),
            r"fails on two examples of shape \(2, 3, 32, 32\) .* make the module and the inputs fit",
        ),
    ],
)
def test_networks_that_do_not_fit(network: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        cifar_task(write_cifar10(tmp_path), network=network)
    assert str(caught.value).startswith(str(tmp_path))


class Counter(nn.Module):
    """Counts its calls in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(x)


@pytest.mark.parametrize(
    "network",
    [
        Counter,
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)),
    ],
    ids=["buffer", "batch-norm", "dropout"],
)
def test_networks_that_cannot_be_stacked(network: Callable[[], nn.Module], tmp_path: Path) -> None:
    task = npz_task(write_npz(tmp_path / "table.npz"), network=network)
    with pytest.raises(UserError, match="use layer or group norm in place of batch norm, and leave dropout out"):
        Population(task, 2, mode="eager")


def test_pillow_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "insects")
    for name in [one for one in sys.modules if one.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"PIL is not installed; run: pip install 'trimtab\[images\]'"):
        image_folder_task(tmp_path / "insects")


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


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scenario.yaml").write_text("id: mine\nfamilies:\n- npz:table.npz\n")
    assert cli.main(["check", "scenario.yaml"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "there is no file or folder" in err and "numpy.savez" in err
    write_npz(Path("table.npz"))
    assert cli.main(["check", "scenario.yaml"]) == 0


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
