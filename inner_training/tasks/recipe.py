"""The draws that every family shares: random streams, splits, and the recipe that a user would have written."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from trimtab.errors import UserError, out_of_range, unknown
from trimtab.inner_training.schedules import SCHEDULES, BaseSchedule
from trimtab.inner_training.task import OptimizerSettings
from trimtab.inner_training.update_rules import DEFAULT_RULES, UPDATE_RULES

# Share of each kind of optimizer. SGD kinds and Adam kinds are as common, plain SGD is the rare one.
USUAL_KINDS = {"sgd-momentum": 0.25, "sgd-nesterov": 0.15, "sgd": 0.1, "adam": 0.25, "adamw": 0.25}
# The others are drawn only where a recipe names them; every update rule is a kind.
_OTHERS = [*(name for name in UPDATE_RULES if name not in USUAL_KINDS), "rmsprop-momentum"]
OPTIMIZER_KINDS = {**USUAL_KINDS, **dict.fromkeys(_OTHERS, 0.25)}
TRAIN_SHARE, VALIDATION_SHARE = 0.6, 0.15

_TRAIN, _HELD_OUT, _FIXED = 0, 1, 2


def _stream(name: str, purpose: int, seed: int) -> np.random.Generator:
    # The seed comes last because it is the only word of variable length: no two triples give the same words.
    digest = hashlib.sha256(name.encode()).digest()
    words = np.frombuffer(digest, dtype="<u4").tolist()
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*words, purpose, seed])))


def rng_for(family_name: str, seed: int, held_out: bool) -> np.random.Generator:
    """Random stream of one instance; it depends on the arguments and on nothing else.

    A Philox generator (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) seeded with the
    SHA-256 of the family's name, a tag for held-out instances, and the seed.

    Args:
        family_name: name of the family.
        seed: any integer >= 0.
        held_out: whether the instance is one of those kept for judging policies.

    Raises:
        RangeError: when the seed is negative.

    >>> rng_for("digits-mlp", 3, False).integers(100) == rng_for("digits-mlp", 3, False).integers(100)
    np.True_
    """
    if seed < 0:
        raise out_of_range("seed", seed, low=0)
    return _stream(family_name, _HELD_OUT if held_out else _TRAIN, int(seed))


def halves(data_name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits ``range(count)`` once and for all into examples of training instances and of held-out ones.

    Args:
        data_name: name of the data; families that share data share the split by giving the same name.
        count: number of examples.

    Returns:
        Sorted int64 rows of the first half (``count // 2`` of them) and of the second.
    """
    order = _stream(data_name, _FIXED, 0).permutation(count)
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


def split_sizes(count: int) -> tuple[int, int, int]:
    """Sizes of train (60 %), validation (15 %) and test (the rest) for ``count`` examples.

    >>> split_sizes(100)
    (60, 15, 25)
    """
    train, validation = round(TRAIN_SHARE * count), round(VALIDATION_SHARE * count)
    return train, validation, count - train - validation


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high] whose logarithm is uniform; ``0 < low <= high``."""
    return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)


def noisy_labels(rng: np.random.Generator, labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """Replaces each label, with probability ``share``, by another one of the classes, uniformly.

    Args:
        rng: source of the draw.
        labels: (n,) class numbers in [0, classes).
        classes: number of classes, >= 2.
        share: probability in [0, 1].

    Returns:
        (n,) class numbers; the argument is left as it is.
    """
    hit = rng.random(labels.shape) < share
    return np.where(hit, (labels + rng.integers(1, classes, labels.shape)) % classes, labels)


@dataclass(frozen=True, kw_only=True)
class RecipeRange:
    """What a recipe is drawn from. Every pair is an inclusive range, sampled log-uniformly.

    Attributes:
        kinds: optimizers, of ``OPTIMIZER_KINDS``, in their relative shares there; the usual ones unless named.
        sgd_lr: initial learning rate of the SGD kinds. Four decades and independent of everything else, so that
            many runs start far from a good rate.
        adam_lr: initial learning rate of the other kinds, times the rule's ``rate_factor``.
        weight_decay: decay, in the half of the recipes that has one, where it acts through the gradient.
        decoupled_decay: the same where it is multiplied by the learning rate (AdamW and others), over the rule's
            ``rate_factor``.
        one_minus_momentum: 1 - momentum of SGD and RMSprop, where they have any, in the half of the recipes that
            departs from the usual 0.9.
        schedules: base schedules, of ``SCHEDULES``, equally likely, in the half of the recipes that has one;
            empty is a constant rate always.
        batch: examples per step; powers of two times the lower end.
        steps: budget in optimizer steps.
        steps_multiple: budgets are multiples of this, so that they hold whole decision intervals.

    Raises:
        UserError: when a range is empty or not positive, or a name is unknown.
    """

    kinds: tuple[str, ...] = tuple(USUAL_KINDS)
    sgd_lr: tuple[float, float] = (1e-4, 1.0)
    adam_lr: tuple[float, float] = (1e-5, 1e-1)
    weight_decay: tuple[float, float] = (1e-5, 1e-2)
    decoupled_decay: tuple[float, float] = (1e-3, 1e-1)
    one_minus_momentum: tuple[float, float] = (0.02, 0.3)
    schedules: tuple[str, ...] = ("cosine", "warmup-cosine", "step", "wsd", "exponential")
    batch: tuple[int, int] = (4, 64)
    steps: tuple[int, int] = (200, 1000)
    steps_multiple: int = 50

    def __post_init__(self) -> None:
        if not self.kinds:
            raise UserError(f"kinds is empty; name at least one optimizer of: {', '.join(OPTIMIZER_KINDS)}")
        for kind in self.kinds:
            if kind not in OPTIMIZER_KINDS:
                raise unknown("optimizer", kind, OPTIMIZER_KINDS)
        for schedule in self.schedules:
            if schedule not in SCHEDULES:
                raise unknown("schedule", schedule, SCHEDULES)
        for name in ("sgd_lr", "adam_lr", "weight_decay", "decoupled_decay", "one_minus_momentum", "batch", "steps"):
            low, high = getattr(self, name)
            if not 0 < low <= high < math.inf:
                raise UserError(f"{name} is ({low}, {high}); give two positive numbers, the smaller one first")
        if self.one_minus_momentum[1] > 1:
            raise out_of_range("the upper end of one_minus_momentum", self.one_minus_momentum[1], high=1)
        if self.steps_multiple < 1:
            raise out_of_range("steps_multiple", self.steps_multiple, low=1)
        first, last = self.step_multiples()
        if first > last:
            raise UserError(
                f"steps is {self.steps}; it must include a multiple of steps_multiple, {self.steps_multiple}"
            )

    @property
    def rules(self) -> tuple[str, ...]:
        """The update rules of ``kinds``, after the default ones."""
        return tuple(dict.fromkeys((*DEFAULT_RULES, *(kind.partition("-")[0] for kind in self.kinds))))

    def step_multiples(self) -> tuple[int, int]:
        """The shortest and the longest budget, in units of ``steps_multiple``."""
        return -(-self.steps[0] // self.steps_multiple), self.steps[1] // self.steps_multiple


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one run trains: the fields of the same names of an ``Instance``, and the kind of optimizer."""

    kind: str
    optimizer: OptimizerSettings
    schedule: BaseSchedule
    batch_size: int
    steps: int


