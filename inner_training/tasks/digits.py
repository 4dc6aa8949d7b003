"""Small handwritten digits: the bundled digits of scikit-learn, 8 x 8 pixels, 1,797 examples, no download."""

from __future__ import annotations

from functools import cache

import numpy as np

from trimtab.inner_training.tasks.classification import Examples, MLPFamily
from trimtab.inner_training.tasks.recipe import halves, rng_for

CLASSES, PIXELS, HIDDEN = 10, 64, 64
VARIANTS = 4  # pixel orders of training instances, and as many others of held-out ones
FEWEST, MOST = 100, 850


@cache
def digit_images() -> tuple[np.ndarray, np.ndarray]:
    """The images (1797, 64) float32 in [0, 1] and their labels (1797,) int64."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """The input table, (2 * VARIANTS * R, 64) in [0, 1], and the labels (R,) of the R images.

    Row ``variant * R + i`` is image ``i`` with its pixels in the order of ``variant``; variant 0 is the image as it is.
    """
    images, labels = digit_images()
    rng = rng_for("digits-pixels", 0, held_out=False)
    orders = [np.arange(PIXELS), *(rng.permutation(PIXELS) for _ in range(2 * VARIANTS - 1))]
    return np.concatenate([images[:, order] for order in orders]), labels


class DigitsMLP(MLPFamily):
    """Some of the ten digits, in one of the pixel orders, learned by an MLP of at most 64 units per layer.

    The images are split once into two halves: training instances draw from the first, held-out ones from the second,
    in other pixel orders. The three families share the halves, so that none has seen what another is judged on.
    """

    max_examples = MOST

    def __init__(self, name: str, doc: str, depth: int = 1, activation: str = "relu") -> None:
        table, labels = _table()
        network = {
            "inputs": PIXELS,
            "hidden": HIDDEN,
            "outputs": CLASSES,
            "depth": depth,
            "activation": activation,
        }
        super().__init__(name, doc, network, table)
        self._labels = labels
        self._by_class = [
            [half[labels[half] == digit] for digit in range(CLASSES)] for half in halves("digits", labels.size)
        ]

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws 3 to 10 classes, renumbered in random order, and 100 to 850 of their images."""
        classes = int(rng.integers(3, CLASSES + 1))
        digits = rng.permutation(CLASSES)[:classes]
        pool = np.concatenate([self._by_class[int(held_out)][digit] for digit in digits])
        count = int(rng.integers(FEWEST, min(MOST, pool.size) + 1))
        images = rng.permutation(pool)[:count]
        variant = int(rng.integers(VARIANTS)) + VARIANTS * int(held_out)
        number = np.zeros(CLASSES, dtype=np.int64)
        number[digits] = np.arange(classes)
        return Examples(
            rows=variant * self._labels.size + images,
            labels=number[self._labels[images]],
            classes=classes,
            features=PIXELS,
            traits={"digits": digits.tolist(), "examples": count, "pixel_order": variant},
        )
