"""Three small tables: the iris, wine and breast cancer data bundled with scikit-learn, no download."""

from __future__ import annotations

import numpy as np

from trimtab.inner_training.tasks.classification import Examples, MLPFamily
from trimtab.inner_training.tasks.recipe import halves

DATA_SETS = ("iris", "wine", "breast-cancer")
FEATURES, CLASSES, HIDDEN = 30, 3, 64
FEWEST = 60


def _load(data_set: str) -> tuple[np.ndarray, np.ndarray]:
    """Features (R, F), each standardised over the whole table, and labels (R,)."""
    from sklearn import datasets

    loaders = {"iris": datasets.load_iris, "wine": datasets.load_wine, "breast-cancer": datasets.load_breast_cancer}
    features, labels = loaders[data_set](return_X_y=True)
    return (features - features.mean(0)) / features.std(0), labels.astype(np.int64)


class TabularMLP(MLPFamily):
    """One of three tables, learned by an MLP of one hidden layer.

    The tables are stacked in one, padded with zero columns to 30 features. The examples of each are split once into
    two halves, of training and of held-out instances.
    """

    def __init__(self, name: str, doc: str) -> None:
        loaded = [_load(data_set) for data_set in DATA_SETS]
        starts = np.cumsum([0, *(labels.size for _, labels in loaded)])
        table = np.zeros((starts[-1], FEATURES), dtype=np.float32)
        for start, (features, _) in zip(starts, loaded, strict=False):
            table[start : start + len(features), : features.shape[1]] = features
        super().__init__(name, doc, {"inputs": FEATURES, "hidden": HIDDEN, "outputs": CLASSES}, table)
        self._features = [features.shape[1] for features, _ in loaded]
        self._labels = np.concatenate([labels for _, labels in loaded])
        self._halves = [
            [start + half for half in halves(data_set, labels.size)]
            for data_set, start, (_, labels) in zip(DATA_SETS, starts, loaded, strict=False)
        ]
        self.max_examples = max(half.size for pair in self._halves for half in pair)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws a table, and at least 60 of the examples of its half."""
        index = int(rng.integers(len(DATA_SETS)))
        half = self._halves[index][int(held_out)]
        count = int(rng.integers(FEWEST, half.size + 1))
        rows = rng.permutation(half)[:count]
        return Examples(
            rows=rows,
            labels=self._labels[rows],
            classes=int(self._labels[half].max()) + 1,
            features=self._features[index],
            traits={"data_set": DATA_SETS[index], "examples": count},
        )
