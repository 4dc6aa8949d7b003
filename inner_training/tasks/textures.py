"""Textures: tiles of the images that ship inside the scikit-image package; nothing is ever downloaded."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from trimtab.errors import UserError, require_extra
from trimtab.inner_training.tasks.classification import Examples
from trimtab.inner_training.tasks.recipe import split_sizes

SIZE = 16  # pixels along the edge of a tile
BLOCK = 3  # tiles along the edge of a block
BLOCKS = 24  # blocks taken of each image
FEWEST_CLASSES, MOST_CLASSES = 3, 6  # of an instance
FEWEST, MOST = 400, 1000  # tiles of an instance

# File names inside skimage/data, without a download; each role has its own eight images.
SOURCES: tuple[tuple[str, ...], tuple[str, ...]] = (
    (
        "astronaut.png",
        "brick.png",
        "cell.png",
        "coffee.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "page.png",
        "retina.jpg",
    ),
    (
        "camera.png",
        "chelsea.png",
        "coins.png",
        "grass.png",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "text.png",
    ),
)
IMAGES = len(SOURCES[0])


def _grey(file_name: str) -> np.ndarray:
    """(H, W) float32 luminance of an image of the installed package, in units of its own."""
    package = require_extra("skimage", "images")
    place = Path(str(package.__file__)).parent / "data" / file_name
    if not place.is_file():
        raise UserError(
            f"scikit-image {package.__version__} does not ship the image {file_name!r}, which task family "
            "'textures-conv' reads; run: pip install 'trimtab[images]'"
        )
    from skimage.color import rgb2gray
    from skimage.io import imread

    image = np.asarray(imread(place))
    return np.asarray(image if image.ndim == 2 else rgb2gray(image), dtype=np.float32)


def blocks_of(image: np.ndarray) -> np.ndarray:
    """Cuts an image into square blocks of tiles that share no pixel; what is left at the right and below is unused.

    Args:
        image: (H, W) values, at least one block large.

    Returns:
        (blocks, BLOCK * BLOCK, SIZE, SIZE) tiles of each block.

    >>> blocks_of(np.zeros((172, 448), dtype=np.float32)).shape
    (27, 9, 16, 16)
    """
    edge = SIZE * BLOCK
    down, across = image.shape[0] // edge, image.shape[1] // edge
    grid = image[: down * edge, : across * edge].reshape(down, BLOCK, SIZE, across, BLOCK, SIZE)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(down * across, BLOCK * BLOCK, SIZE, SIZE)


@cache
def texture_table() -> tuple[np.ndarray, np.ndarray]:
    """All tiles, the same in every process.

    Each image becomes grey and is standardised over the tiles taken of it, so that brightness and contrast give no
    image away. Of each image the 24 blocks with most contrast inside their tiles are taken, so that few are of blank
    sky or paper.

    Returns:
        Tiles (R, 1, 16, 16) float32, and the number (R,) int64 of their image in ``(*SOURCES[0], *SOURCES[1])``.
        Nine tiles in a row are one block. Nobody may change the arrays.

    Raises:
        MissingExtraError: when scikit-image is not installed.
        UserError: when its release lacks one of the images.
    """
    tiles, numbers = [], []
    for number, file_name in enumerate(SOURCES[0] + SOURCES[1]):
        blocks = blocks_of(_grey(file_name))
        taken = np.argsort(-blocks.std((2, 3)).mean(1), kind="stable")[:BLOCKS]
        chosen = blocks[taken].reshape(-1, 1, SIZE, SIZE)
        tiles.append(((chosen - chosen.mean()) / chosen.std()).astype(np.float32))
        numbers.append(np.full(len(chosen), number, dtype=np.int64))
    return np.concatenate(tiles), np.concatenate(numbers)


def texture_examples(rng: np.random.Generator, held_out: bool) -> Examples:
    """Draws 3 to 6 of the eight images of a role, renumbered in random order, and 400 to 1,000 of their tiles.

    The blocks of each image are dealt anew to train (60 %), validation (15 %) and test (the rest), and each split
    takes its tiles from its own blocks. So splits share no pixel, and lie in disjoint squares of 48 pixels.

    Args:
        rng: source of the draw.
        held_out: whether the images are those of held-out instances.

    Returns:
        Examples in the order train, validation, test, in the sizes of ``split_sizes``.
    """
    classes = int(rng.integers(FEWEST_CLASSES, MOST_CLASSES + 1))
    chosen = rng.permutation(IMAGES)[:classes]
    pools = _pools(rng, chosen + IMAGES * int(held_out))
    shares = np.array(split_sizes(10_000)) / 10_000
    # Two fewer than the scarcest split allows: sizes are rounded, by less than one example each.
    limit = int(min(len(pool) / share for pool, share in zip(pools, shares, strict=True))) - 2
    count = int(rng.integers(FEWEST, min(MOST, limit) + 1))
    sizes = split_sizes(count)
    taken = np.concatenate([rng.permutation(pool)[:size] for pool, size in zip(pools, sizes, strict=True)])
    names = [Path(SOURCES[int(held_out)][one]).stem for one in chosen]
    return Examples(
        rows=taken[:, 0],
        labels=taken[:, 1],
        classes=classes,
        features=SIZE * SIZE,
        traits={"images": names, "examples": count},
    )


def _pools(rng: np.random.Generator, sources: np.ndarray) -> list[np.ndarray]:
    """Rows and labels (n, 2) from which train, validation and test may take, by dealing out whole blocks."""
    numbers = texture_table()[1]
    pools: list[list[np.ndarray]] = [[], [], []]
    for label, source in enumerate(sources):
        blocks = rng.permutation(np.flatnonzero(numbers == source).reshape(-1, BLOCK * BLOCK))
        ends = np.cumsum(split_sizes(len(blocks)))
        for pool, part in zip(pools, np.split(blocks, ends[:2]), strict=True):
            pool.append(np.stack([part.ravel(), np.full(part.size, label)], axis=1))
    return [np.concatenate(pool) for pool in pools]
