"""Sprites learned by a small vision transformer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from trimtab.inner_training.networks import Arrays, build_module
from trimtab.inner_training.networks.transformer import VisionTransformer, initial_transformer
from trimtab.inner_training.tasks.classification import ClassificationFamily, Examples, Variation
from trimtab.inner_training.tasks.language import RECIPE as TRANSFORMER_RECIPE
from trimtab.inner_training.tasks.sprites import CLASSES, MOST, SIZE, sprite_examples, sprite_table

PATCH, WIDTH, DEPTH, HEADS, UNITS = 4, 32, 2, 2, 64


class SpritesViT(ClassificationFamily):
    """Some of the sprites, learned by a transformer of 16 tokens, two heads and at most 64 hidden units per block."""

    module: VisionTransformer
    max_examples = MOST
    variation = Variation(narrowest=16)
    recipe = replace(TRANSFORMER_RECIPE, batch=(2, 8))

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.doc = name, doc
        table, _ = sprite_table()
        self.inputs = torch.from_numpy(table)
        self.module = build_module(
            lambda: VisionTransformer((1, SIZE, SIZE), PATCH, CLASSES, WIDTH, DEPTH, HEADS, UNITS), seed=0
        )
        self.widest, self.max_batch = UNITS, self.recipe.batch[1]
        self.loss_cap = 2 * math.log(CLASSES)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws shapes, a level of noise and images (see ``sprite_examples``)."""
        return sprite_examples(rng, held_out)

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters and gates, with one or two active heads (see ``initial_transformer``)."""
        return initial_transformer(self.module, rng, int(rng.integers(1, HEADS + 1)), width, scale)
