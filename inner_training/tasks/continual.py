"""Continual learning on digits: new pixel orders, new random labels, new classes, more data."""

from __future__ import annotations

from functools import cache

import numpy as np

from trimtab.inner_training.tasks.digits import CLASSES, PIXELS, digit_images
from trimtab.inner_training.tasks.phased import PhaseData, PhasedFamily, Story
from trimtab.inner_training.tasks.recipe import halves, noisy_labels, rng_for, split_sizes

HIDDEN = 64
NETWORK = {"inputs": PIXELS, "hidden": HIDDEN, "outputs": CLASSES, "depth": 2}
PHASES, ORDERS = 10, 32  # orders of training instances, and as many others of held-out ones


@cache
def _permuted() -> np.ndarray:
    """(2 * ORDERS * R, 64): row ``order * R + i`` is image ``i`` in one of the pixel orders."""
    images, _ = digit_images()
    rng = rng_for("permuted-digits-orders", 0, held_out=False)
    return np.concatenate([images[:, rng.permutation(PIXELS)] for _ in range(2 * ORDERS)])


def image_halves() -> tuple[np.ndarray, np.ndarray]:
    """Images of training instances and of held-out ones, the same for every family of digits."""
    return halves("digits", len(digit_images()[1]))


def cut(images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits images into train, validation and test, in order."""
    train, validation, _ = split_sizes(len(images))
    return images[:train], images[train : train + validation], images[train + validation :]


def labelled(rows: tuple[np.ndarray, np.ndarray, np.ndarray], labels: np.ndarray) -> PhaseData:
    """A phase whose labels are those of a table of labels, by row."""
    train, validation, test = rows
    return PhaseData(rows=rows, labels=(labels[train], labels[validation], labels[test]))


class PermutedDigits(PhasedFamily):
    """Permuted digits: the same images in a new, independent pixel order in each phase.

    After permuted MNIST (Goodfellow et al., arXiv 1312.6211), with an independent permutation per task as in
    Kumar et al., *Maintaining plasticity via regenerative regularization* (arXiv 2308.11958), not composed ones.
    """

    max_phases, max_examples = PHASES, PHASES * 600

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, _permuted())

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """200 to 600 images, in ten of the orders."""
        labels = digit_images()[1]
        images = rng.permutation(image_halves()[held_out])[: int(rng.integers(200, 601))]
        orders = rng.choice(ORDERS, PHASES, replace=False) + ORDERS * int(held_out)
        parts = cut(images)
        phases = [
            PhaseData(
                rows=(parts[0] + order * labels.size, parts[1] + order * labels.size, parts[2] + order * labels.size),
                labels=(labels[parts[0]], labels[parts[1]], labels[parts[2]]),
            )
            for order in orders
        ]
        return Story(phases=phases, traits={"images": len(images), "orders": orders.tolist()})


class RandomLabelDigits(PhasedFamily):
    """Random-label memorisation: the same images with new random labels in each phase.

    After random-label MNIST (Lyle et al., arXiv 2303.01486; Kumar et al., arXiv 2308.11958). There is nothing to
    generalise: validation and test are training examples again, so that they measure memorisation.
    """

    max_phases, max_examples = 5, 5 * (2 * 128 + 32)
    lengths = (100, 200)

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, digit_images()[0])

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """32 to 128 images."""
        images = rng.permutation(image_halves()[held_out])[: int(rng.integers(32, 129))]
        rows = (images, images[:32], images)
        labels = np.zeros(len(digit_images()[1]), dtype=np.int64)
        phases = []
        for _ in range(self.max_phases):
            labels[images] = rng.integers(CLASSES, size=len(images))
            phases.append(labelled(rows, labels))
        return Story(phases=phases, traits={"images": len(images)})


class ClassIncrementalDigits(PhasedFamily):
    """Class-incremental learning: two more digits in each of five phases, with a tiny replay of earlier ones.

    The five-way split of the digits is that of Split MNIST (Zenke et al., arXiv 1703.04200), with one head for all
    classes (class-incremental in the terms of van de Ven & Tolias, arXiv 1904.07734). Half of the training examples
    are replayed, from 10 to 50 kept for each earlier class (Chaudhry et al., *On tiny episodic memories*,
    arXiv 1902.10486). Validation and test hold all classes seen so far.
    """

    max_phases, max_examples = 5, 5 * 1100
    lengths = (100, 200)

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, digit_images()[0])

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """The digits in random order, 10 to 50 kept of each class."""
        labels, half = digit_images()[1], image_halves()[held_out]
        order, kept = rng.permutation(CLASSES), int(rng.integers(10, 51))
        parts = {digit: cut(rng.permutation(half[labels[half] == digit])) for digit in range(CLASSES)}
        phases = []
        for number in range(self.max_phases):
            seen = order[: 2 * number + 2]
            new = np.concatenate([parts[digit][0] for digit in seen[-2:]])
            train = new
            if number > 0:
                memory = np.concatenate([parts[digit][0][:kept] for digit in seen[:-2]])
                train = rng.permutation(np.concatenate([new, np.resize(memory, len(new))]))
            others = [rng.permutation(np.concatenate([parts[digit][split] for digit in seen])) for split in (1, 2)]
            phases.append(labelled((train, others[0], others[1]), labels))
        return Story(phases=phases, traits={"order": order.tolist(), "replay": kept})


class WarmStartDigits(PhasedFamily):
    """Warm start: first half of the training data, then all of it.

    After Ash & Adams, *On warm-starting neural network training* (arXiv 1910.08475), whose networks that were trained
    on half of the data first ended worse than fresh ones.
    """

    max_phases, max_examples = 2, 2 * 898
    lengths = (100, 500)
    most_noise = 0.3

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, NETWORK, digit_images()[0])

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """300 images to all of a half; up to 30 % of the first phase's training labels are wrong, in half of the runs."""
        half = image_halves()[held_out]
        images = rng.permutation(half)[: int(rng.integers(300, len(half) + 1))]
        train, validation, test = cut(images)
        noise = rng.uniform(0, self.most_noise) if rng.random() < 0.5 else 0.0
        labels = digit_images()[1]
        first, later = ((part, validation, test) for part in (train[: len(train) // 2], train))
        wrong = labels.copy()
        wrong[first[0]] = noisy_labels(rng, labels[first[0]], CLASSES, noise)
        phases = [labelled(first, wrong), labelled(later, labels)]
        return Story(phases=phases, traits={"images": len(images), "first_label_noise": noise})
