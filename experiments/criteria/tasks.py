"""What is learned: a convolutional, a language and a vision-transformer task, each with one recipe for all its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from trimtab.inner_training.feeding import first_examples
from trimtab.inner_training.networks import Arrays, build_module
from trimtab.inner_training.networks.convnets import ChannelNet, ConvNet, initial_channels
from trimtab.inner_training.networks.transformer import (
    LanguageModel,
    TransformerBlock,
    VisionTransformer,
    initial_transformer,
)
from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.structure.known import known_groups
from trimtab.inner_training.task import Instance, OptimizerSettings, TaskFamily
from trimtab.inner_training.tasks import sprites
from trimtab.inner_training.tasks.classification import Examples, Variation
from trimtab.inner_training.tasks.images import ImageFamily
from trimtab.inner_training.tasks.language import TextFamily, TextVariation, library_folder, library_parts
from trimtab.inner_training.tasks.vit import HEADS, SpritesViT

IMAGES = 2000  # of an instance: 1200 train, 300 validation, 500 test
Widths = tuple[int, ...]
MLPS = ("blocks.0.up", "blocks.1.up")
PARTS = ("blocks.0.heads", "blocks.0.up", "blocks.1.heads", "blocks.1.up")
NARROW_HEADS = 8  # of a block whose heads are pruned: as wide together as the two of the others
PLAIN = Variation(label_noise=0.0, input_scale=(1.0, 1.0), init_scale=(1.0, 1.0))


def all_sprites(rng: np.random.Generator, held_out: bool) -> Examples:
    """Images of all sixteen shapes at all levels of noise."""
    place = rng.permutation(sprites.CLASSES * sprites.COPIES * len(sprites.NOISE))
    labels = place // sprites.COPIES % sprites.CLASSES
    rows = place + int(held_out) * len(place)
    return Examples(
        rows=rows[:IMAGES], labels=labels[:IMAGES], classes=sprites.CLASSES, features=sprites.SIZE * sprites.SIZE
    )


class WideSprites(ImageFamily):
    """All sprites, learned by two convolutions of so many channels."""

    max_examples = IMAGES

    def __init__(self, channels: Widths) -> None:
        def make() -> ConvNet:
            return ConvNet(1, sprites.SIZE, channels, sprites.CLASSES)

        super().__init__("wide-sprites", "all sprites", build_module(make, seed=0), sprites.sprite_table()[0])
        self.variation = replace(PLAIN, narrowest=self.widest)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """See ``all_sprites``."""
        return all_sprites(rng, held_out)


def rebuilt(module: LanguageModel | VisionTransformer, heads: int, widths: Widths) -> None:
    """Gives a transformer blocks of so many heads, each ``width / heads`` wide, or what ``widths`` leaves of such blocks.

    Args:
        module: whose blocks are replaced.
        heads: of a whole block.
        widths: hidden units of each block, or heads and hidden units of each in turn.
    """
    width, both = module.place.shape[1], len(widths) == 2 * len(module.blocks)
    pairs = list(zip(widths[::2], widths[1::2], strict=True)) if both else [(heads, units) for units in widths]
    module.blocks = build_module(
        lambda: nn.ModuleList(TransformerBlock(width, left, units, width // heads) for left, units in pairs), seed=0
    )
    module.heads, module.units = (min(one) for one in zip(*pairs, strict=True))


class AllSpritesViT(SpritesViT):
    """All sprites, learned by the vision transformer of ``sprites-vit`` with so many heads and hidden units (see ``rebuilt``)."""

    max_examples = IMAGES

    def __init__(self, widths: Widths, heads: int = HEADS) -> None:
        super().__init__("all-sprites-vit", "all sprites")
        rebuilt(self.module, heads, widths)
        self.widest = self.module.units
        self.variation = replace(PLAIN, narrowest=self.widest)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Examples:
        """See ``all_sprites``."""
        return all_sprites(rng, held_out)

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Values of the whole network."""
        return initial_transformer(self.module, rng, self.module.heads, width, scale)


def with_heads(widths: Widths) -> AllSpritesViT:
    """``AllSpritesViT`` with eight narrow heads in a whole block."""
    return AllSpritesViT(widths, NARROW_HEADS)


def clean_language(widths: Widths) -> TextFamily:
    """The language model and text of ``language``, without corrupted windows, with so many hidden units in each block."""
    parts, variation = library_parts(library_folder()), TextVariation(corrupted=0.0)
    family = TextFamily("clean-language", "Python source", parts, variation=variation)
    rebuilt(family.module, family.module.heads, widths)
    return family


