"""Small files in the formats that families are read from, whole and damaged."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

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


def truncated(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def write_text(path: Path) -> Path:
    path.write_text("\n".join(f"{number} by {number} is {number * number}" for number in range(700)))
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


def cifar_20(folder: Path) -> Path:
    cifar_bytes(20, 10, 1).tofile(folder / "data_batch_1.bin")
    return folder


def text_image(folder: Path) -> Path:
    text_as(write_images(folder / "insects") / "cat" / "4.bmp")
    return folder / "insects"


def divided(folder: Path) -> Path:
    """A folder with the classes one level further down."""
    for name in ("train", "test"):
        write_images(folder / name)
    return folder
