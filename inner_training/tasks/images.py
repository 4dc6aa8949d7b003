"""Families of small images, learned by convolutional networks."""

from __future__ import annotations

import math

import numpy as np
import torch

from trimtab.inner_training.networks import Arrays, build_module
from trimtab.inner_training.networks.conv_head import ConvHead, initial_conv_head
from trimtab.inner_training.networks.convnets import ChannelNet, ConvNet, ResidualNet, initial_channels
from trimtab.inner_training.tasks import sprites, textures
from trimtab.inner_training.tasks.classification import ClassificationFamily, Examples, Variation

CHANNELS = {"sprites": (8, 16), "textures": (8, 32)}  # of the convolutions
HEAD_UNITS = 64
RESIDUAL_CHANNELS = 12


class ImageFamily(ClassificationFamily):
    """Grey images of 16 x 16 pixels, learned by a network with channel gates.

    Set in all subclasses:
        ``examples``, and what ``__init__`` takes.
    """

    module: ChannelNet

    def __init__(self, name: str, doc: str, module: ChannelNet, images: np.ndarray) -> None:
        """Sets what all subclasses need.

        Args:
            name: lower-case words with hyphens; it seeds the streams of the instances.
            doc: one line for tables.
            module: the network.
            images: (R, colours, size, size) float32 table.
        """
        self.name, self.doc, self.module = name, doc, module
        self.widest = module.channels
        self.variation = Variation(narrowest=3 * module.channels // 8)
        self.inputs = torch.from_numpy(images)
        self.max_batch = self.recipe.batch[1]
        self.loss_cap = 2 * math.log(module.outputs)

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters and gates (see ``initial_channels``)."""
        return initial_channels(self.module, rng, width, scale)


class Sprites(ImageFamily):
    """Some of sixteen drawn shapes (see ``sprite_examples``).

    Held-out instances have images of their own, which look different as well: dark on light with a smooth clutter, not
    light on dark among dots. The families of sprites share the table, so that none has seen what another is judged on.
    """

    max_examples = sprites.MOST

    def __init__(self, name: str, doc: str, residual: bool = False) -> None:
        def make() -> ChannelNet:
            if residual:
                return ResidualNet(1, RESIDUAL_CHANNELS, sprites.CLASSES)
            return ConvNet(1, sprites.SIZE, CHANNELS["sprites"], sprites.CLASSES)

        super().__init__(name, doc, build_module(make, seed=0), sprites.sprite_table()[0])

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws shapes, a level of noise and images (see ``sprite_examples``)."""
        return sprites.sprite_examples(rng, held_out)


class SpritesHead(ClassificationFamily):
    """The sprites of ``Sprites``, learned by two dense convolutions under a head of two hidden layers with gates.

    Its units are those of the head alone, so it is the network of choice where growth above a trunk is studied.
    """

    module: ConvHead
    max_examples = sprites.MOST

    def __init__(self, name: str, doc: str, units: int = HEAD_UNITS, activation: str = "relu") -> None:
        """Sets what families have.

        Args:
            name: lower-case words with hyphens; it seeds the streams of the instances.
            doc: one line for tables.
            units: outputs of each hidden layer of the head, at least 8.
            activation: of the head, a name of ``PLASTIC_ACTIVATIONS``.
        """
        self.name, self.doc = name, doc
        self.module = build_module(
            lambda: ConvHead(1, sprites.SIZE, CHANNELS["sprites"], units, sprites.CLASSES, activation=activation),
            seed=0,
        )
        self.widest = self.module.dense.units
        self.inputs = torch.from_numpy(sprites.sprite_table()[0])
        self.max_batch = self.recipe.batch[1]
        self.loss_cap = 2 * math.log(sprites.CLASSES)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws shapes, a level of noise and images (see ``sprite_examples``)."""
        return sprites.sprite_examples(rng, held_out)

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters and gates (see ``initial_conv_head``)."""
        return initial_conv_head(self.module, rng, width, scale)


class Textures(ImageFamily):
    """Which photograph a patch is from (see ``texture_examples``); held-out instances have photographs of their own.

    Raises:
        MissingExtraError: when scikit-image is not installed.
    """

    max_examples = textures.MOST

    def __init__(self, name: str, doc: str) -> None:
        images = textures.texture_table()[0]

        def make() -> ChannelNet:
            return ConvNet(1, textures.SIZE, CHANNELS["textures"], textures.MOST_CLASSES, pooled=True)

        super().__init__(name, doc, build_module(make, seed=0), images)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """Draws photographs and tiles (see ``texture_examples``)."""
        return textures.texture_examples(rng, held_out)
