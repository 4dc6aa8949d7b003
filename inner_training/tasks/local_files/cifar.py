"""CIFAR-10 and CIFAR-100 in their binary version (A. Krizhevsky, *Learning multiple layers of features*, 2009)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimtab.errors import UserError
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.local_files.common import (
    EXAMPLES,
    Network,
    check_classes,
    chosen,
    existing,
    family_of,
    image_network,
    scaled_images,
)
from trimtab.inner_training.tasks.recipe import RecipeRange

SHAPE = (3, 32, 32)  # red, green and blue planes, each row by row
PIXELS = 3072
# Classes: label bytes of a record, the byte that counts, and files. Records of CIFAR-100: coarse label, fine label, pixels.
KINDS = {
    10: (1, 0, ("data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin")),
    20: (2, 0, ("train.bin",)),
    100: (2, 1, ("train.bin",)),
}
TEST_FILES = {10: "test_batch.bin", 20: "test.bin", 100: "test.bin"}


def cifar_task(
    path: str | Path,
    *,
    classes: int = 10,
    examples: int | None = EXAMPLES,
    network: Network | None = None,
    recipe: RecipeRange | None = None,
) -> ArrayTask:
    """A family of CIFAR images.

    The images of all the files that are there are put together and split anew into those of training instances and
    of held-out ones (see `ArrayTask`); pixels have mean 0 and standard deviation 1 in each channel.

    Args:
        path: the folder of the unpacked archive (``cifar-10-batches-bin`` or ``cifar-100-binary``), or one ``.bin`` file.
        classes: 10 for CIFAR-10; 100 or 20 for the fine or the coarse labels of CIFAR-100.
        examples: images to use at most, a fixed random choice; None is all of them (12 kB of memory each).
        network: makes the network, for inputs (B, 3, 32, 32); None is a small ConvNet.
        recipe: what to draw recipes from; None is the default.

    Raises:
        UserError: when files are missing, truncated or of another kind, or the network does not fit.
    """
    if classes not in KINDS:
        raise UserError(
            f"classes is {classes!r}; give 10 for CIFAR-10, 100 or 20 for fine or coarse labels of CIFAR-100"
        )
    archive = f"CIFAR-{10 if classes == 10 else 100}"
    folder = existing(path, f"download the binary version of {archive}, unpack it, and give its folder")
    name = f"cifar{classes}"
    files = [folder] if folder.is_file() else _files(folder, classes, archive)
    records = np.concatenate([_records(file, classes, archive) for file in files])
    label_bytes, place, _ = KINDS[classes]
    labels = records[:, place].astype(np.int64)
    names = [str(number) for number in range(classes)]
    check_classes(folder, labels, names, f"give the folder with all files of {archive}")
    rows = chosen(name, labels, examples)
    images = scaled_images(records[rows, label_bytes:].reshape(-1, *SHAPE))
    return family_of(
        folder,
        name,
        images,
        labels[rows],
        network=network or (lambda: image_network(SHAPE, classes)),
        recipe=recipe,
    )


def _files(folder: Path, classes: int, archive: str) -> list[Path]:
    wanted = (*KINDS[classes][2], TEST_FILES[classes])
    found = [folder / name for name in wanted if (folder / name).is_file()]
    if found:
        return found
    if any((folder / name.removesuffix(".bin")).is_file() for name in wanted):
        raise UserError(
            f"{folder} holds the Python version of {archive}, which is pickled; download the binary version"
        )
    raise UserError(f"{folder} holds none of {', '.join(wanted)}; give the folder of the binary version of {archive}")


def _records(file: Path, classes: int, archive: str) -> np.ndarray:
    """(R, record) bytes of a file."""
    label_bytes, place, _ = KINDS[classes]
    record = label_bytes + PIXELS
    size = file.stat().st_size
    if size == 0 or size % record:
        raise UserError(
            f"{file} has {size} bytes, which is no multiple of the {record} of a record of {archive}; "
            "it is truncated or another kind of file, so download it again"
        )
    records = np.fromfile(file, dtype=np.uint8).reshape(-1, record)
    wrong = np.flatnonzero(records[:, place] >= classes)
    if wrong.size:
        raise UserError(
            f"{file}: record {wrong[0]} has label {records[wrong[0], place]}, but {archive} has labels 0 to {classes - 1}; "
            "the file is damaged or another kind, so download it again"
        )
    return records
