"""Sprites: small images of shapes and gratings, drawn with nuisances by a fixed seed; no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from trimtab.inner_training.tasks.classification import Examples
from trimtab.inner_training.tasks.recipe import rng_for

SIZE = 16  # pixels along an edge
NOISE = (0.05, 0.1, 0.2)  # standard deviation of the pixel noise of each level; the contrast of a shape is 0.4 to 1
COPIES = 100  # images of one class, level and role
FEWEST_CLASSES, MOST_CLASSES = 4, 12  # of an instance
FEWEST_COPIES, FEWEST, MOST = 40, 200, 1000  # images of an instance: per class, and in all

Plane = np.ndarray  # (n, SIZE, SIZE)
Shape = Callable[[Plane, Plane], Plane]


@dataclass(frozen=True, kw_only=True)
class Style:
    """How the sprites of one role look.

    Attributes:
        rotation: largest rotation to either side, in radians.
        inverted: dark shapes on a light ground.
        clouds: the clutter is a smooth random field, not a few dots.
    """

    rotation: float
    inverted: bool
    clouds: bool


TRAINING = Style(rotation=np.pi / 6, inverted=False, clouds=False)
HELD_OUT = Style(rotation=np.pi / 4, inverted=True, clouds=True)


def _box(u: Plane, v: Plane, width: float, height: float) -> Plane:
    return np.maximum(np.abs(u) - width, np.abs(v) - height)


def _disc(u: Plane, v: Plane, radius: float) -> Plane:
    return np.hypot(u, v) - radius


def _triangle(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5


def _spokes(u: Plane, v: Plane) -> Plane:
    bars = [_box(u * c + v * s, v * c - u * s, 1.0, 0.17) for c, s in ((1.0, 0.0), (0.5, 0.866), (-0.5, 0.866))]
    return np.minimum.reduce(bars)


def _grating(u: Plane, v: Plane, stripes: float) -> Plane:
    return np.maximum(_disc(u, v, 1.0), -0.3 * np.cos(np.pi * stripes * u))


# Signed distance (negative inside) in coordinates where the shape fills about [-1, 1] x [-1, 1].
SHAPES: dict[str, Shape] = {
    "disc": lambda u, v: _disc(u, v, 0.85),
    "ring": lambda u, v: np.abs(_disc(u, v, 0.75)) - 0.2,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "frame": lambda u, v: np.abs(_box(u, v, 0.75, 0.75)) - 0.17,
    "triangle": _triangle,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.25), _box(u, v, 0.25, 1.0)),
    "bar": lambda u, v: _box(u, v, 1.0, 0.3),
    "twin-bars": lambda u, v: _box(u, np.abs(v) - 0.55, 0.9, 0.2),
    "ell": lambda u, v: np.minimum(_box(u, v - 0.65, 0.85, 0.25), _box(u + 0.6, v, 0.25, 0.9)),
    "tee": lambda u, v: np.minimum(_box(u, v - 0.65, 0.9, 0.25), _box(u, v, 0.25, 0.9)),
    "crescent": lambda u, v: np.maximum(_disc(u, v, 0.9), -_disc(u - 0.45, v, 0.75)),
    "twin-dots": lambda u, v: _disc(np.abs(u) - 0.6, v, 0.38),
    "spokes": _spokes,
    "checker": lambda u, v: np.maximum(_box(u, v, 0.85, 0.85), -4 * u * v),
    "stripes": lambda u, v: _grating(u, v, 2.0),
    "fine-stripes": lambda u, v: _grating(u, v, 3.4),
}
CLASSES = len(SHAPES)


def _spread(rng: np.random.Generator, count: int, low: float, high: float) -> Plane:
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _clutter(rng: np.random.Generator, count: int, clouds: bool) -> Plane:
    """Distractors of about the brightness of a faint shape."""
    pixel = np.arange(SIZE, dtype=np.float32)
    if clouds:
        knots = np.maximum(1 - np.abs(pixel[:, None] / (SIZE - 1) * 3 - np.arange(4)), 0)
        field = rng.standard_normal((count, 4, 4), dtype=np.float32)
        return 0.15 * (knots @ field @ knots.T)
    dots = np.zeros((count, SIZE, SIZE), dtype=np.float32)
    for _ in range(4):
        x, y = (_spread(rng, count, 0, SIZE) for _ in range(2))
        distance = np.hypot(pixel - x, pixel[:, None] - y)
        dots += _spread(rng, count, 0.0, 0.6) * np.clip(_spread(rng, count, 0.8, 1.8) - distance, 0, 1)
    return dots


def draw_sprites(rng: np.random.Generator, shape: Shape, count: int, style: Style, noise: float) -> Plane:
    """Draws images of one shape.

    Each image has its own shift (up to 1.5 pixels either way), half-size (4 to 6 pixels), stretch (0.8 to 1.25),
    rotation, contrast (0.4 to 1), ground level, clutter and pixel noise.

    Args:
        rng: source of the draw.
        shape: signed distance of the shape.
        count: number of images.
        style: how the images of the role look.
        noise: standard deviation of the pixel noise, >= 0.

    Returns:
        (count, SIZE, SIZE) float32 images around zero: a ground of 0 to 0.3 and shapes up to 1.3, minus one half.
    """
    pixel = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    x, y = pixel - _spread(rng, count, -1.5, 1.5), pixel[:, None] - _spread(rng, count, -1.5, 1.5)
    angle = _spread(rng, count, -style.rotation, style.rotation)
    half, stretch = _spread(rng, count, 4.0, 6.0), np.exp(_spread(rng, count, -0.22, 0.22))
    u = (x * np.cos(angle) + y * np.sin(angle)) / (half * stretch)
    v = (y * np.cos(angle) - x * np.sin(angle)) / (half / stretch)
    inside = np.clip(0.5 - shape(u, v) * half, 0, 1)
    image = _spread(rng, count, 0.0, 0.3) + _spread(rng, count, 0.4, 1.0) * inside
    image += _clutter(rng, count, style.clouds)
    image += noise * rng.standard_normal(image.shape, dtype=np.float32)
    centred = (image - 0.5).astype(np.float32)
    return -centred if style.inverted else centred


@cache
def sprite_table() -> tuple[np.ndarray, np.ndarray]:
    """All sprites, the same in every process.

    Returns:
        Images (R, 1, 16, 16) float32 around zero, and their classes (R,) int64 in [0, 16), in the order of
        ``SHAPES``. Rows are ordered by role (training, held-out), level of noise, class and copy; training
        instances use the first half of the rows and held-out ones the second. Nobody may change the arrays.
    """
    rng = rng_for("sprites", 0, held_out=False)
    images = [
        draw_sprites(rng, shape, COPIES, style, noise)
        for style in (TRAINING, HELD_OUT)
        for noise in NOISE
        for shape in SHAPES.values()
    ]
    classes = np.tile(np.repeat(np.arange(CLASSES), COPIES), 2 * len(NOISE))
    return np.concatenate(images)[:, None], classes


def sprite_examples(rng: np.random.Generator, held_out: bool) -> Examples:
    """Draws 4 to 12 of the shapes, renumbered in random order, one level of noise, and 200 to 1,000 images.

    There are at least 40 images per class on average.

    Args:
        rng: source of the draw.
        held_out: whether the images are those of held-out instances.
    """
    classes = int(rng.integers(FEWEST_CLASSES, MOST_CLASSES + 1))
    chosen = rng.permutation(CLASSES)[:classes]
    level = int(rng.integers(len(NOISE)))
    fewest, most = max(FEWEST, classes * FEWEST_COPIES), min(MOST, classes * COPIES)
    count = int(rng.integers(fewest, most + 1))
    place = rng.permutation(classes * COPIES)[:count]
    labels, copies = np.divmod(place, COPIES)
    first = (int(held_out) * len(NOISE) + level) * CLASSES
    names = list(SHAPES)
    return Examples(
        rows=(first + chosen[labels]) * COPIES + copies,
        labels=labels,
        classes=classes,
        features=SIZE * SIZE,
        traits={"shapes": [names[one] for one in chosen], "examples": count, "pixel_noise": NOISE[level]},
    )
