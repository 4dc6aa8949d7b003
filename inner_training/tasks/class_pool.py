"""Sequences of small classification tasks over a pool of many synthetic classes."""

from __future__ import annotations

from functools import cache

import numpy as np

from trimtab.inner_training.tasks.phased import PhaseData, PhasedFamily, Story
from trimtab.inner_training.tasks.recipe import rng_for, split_sizes

POOL, PER_CLASS, FEATURES, CLUSTERS = 200, 60, 48, 3  # classes of training instances are the first half of the pool
SPREAD = 1.6  # of a cluster, relative to the distance between centres; classes overlap a little
PHASES = 10


@cache
def _pool() -> np.ndarray:
    """(POOL * PER_CLASS, FEATURES): the examples of class ``c`` begin at row ``c * PER_CLASS``.

    A class is a mixture of Gaussian clusters, so that pairs of classes are not linearly separable.
    """
    rng = rng_for("class-pool", 0, held_out=False)
    centres = rng.standard_normal((POOL, CLUSTERS, FEATURES))
    cluster = rng.integers(CLUSTERS, size=(POOL, PER_CLASS))
    noise = rng.standard_normal((POOL, PER_CLASS, FEATURES))
    values = np.take_along_axis(centres, cluster[:, :, None], 1) + SPREAD * noise
    return (values.reshape(-1, FEATURES) / (1 + SPREAD)).astype(np.float32)


def task_of(rng: np.random.Generator, classes: np.ndarray) -> PhaseData:
    """All examples of some classes, which are renumbered from 0."""
    rows = (classes[:, None] * PER_CLASS + np.arange(PER_CLASS)).reshape(-1)
    order = rng.permutation(rows.size)
    labels = np.repeat(np.arange(len(classes)), PER_CLASS)
    train, validation, _ = split_sizes(rows.size)
    ends = [train, train + validation]
    cut_rows, cut_labels = np.split(rows[order], ends), np.split(labels[order], ends)
    return PhaseData(rows=(cut_rows[0], cut_rows[1], cut_rows[2]), labels=(cut_labels[0], cut_labels[1], cut_labels[2]))


def _classes(rng: np.random.Generator, held_out: bool, count: int) -> np.ndarray:
    return rng.choice(POOL // 2, count, replace=False) + POOL // 2 * int(held_out)


class AlternatingClasses(PhasedFamily):
    """Alternating tasks of five classes and of one, all of them new.

    After 5+1 CIFAR (Kumar et al., arXiv 2308.11958): the single-class tasks are trivial and invite collapse, so results
    are those of the five-class (hard) phases, which come first, third, and so on.
    """

    max_phases, max_examples = PHASES, PHASES // 2 * 6 * PER_CLASS

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, {"inputs": FEATURES, "hidden": 64, "outputs": 5, "depth": 2}, _pool())

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """Five hard phases and five easy ones."""
        classes = _classes(rng, held_out, PHASES // 2 * 6)
        phases = [task_of(rng, part) for hard in classes.reshape(-1, 6) for part in (hard[:5], hard[5:])]
        return Story(phases=phases, traits={"hard_phases": list(range(0, PHASES, 2))})


class ClassPairs(PhasedFamily):
    """A new pair of classes in each phase; the output layer starts each one at zero.

    After Continual ImageNet (Dohare et al., *Loss of plasticity in deep continual learning*, Nature 632, 2024), whose
    heads are reset at each task.
    """

    max_phases, max_examples = PHASES, PHASES * 2 * PER_CLASS
    reset_each_phase = ("layers.2.weight", "layers.2.bias")

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc, {"inputs": FEATURES, "hidden": 64, "outputs": 2, "depth": 2}, _pool())

    def story(self, rng: np.random.Generator, held_out: bool) -> Story:
        """Ten pairs."""
        pairs = _classes(rng, held_out, 2 * PHASES).reshape(-1, 2)
        return Story(phases=[task_of(rng, pair) for pair in pairs])
