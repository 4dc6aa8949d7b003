"""What the readers of files have in common: which examples to keep, scaled images, and a family of the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import nn

from trimtab.errors import UserError, check_whole
from trimtab.inner_training.networks import MLP
from trimtab.inner_training.networks.convnets import ConvNet
from trimtab.inner_training.tasks.arrays import FEWEST, ArrayTask
from trimtab.inner_training.tasks.local_files import expanded
from trimtab.inner_training.tasks.recipe import RecipeRange, rng_for

EXAMPLES = 10_000  # read at most, by default: a run of 1,000 steps of 64 sees no more than 64,000 anyway
KEPT = 4  # examples of each class that are kept, however rare the class is
HIDDEN, CHANNELS = 64, 16  # of the default networks
LARGEST_TABLE = 2 * 2**30  # bytes

Network = Callable[[], nn.Module]


def existing(path: str | Path, remedy: str) -> Path:
    """The path with ``~`` filled in.

    Raises:
        UserError: when there is nothing at it.
    """
    found = expanded(path)
    if not found.exists():
        raise UserError(f"there is no file or folder {str(found)!r}; {remedy}")
    return found


def check_classes(path: Path, labels: np.ndarray, names: Sequence[str], remedy: str) -> None:
    """Refuses data with an empty class, or with fewer than two.

    Args:
        path: where the data came from.
        labels: (R,) int64 class numbers in [0, len(names)).
        names: what each class is called.
        remedy: what to do about an empty class.

    Raises:
        UserError: naming the first empty class.
    """
    if len(names) < 2:
        raise UserError(f"{path} holds {len(names)} class; give at least two")
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all():
        raise UserError(f"{path}: class {names[int(counts.argmin())]!r} has no example; {remedy}")


def chosen(name: str, labels: np.ndarray, most: int | None) -> np.ndarray:
    """Which examples to keep of too many: a fixed random choice with at least 4 of each class that has them.

    Args:
        name: the family's name, which alone decides the choice.
        labels: (R,) int64 class numbers.
        most: how many to keep, or None for all.

    Returns:
        Sorted int64 positions.

    Raises:
        RangeError: when ``most`` is too small for a family.
    """
    if most is None or check_whole("examples", most, FEWEST) >= labels.size:
        return np.arange(labels.size)
    order = rng_for(f"{name}-choice", 0, held_out=False).permutation(labels.size)
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    rank = np.empty(labels.size, dtype=np.int64)
    rank[by_class] = np.arange(labels.size) - starts
    first = order[np.argsort(rank[order] >= KEPT, kind="stable")]
    return np.sort(first[:most])


def check_size(path: Path, examples: int, shape: tuple[int, ...]) -> None:
    """Refuses inputs (examples, *shape) that would take more than 2 GiB as float32, which every run's device holds.

    Raises:
        UserError: saying how large they would be.
    """
    size = 4 * examples * math.prod(shape)
    if size > LARGEST_TABLE:
        raise UserError(
            f"{path}: {examples} examples of shape {shape} take {size / 2**30:.1f} GiB as float32, and more than "
            f"{LARGEST_TABLE / 2**30:g} are refused; use smaller ones, or fewer with a function that sets examples="
        )


def scaled_images(pixels: np.ndarray) -> np.ndarray:
    """Bytes (R, C, H, W) as float32 with mean 0 and standard deviation 1 in each channel over the whole table."""
    table = pixels.astype(np.float32) / 255
    spread = table.std((0, 2, 3), keepdims=True)
    return (table - table.mean((0, 2, 3), keepdims=True)) / np.maximum(spread, 1e-6)


def image_network(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The default network for images (C, H, W): 1 to 5 convolutions that each halve the image, to about 4 x 4.

    The head sees every position of a square image, and the mean over the positions of any other.
    """
    colours, height, width = shape
    halvings = min(max(int(math.log2(min(height, width))) - 2, 1), 5)
    return ConvNet(colours, height, (CHANNELS,) * halvings, outputs, pooled=height != width)


def flat_network(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """The default network for anything but images: one hidden layer of 64 units."""
    return nn.Sequential(nn.Flatten(), MLP(int(np.prod(shape)), HIDDEN, outputs))


def family_of(
    path: Path,
    name: str,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    network: Network,
    loss: str = "cross-entropy",
    recipe: RecipeRange | None = None,
) -> ArrayTask:
    """An `ArrayTask` of what was read; its errors begin with the path."""
    try:
        return ArrayTask(name, network, inputs, labels, loss=loss, recipe=recipe, doc=f"examples of {path}")
    except UserError as error:
        raise type(error)(f"{path}: {error}") from error
