"""Arrays in one ``.npz`` file, as written by ``numpy.savez``."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.tasks.arrays import ArrayTask
from trimtab.inner_training.tasks.local_files import family_name
from trimtab.inner_training.tasks.local_files.common import (
    EXAMPLES,
    Network,
    check_size,
    chosen,
    existing,
    family_of,
    flat_network,
    image_network,
    scaled_images,
)
from trimtab.inner_training.tasks.recipe import RecipeRange

LARGEST = 1e30  # squares of larger numbers leave float64
WANTED = ("inputs", "labels")
HOLDS = (
    "it must hold the arrays 'inputs' (R, ...) and 'labels' (R,), as numpy.savez(path, inputs=..., labels=...) writes"
)


def npz_task(
    path: str | Path,
    *,
    examples: int | None = EXAMPLES,
    network: Network | None = None,
    recipe: RecipeRange | None = None,
) -> ArrayTask:
    """A family of the arrays ``inputs`` and ``labels`` of a file.

    Labels of a whole-number type are classes, learned with the cross-entropy; others are targets of a regression, shifted
    and scaled to mean 0 and standard deviation 1, learned with the squared error. Inputs of bytes (R, C, H, W) with 1 or 3 channels are images;
    any other inputs are flattened. Inputs have mean 0 and standard deviation 1, in each channel or each feature.

    Args:
        path: the file; it is read without unpickling anything.
        examples: examples to use at most, a fixed random choice; None is all of them.
        network: makes the network; None is a small ConvNet for images and an MLP for anything else.
        recipe: what to draw recipes from; None is the default.

    Raises:
        UserError: when the file is missing or damaged, an array is missing or of the wrong shape or type, a number is
            not finite, a class is empty, or the network does not fit.
    """
    remedy = "give the path of a file that numpy.savez has written"
    file = existing(path, remedy)
    if not file.is_file():
        raise UserError(f"{file} is no file; {remedy}")
    inputs, labels = _arrays(file)
    name = family_name("npz", file)
    if labels.dtype.kind in "iub":
        loss, targets = "cross-entropy", labels.astype(np.int64)
        outputs, rows = _class_count(file, targets), chosen(name, targets, examples)
    else:
        loss, targets = "mse", _standardised(labels)
        outputs, rows = 1, chosen(name, np.zeros(labels.size, dtype=np.int64), examples)
    check_size(file, rows.size, inputs.shape[1:])
    image = inputs.ndim == 4 and inputs.dtype == np.uint8 and inputs.shape[1] in (1, 3)
    table = scaled_images(inputs[rows]) if image else _standardised(inputs[rows])
    shape = table.shape[1:]
    make = image_network if image else flat_network
    return family_of(
        file,
        name,
        table,
        targets[rows],
        network=network or (lambda: make(shape, outputs)),
        loss=loss,
        recipe=recipe,
    )


def _stored(file: Path) -> dict[str, np.ndarray]:
    """The arrays that are wanted, as far as they are there, and the names of the others with empty ones."""
    try:
        with file.open("rb") as handle:
            stored = np.load(handle, allow_pickle=False)
            if isinstance(stored, NpzFile):
                # What is no array in the archive is bytes, and becomes an array of text.
                return {name: np.asarray(stored[name]) if name in WANTED else np.empty(0) for name in stored.files}
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition(". ")[0]  # what numpy goes on to advise is to unpickle the file
        raise UserError(
            f"{file} cannot be read as .npz ({type(error).__name__}: {reason}); it is damaged, truncated, too large, or "
            "holds pickled objects, so write it again from arrays of numbers"
        ) from error
    raise UserError(f"{file} is a single array; {HOLDS}")


def _arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (R, ...) and labels (R,), finite numbers."""
    stored = _stored(file)
    for name in WANTED:
        if name not in stored:
            raise UserError(f"{file} holds {', '.join(stored) or 'nothing'} but no {name!r}; {HOLDS}")
    inputs, labels = (stored[name] for name in WANTED)
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or not inputs.size:
        raise MismatchError(f"{file}: inputs have shape {inputs.shape} and labels {labels.shape}; {HOLDS}")
    for name, array in zip(WANTED, (inputs, labels), strict=True):
        if array.dtype.kind not in "iufb":
            raise UserError(f"{file}: {name} are of type {array.dtype}; give real numbers")
        if array.dtype.kind == "f" and not (np.abs(_exact(array)) <= LARGEST).all():
            raise UserError(f"{file}: {name} hold NaN, infinity or a number beyond {LARGEST:g}; remove those examples")
    return inputs, labels


def _class_count(file: Path, labels: np.ndarray) -> int:
    """How many classes there are, all of them with examples."""
    used = np.unique(labels)
    if used[0] < 0:
        raise UserError(f"{file}: labels go down to {used[0]}; number the classes from 0")
    gaps = np.flatnonzero(used != np.arange(used.size))
    if gaps.size:
        raise UserError(
            f"{file}: class {gaps[0]} has no example, but class {used[-1]} has; number the classes from 0 without gaps"
        )
    if used.size < 2:
        raise UserError(f"{file}: every label is 0; give at least two classes, or decimal numbers for a regression")
    return int(used.size)


def _exact(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # of longer floats, which become infinite
        return values.astype(np.float64)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Float32 columns with mean 0 and standard deviation 1; a constant one is 0."""
    exact = _exact(values)
    spread = exact.std(0)
    return ((exact - exact.mean(0)) / np.where(spread > 0, spread, 1.0)).astype(np.float32)
