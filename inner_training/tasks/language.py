"""Language: windows of bytes, each predicted from those before it; the source code of Python's own standard library."""

from __future__ import annotations

import hashlib
import math
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError, unknown
from trimtab.inner_training.networks import build_module
from trimtab.inner_training.networks.transformer import LanguageModel, initial_transformer
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.inner_training.tasks.classification import cross_entropy
from trimtab.inner_training.tasks.recipe import (
    RecipeRange,
    draw_recipe,
    log_uniform,
    noisy_labels,
    rng_for,
    split_sizes,
)

NETWORK = {"context": 32, "width": 32, "depth": 2, "heads": 2, "units": 64, "tied": False}
FEWEST, MOST, MOST_PARTS = 250, 4000, 16  # windows of an instance, and files or sections that they are from
MOST_JUDGED = (128, 256)  # windows in validation and test; text is plentiful, and judging on more costs much time
FEWEST_WINDOWS = 32  # of all training and of all held-out instances: 19 train, 5 validate and 8 test at the least
ASCII, BYTES = 128, 256
SIZES = (4 * 1024, 64 * 1024)  # bytes of a module; smaller ones are mostly tables and imports, larger ones dominate
GENERATED = ("stringprep",)  # the one module within SIZES that a program has written
FEWEST_FILES = 40
# Mostly AdamW, the usual rule of transformers: a kind named twice is twice as likely.
RECIPE = RecipeRange(kinds=("adamw", "adamw", "adam", "sgd-momentum"), batch=(2, 4))


@dataclass(frozen=True, kw_only=True)
class TextVariation:
    """What varies between instances besides data and recipe; ranges are inclusive.

    Attributes:
        corrupted: highest share of corrupted training windows; half of the instances have none, the others a uniform
            share up to this one.
        replaced: chance of each byte of a corrupted window to be another one, uniformly.
        init_scale: log-uniform factor of the initial weights (see ``initial_transformer``).
        narrowest: fewest active hidden units per block; log-uniform up to those of the module.
    """

    corrupted: float = 1.0
    replaced: float = 0.2
    init_scale: tuple[float, float] = (0.5, 2.0)
    narrowest: int = 16


class Part(NamedTuple):
    """A stretch of text that belongs to training instances or to held-out ones.

    Attributes:
        name: of the file or the section.
        data: its bytes.
        held_out: whose it is.
    """

    name: str
    data: bytes
    held_out: bool


