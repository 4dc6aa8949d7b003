"""A folder of images: one folder for each class, images of any size inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trimtab.errors import UserError, out_of_range, require_extra
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.local_files import family_name
from trimtab.inner_training.tasks.local_files.common import (
    EXAMPLES,
    Network,
    check_classes,
    check_size,
    chosen,
    existing,
    family_of,
    image_network,
    scaled_images,
)
from trimtab.inner_training.tasks.recipe import RecipeRange

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LARGEST = 256
DIVISIONS = ("train", "training", "val", "valid", "validation", "test")


def image_folder_task(
    path: str | Path,
    *,
    size: int = 32,
    examples: int | None = EXAMPLES,
    network: Network | None = None,
    recipe: RecipeRange | None = None,
) -> ArrayTask:
    """A family of images in folders.

    A class is a folder directly inside ``path``, in alphabetical order; its images are those inside it at any depth,
    by their ending; other files, and hidden ones, are left alone. Images are turned to RGB, cropped around the centre to
    a square and resized; pixels have mean 0 and standard deviation 1 in each channel. Needs Pillow (``trimtab[images]``).

    Args:
        path: the folder that holds the folders of the classes.
        size: edge of the images in pixels, in [4, 256].
        examples: images to use at most, a fixed random choice; None is all of them.
        network: makes the network, for inputs (B, 3, size, size); None is a small ConvNet.
        recipe: what to draw recipes from; None is the default.

    Raises:
        UserError: when the folder is missing, a class is empty, an image cannot be read, or the network does not fit.
        MissingExtraError: when Pillow is not installed.
    """
    if not 4 <= size <= LARGEST:
        raise out_of_range("size", size, 4, LARGEST)
    layout = "give a folder that holds one folder of images for each class"
    folder = existing(path, layout)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; {layout}")
    classes = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no folders; {layout}")
    if all(one.name.lower() in DIVISIONS for one in classes):
        raise UserError(
            f"{folder} holds {', '.join(one.name for one in classes)} and no classes; give one of these folders"
        )
    files = [_images(one) for one in classes]
    labels = np.repeat(np.arange(len(classes)), [len(one) for one in files])
    remedy = f"put images ({', '.join(ENDINGS)}) into its folder, or remove the folder"
    check_classes(folder, labels, [one.name for one in classes], remedy)
    name = family_name("image-folder", folder)
    every = [file for one in files for file in one]
    rows = chosen(name, labels, examples)
    check_size(folder, rows.size, (3, size, size))
    pixels = np.stack([_read(every[row], size) for row in rows])
    return family_of(
        folder,
        name,
        scaled_images(pixels),
        labels[rows],
        network=network or (lambda: image_network((3, size, size), len(classes))),
        recipe=recipe,
    )


def _images(folder: Path) -> list[Path]:
    inside = (file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS and not file.name.startswith("."))
    return sorted(file for file in inside if file.is_file())


def _read(file: Path, size: int) -> np.ndarray:
    """Bytes (3, size, size) of an image."""
    pillow, operations = require_extra("PIL.Image", "images"), require_extra("PIL.ImageOps", "images")
    try:
        with pillow.open(file) as image:
            square = operations.fit(image.convert("RGB"), (size, size))
    except Exception as error:  # decoders fail in many ways, each with its own kind of error
        raise UserError(
            f"cannot read image {str(file)!r} ({type(error).__name__}: {error}); repair or remove it"
        ) from error
    return np.asarray(square).transpose(2, 0, 1)