def draw_recipe(rng: np.random.Generator, ranges: RecipeRange, train_size: int) -> Recipe:
    """Draws a recipe.

    Args:
        rng: source of the draw.
        ranges: what to draw from.
        train_size: examples in the train split; no batch is larger.

    Returns:
        The recipe; a train split smaller than the smallest batch of ``ranges`` is one batch.
    """
    kind, optimizer = _draw_optimizer(rng, ranges)
    low, high = ranges.batch[0], min(ranges.batch[1], train_size)
    doublings = int(math.log2(high / low)) if high >= low else 0
    batch_size = min(low * 2 ** int(rng.integers(doublings + 1)), train_size)
    first, last = ranges.step_multiples()
    multiple = min(max(round(log_uniform(rng, *ranges.steps) / ranges.steps_multiple), first), last)
    return Recipe(
        kind=kind,
        optimizer=optimizer,
        schedule=_draw_schedule(rng, ranges),
        batch_size=batch_size,
        steps=multiple * ranges.steps_multiple,
    )


def _draw_optimizer(rng: np.random.Generator, ranges: RecipeRange) -> tuple[str, OptimizerSettings]:
    shares = np.cumsum([OPTIMIZER_KINDS[kind] for kind in ranges.kinds])
    kind = ranges.kinds[int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))]
    rule = UPDATE_RULES[kind.partition("-")[0]]
    lr = log_uniform(rng, *(ranges.adam_lr if rule.adaptive else ranges.sgd_lr)) * rule.rate_factor
    decay_range = ranges.decoupled_decay if rule.decoupled else ranges.weight_decay
    weight_decay = log_uniform(rng, *decay_range) / rule.rate_factor if rng.random() < 0.5 else 0.0
    varied = kind in ("sgd-momentum", "sgd-nesterov", "rmsprop-momentum")
    momentum = 0.9 if varied else rule.usual_momentum
    if varied and rng.random() < 0.5:
        momentum = 1 - log_uniform(rng, *ranges.one_minus_momentum)
    settings = OptimizerSettings(
        rule=rule.name,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=kind == "sgd-nesterov",
        beta2=rule.usual_beta2,
    )
    return kind, settings


def _draw_schedule(rng: np.random.Generator, ranges: RecipeRange) -> BaseSchedule:
    if not ranges.schedules or rng.random() < 0.5:
        return BaseSchedule()
    kind = ranges.schedules[int(rng.integers(len(ranges.schedules)))]
    return BaseSchedule(
        kind=kind, warmup=(0.05, 0.1, 0.2)[int(rng.integers(3))], floor=(0.0, 0.1)[int(rng.integers(2))]
    )