def windows(parts: Sequence[Part], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each part into windows that do not overlap, without what is left at its end.

    A window that has occurred before, in any part, is left out: no two windows are equal.

    Args:
        parts: the text.
        length: bytes of a window.

    Returns:
        (W, length) uint8 windows, and the number of its part for each (W,) int64, in order.
    """
    tables, owners = [], []
    for number, part in enumerate(parts):
        count = len(part.data) // length
        tables.append(np.frombuffer(part.data, dtype=np.uint8, count=count * length).reshape(count, length))
        owners.append(np.full(count, number))
    table, owner = np.concatenate(tables), np.concatenate(owners)
    whole = np.ascontiguousarray(table).view(np.dtype((np.void, length))).ravel()
    first = np.sort(np.unique(whole, return_index=True)[1])
    return table[first], owner[first]


class TextFamily(TaskFamily):
    """Next-byte prediction by a `LanguageModel` on windows of some text.

    An instance takes some parts of the text and some of their windows; training instances and held-out ones take
    different parts. The loss of a window is the mean cross-entropy of its bytes after the first, in nats, and its
    score the share of them that the model ranks first. The bounded loss ends at twice that of guessing among the byte
    values that can occur, ``2 ln(vocabulary)``.

    Attributes:
        parts: names of the parts, in order.
        text_sha256: SHA-256 (hex) of all the text, part after part.
        vocabulary: 128 when the text is ASCII, else 256.
    """

    module: LanguageModel
    score_name = "accuracy"

    def __init__(
        self,
        name: str,
        doc: str,
        parts: Sequence[Part],
        *,
        network: Mapping[str, Any] | None = None,
        recipe: RecipeRange = RECIPE,
        variation: TextVariation | None = None,
    ) -> None:
        """Cuts the text and makes the network.

        Args:
            name: lower-case words with hyphens; it seeds the streams of the instances.
            doc: one line for tables.
            parts: the text.
            network: arguments of `LanguageModel` in place of those of ``NETWORK``.
            recipe: what to draw recipes from; ``recipe.batch`` also limits the batch.
            variation: what else to draw from; None is the default.

        Raises:
            UserError: when there is too little text, or the network cannot be made.
        """
        for argument in network or {}:
            if argument not in NETWORK:
                raise unknown("argument of the network", argument, NETWORK)
        self.name, self.doc, self.recipe = name, doc, recipe
        self.variation = variation or TextVariation()
        self.parts = tuple(part.name for part in parts)
        self.text_sha256 = hashlib.sha256(b"".join(part.data for part in parts)).hexdigest()
        self.vocabulary = ASCII if all(part.data.isascii() for part in parts) else BYTES
        options: dict[str, Any] = {**NETWORK, **(network or {})}
        self.module = build_module(lambda: LanguageModel(self.vocabulary, **options), seed=0)
        table, owner = windows(parts, self.module.context + 1)
        self._count = len(table)
        copies = [table]
        if self.variation.corrupted > 0:
            rng = rng_for(f"{name}-corrupted", 0, held_out=False)
            noisy = noisy_labels(rng, table.astype(np.int16), self.vocabulary, self.variation.replaced)
            copies.append(noisy.astype(np.uint8))
        self.inputs = torch.from_numpy(np.concatenate(copies))
        self._rows = [
            [np.flatnonzero(owner == number) for number, part in enumerate(parts) if part.held_out == held_out]
            for held_out in (False, True)
        ]
        found = [sum(map(len, rows)) for rows in self._rows]
        if min(found) < FEWEST_WINDOWS:
            raise UserError(
                f"the text of {name!r} has {found[0]} different windows of {self.module.context + 1} bytes for training "
                f"instances and {found[1]} for held-out ones; give at least {FEWEST_WINDOWS} each: more text or a "
                "smaller context"
            )
        self._names = [[part.name for part in parts if part.held_out == held_out] for held_out in (False, True)]
        self.max_examples = min(MOST, max(found))
        self.max_batch = recipe.batch[1]
        self.loss_cap = 2 * math.log(self.vocabulary)

    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed`` (see `TaskFamily.draw`).

        Only training windows are corrupted, so that validation and test losses measure what was to be learned.
        """
        rng = rng_for(self.name, seed, held_out)
        rows, names = self._windows(rng, held_out)
        _, *judged = split_sizes(rows.size)
        validation, test = (min(pair) for pair in zip(judged, MOST_JUDGED, strict=True))
        sizes = (rows.size - validation - test, validation, test)
        share = rng.uniform(0, self.variation.corrupted) if rng.random() < 0.5 else 0.0
        hit = rng.random(sizes[0]) < share
        rows[: sizes[0]] += self._count * hit
        init_scale = log_uniform(rng, *self.variation.init_scale)
        heads = int(rng.integers(1, self.module.heads + 1))
        units = round(log_uniform(rng, min(self.variation.narrowest, self.module.units), self.module.units))
        parameters, buffers = initial_transformer(self.module, rng, heads, units, init_scale)
        recipe = draw_recipe(rng, self.recipe, sizes[0])
        return Instance(
            key=f"{self.name}/{'held-out' if held_out else 'train'}/{seed}",
            seed=int(rng.integers(2**31)),
            rows=rows,
            labels=np.zeros(rows.size, dtype=np.int64),
            sizes=sizes,
            parameters=parameters,
            buffers=buffers,
            batch_size=recipe.batch_size,
            steps=recipe.steps,
            optimizer=recipe.optimizer,
            schedule=recipe.schedule,
            traits={
                "parts": names,
                "text_sha256": self.text_sha256,
                "examples": rows.size,
                "corrupted": share,
                "init_scale": init_scale,
                "heads": heads,
                "width": units,
                "optimizer": recipe.kind,
            },
        )

    def _windows(self, rng: np.random.Generator, held_out: bool) -> tuple[np.ndarray, list[str]]:
        """Rows (n,) int64 of an instance in random order, and the names of the parts that they are from."""
        rows, names = self._rows[held_out], self._names[held_out]
        order = rng.permutation(len(rows))
        available = np.cumsum([len(rows[part]) for part in order])
        fewest = min(FEWEST, int(available[-1]))
        count = round(log_uniform(rng, fewest, min(MOST, available[-1])))
        parts = max(round(log_uniform(rng, 1, MOST_PARTS)), int(np.searchsorted(available, fewest)) + 1)
        chosen = np.sort(order[:parts])
        pool = np.concatenate([rows[part] for part in chosen])
        return rng.permutation(pool)[:count].astype(np.int64), [names[part] for part in chosen]

    def present(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (..., B, context + 1) become what the model sees and what it should answer, (..., B, context)."""
        return inputs[..., :-1], inputs[..., 1:]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy per byte: (B, context, vocabulary) and (B, context) give (B,)."""
        return cross_entropy(outputs, labels).mean(-1)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Share of the bytes that the model ranks first: (B, context, vocabulary) and (B, context) give (B,)."""
        return (outputs.argmax(-1) == labels).float().mean(-1)


def library_folder() -> Path:
    """Where the running Python keeps the source code of its standard library."""
    return Path(sysconfig.get_path("stdlib"))


@cache
def library_parts(folder: Path) -> tuple[Part, ...]:
    """The modules of the standard library that `StandardLibrary` learns, by name.

    Taken are public modules that are one file of 4 to 64 KiB, in ASCII, and not generated. A module's name alone
    decides whose it is (the parity of its SHA-256), so that it is the same in each version of Python.

    Args:
        folder: what `library_folder` returns.

    Raises:
        UserError: when there are too few, as where Python comes without its sources.
    """
    parts = []
    for module in sorted(sys.stdlib_module_names):
        path = folder / f"{module}.py"
        if module.startswith("_") or module in GENERATED or not path.is_file():
            continue
        data = path.read_bytes()
        if SIZES[0] <= len(data) <= SIZES[1] and data.isascii():
            held_out = bool(hashlib.sha256(module.encode()).digest()[-1] & 1)
            parts.append(Part(path.name, data, held_out))
    if len(parts) < FEWEST_FILES:
        raise UserError(
            f"the source code of Python's standard library is not in {folder}: {len(parts)} of at least {FEWEST_FILES} "
            "modules were found; run a Python that has it, or learn a text file of your own (text:PATH)"
        )
    return tuple(parts)


class StandardLibrary(TextFamily):
    """Source code of Python's standard library: whole modules belong to training instances or to held-out ones.

    The text differs between versions of Python, so instances are comparable within one version; which it was is
    recorded.

    Attributes:
        manifest: SHA-256 and name of each file, as ``sha256sum`` prints them: in the library's folder,
            ``sha256sum --check`` accepts it.
    """

    def __init__(self, name: str, doc: str) -> None:
        parts = library_parts(library_folder())
        super().__init__(name, doc, parts)
        self.manifest = "".join(f"{hashlib.sha256(part.data).hexdigest()}  {part.name}\n" for part in parts)