@dataclass(frozen=True, kw_only=True)
class Task:
    """A family with one recipe.

    Attributes:
        name: of the task.
        make: the family with so many units in each group.
        rule: update rule.
        rates: learning rates to choose from, by the validation loss of instances of training.
        groups: groups whose units are pruned.
        widths: units of each.
        batch: examples per step.
        calibration: examples per batch of the evidence.
        judged: test examples, the first ones.
        steps: of the dense training.
        tuning: steps of the fine-tuning.
        fewest: examples that an instance has at least; those that draw fewer are passed over.
    """

    name: str
    make: Callable[[Widths], TaskFamily]
    rule: str
    rates: tuple[float, ...]
    groups: tuple[str, ...]
    widths: Widths
    batch: int
    calibration: int
    judged: int
    steps: int
    tuning: int
    fewest: int = 0

    def family(self, widths: Widths | None = None, batch: int | None = None) -> TaskFamily:
        """The family with so many units in each group, whose steps hold ``batch`` examples; by default all units."""
        made = self.make(self.widths if widths is None else widths)
        made.max_batch = self.batch if batch is None else batch
        return made

    def instances(self, family: TaskFamily, count: int, seed: int, *, held_out: bool) -> list[Instance]:
        """The first instances from ``1000 * seed`` on that are large enough, with fresh values of the whole network."""
        found: list[Instance] = []
        number = 1000 * seed
        while len(found) < count:
            drawn = family.draw(number, held_out=held_out)
            if sum(drawn.sizes) >= self.fewest:
                found.append(begun(family, replace(drawn, batch_size=self.batch), number))
            number += 1
        return found

    def multiplications(self, widths: Sequence[int]) -> float:
        """Of one example through the network with so many units in each group, products of attention included."""
        family = self.family(tuple(widths))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            family.module(first_examples(family, 1)[0])
        return counter.get_total_flops() / 2

    def recipe(self, instance: Instance, rate: float, steps: int) -> Instance:
        """The instance at a learning rate that falls to 0 like a cosine over ``steps``."""
        optimizer = OptimizerSettings(rule=self.rule, lr=rate)
        return replace(instance, optimizer=optimizer, steps=steps, schedule=BaseSchedule(kind="cosine"))


def begun(family: TaskFamily, instance: Instance, number: int) -> Instance:
    """The instance with fresh initial values of the network with all its units, drawn for ``number``."""
    rng, module = np.random.default_rng([number, 0xF7E5]), family.module
    values: tuple[Arrays, Arrays]
    if isinstance(module, ChannelNet):
        values = initial_channels(module, rng, module.channels, 1.0)
    else:
        block = module.blocks[0]
        assert isinstance(block, TransformerBlock)
        values = initial_transformer(module, rng, block.heads, block.units, 1.0)
    return replace(instance, parameters=values[0], buffers=values[1])


def narrowed(family: TaskFamily, instance: Instance, gone: Mapping[str, Tensor]) -> Instance:
    """The instance of the smaller network that stays when units (U,) bool by group go; values are copied."""
    values = {**instance.parameters, **instance.buffers}
    for group in known_groups(family.module):
        if group.name not in gone:
            continue
        stay = (~gone[group.name]).nonzero()[:, 0]
        for member in group.members:
            places = member.index[stay].flatten().sort().values.numpy()  # in the tensor's order, whatever a unit's own
            values[member.parameter] = np.take(values[member.parameter], places, member.axis)
    return replace(
        instance,
        parameters={name: values[name] for name in instance.parameters},
        buffers={name: values[name] for name in instance.buffers},
    )


def reordered(instance: Instance, number: int) -> Instance:
    """The same instance with other batches."""
    seed = int(np.random.SeedSequence([instance.seed, number]).generate_state(1)[0] >> 1)
    return replace(instance, seed=seed)


TASKS = {
    task.name: task
    for task in (
        Task(name="sprites-conv", make=WideSprites, rule="sgd", rates=(0.01, 0.03, 0.1, 0.3),
             groups=("layers.0", "layers.1"), widths=(32, 32), batch=16, calibration=32, judged=384, steps=600, tuning=100),
        Task(name="sprites-vit", make=AllSpritesViT, rule="adamw", rates=(3e-4, 1e-3, 3e-3, 1e-2),
             groups=MLPS, widths=(64, 64), batch=8, calibration=16, judged=384, steps=2000, tuning=100),
        Task(name="sprites-vit-heads", make=with_heads, rule="adamw", rates=(3e-4, 1e-3, 3e-3, 1e-2),
             groups=PARTS, widths=(8, 64, 8, 64), batch=8, calibration=16, judged=384, steps=2000, tuning=100),
        Task(name="language", make=clean_language, rule="adamw", rates=(1e-3, 3e-3, 1e-2),
             groups=MLPS, widths=(64, 64), batch=4, calibration=4, judged=128, steps=3000, tuning=50, fewest=2500),
    )
}  # fmt: skip
