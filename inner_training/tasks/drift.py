"""Drift of inputs and of labels, gradual and abrupt, and adaptation from a source to a shifted target."""

from __future__ import annotations

from functools import cache

import numpy as np

from trimtab.inner_training.tasks.continual import NETWORK, cut, image_halves, labelled
from trimtab.inner_training.tasks.digits import CLASSES, digit_images
from trimtab.inner_training.tasks.phased import PhaseData, PhasedFamily, Story
from trimtab.inner_training.tasks.recipe import rng_for

ANGLES = tuple(range(0, 100, 10))  # degrees
PHASES = len(ANGLES)
TARGETS = 4  # ways to shift a domain of training instances, and as many others of held-out ones


def rotated(images: np.ndarray, degrees: float) -> np.ndarray:
    """Digits (R, 64) turned about their centre, bilinear, zero outside."""
    from scipy.ndimage import rotate

    turned = rotate(images.reshape(-1, 8, 8), degrees, axes=(1, 2), reshape=False, order=1)
    return np.asarray(turned.reshape(len(images), -1), dtype=np.float32)


@cache
def _turned() -> np.ndarray:
    """(PHASES * R, 64): row ``k * R + i`` is image ``i`` turned by the ``k``-th angle."""
    return np.concatenate([rotated(digit_images()[0], angle) for angle in ANGLES])


@cache
def _domains() -> np.ndarray:
    """((1 + 2 * TARGETS) * R, 64): the images as they are, then each in a shifted domain.

    A shifted domain has a rotation of 20 to 60 degrees either way, a contrast of 0.4 to 0.8, and noise; every other one
    is inverted.
    """
    images, _ = digit_images()
    rng = rng_for("shifted-digits-domains", 0, held_out=False)
    domains = [images]
    for number in range(2 * TARGETS):
        turned = rotated(images, float(rng.choice((-1, 1)) * rng.uniform(20, 60)))
        changed = rng.uniform(0.4, 0.8) * (1 - turned if number % 2 else turned)
        domains.append((changed + 0.1 * rng.standard_normal(images.shape)).astype(np.float32))
    return np.concatenate(domains)


class DriftingDigits(PhasedFamily):
    """Drift, in the terms of Gama et al., *A survey on concept drift adaptation* (ACM Computing Surveys 46(4), 2014).

    Of the inputs: the images turn, by up to 90 degrees. Of the labels: they become those of a permutation of the
    classes. Gradual: a little in each of ten phases. Abrupt: all at once after the first half.
    """

    max_phases, max_examples = PHASES, PHASES * 600

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, _turned())

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """200 to 600 images, and one of the four kinds of drift."""
        images = rng.permutation(image_halves()[held_out])[: int(rng.integers(200, 601))]
        of_labels, abrupt = bool(rng.integers(2)), bool(rng.integers(2))
        steps = np.arange(PHASES)
        level = np.where(steps < PHASES // 2, 0, PHASES - 1) if abrupt else steps
        labels = digit_images()[1]
        swapped, when = rng.permutation(CLASSES)[labels], rng.random(labels.size)
        phases = []
        for now in level:
            truth = np.where(when < now / (PHASES - 1), swapped, labels) if of_labels else labels
            part = labelled(cut(images), truth)
            offset = 0 if of_labels else int(now) * labels.size
            train, validation, test = part.rows
            moved = (train + offset, validation + offset, test + offset)
            phases.append(PhaseData(rows=moved, labels=part.labels))
        kind = f"{'abrupt' if abrupt else 'gradual'} {'label' if of_labels else 'covariate'} drift"
        return Story(phases=phases, traits={"images": len(images), "drift": kind})


class ShiftedDigits(PhasedFamily):
    """Domain adaptation: a source with many labels, then a shifted target with few (supervised, as fine-tuning is)."""

    max_phases, max_examples = 2, 2 * 898
    lengths = (100, 400)

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, _domains())

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """300 to 800 images; 40 to 160 of the training ones come again in the target, where all are judged."""
        labels = digit_images()[1]
        images = rng.permutation(image_halves()[held_out])[: int(rng.integers(300, 801))]
        target = 1 + int(rng.integers(TARGETS)) + TARGETS * int(held_out)
        source = labelled(cut(images), labels)
        few = int(rng.integers(40, 161))
        train, validation, test = source.rows
        rows = tuple(part + target * labels.size for part in (train[:few], validation, test))
        marks = (source.labels[0][:few], source.labels[1], source.labels[2])
        shifted = PhaseData(rows=(rows[0], rows[1], rows[2]), labels=marks)
        return Story(phases=[source, shifted], traits={"images": len(images), "domain": target, "target_labels": few})
