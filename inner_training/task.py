"""What a run learns: instances (one concrete problem and recipe) and the families that draw them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trimtab.inner_training.schedules import BaseSchedule
from trimtab.inner_training.update_rules import DEFAULT_RULES

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer a user would have chosen; hyperparameters are the *base* that levers multiply.

    Attributes:
        rule: name of an update rule (``trimtab.inner_training.update_rules.UPDATE_RULES``).
        lr: initial learning rate, > 0.
        momentum: momentum or beta1, as the rule has it (``UpdateRule.momentum``), in [0, 1).
        weight_decay: coupled or decoupled decay, as the rule has it (``UpdateRule.decoupled``), >= 0.
        nesterov: Nesterov momentum (SGD only; NAdam and Muon always have it).
        beta2: decay of the second moment (alpha of RMSprop), or of Lion's average, in [0, 1).
        eps: floor of the denominator, > 0.
    """

    rule: str
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    beta2: float = 0.999
    eps: float = 1e-8


@dataclass(frozen=True)
class Phase:
    """A part of a run with data of its own.

    Attributes:
        first_step: the step that it begins with; 0 for the first phase.
        sizes: its examples in train, validation and test.
    """

    first_step: int
    sizes: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One concrete inner problem with its recipe: everything that a population needs to start a run.

    Arrays are host-side numpy; ``n`` is the number of examples of this instance (all splits together) and
    must not exceed the family's ``max_examples``.

    Attributes:
        key: human-readable identity, ``family/train|held-out/seed``; equal keys are equal instances.
        seed: seed of the run's own random stream, which orders its batches, in [0, 2**31).
        rows: (n,) int64 rows of the family's shared input table, ordered train, validation, test.
        labels: (n,) int64 class numbers or float32 targets, in the same order.
        sizes: examples in train, validation and test; they sum to ``n``. Of the first phase, where there are phases.
        phases: what changes while the run trains: the phases lie one after another in ``rows`` and ``labels``, each
            ordered train, validation, test, and may repeat rows; their sizes sum to ``n``. Empty for data that stays.
        input_scale: factor applied to the inputs, > 0.
        parameters: initial value of each parameter of the family's module.
        buffers: value of each buffer of the family's module (for example unit gates).
        batch_size: examples per step, in [1, family.max_batch] and at most ``sizes[0]``.
        steps: the budget of the run in optimizer steps, >= 1.
        optimizer: base hyperparameters.
        schedule: the base learning-rate schedule, on top of which multipliers act.
        traits: what was drawn, for reports (class count, label noise, width, ...).
    """

    key: str
    seed: int
    rows: np.ndarray
    labels: np.ndarray
    sizes: tuple[int, int, int]
    parameters: Mapping[str, np.ndarray]
    buffers: Mapping[str, np.ndarray]
    batch_size: int
    steps: int
    optimizer: OptimizerSettings
    schedule: BaseSchedule
    input_scale: float = 1.0
    traits: Mapping[str, Any] = field(default_factory=dict)
    phases: tuple[Phase, ...] = ()

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases, of which data that stays has one."""
        return self.phases or (Phase(0, self.sizes),)

    def split(self, name: str, phase: int = 0) -> slice:
        """Positions of a split of a phase inside ``rows`` and ``labels``."""
        index, phases = SPLITS.index(name), self.all_phases
        start = sum(sum(earlier.sizes) for earlier in phases[:phase]) + sum(phases[phase].sizes[:index])
        return slice(start, start + phases[phase].sizes[index])

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what is learned and from where: rows, labels, parameters, seed and recipe."""
        digest = hashlib.sha256()
        for array in (self.rows, self.labels, *self.parameters.values(), *self.buffers.values()):
            digest.update(np.ascontiguousarray(array).tobytes())
        recipe = (self.seed, self.sizes, self.batch_size, self.steps, self.optimizer, self.schedule, self.input_scale)
        digest.update(repr((*recipe, self.phases) if self.phases else recipe).encode())
        return digest.hexdigest()


class TaskFamily(ABC):
    """A distribution of instances that share one architecture and one table of inputs.

    Set in all subclasses:
        name: lower-case words with hyphens.
        doc: one line for tables.
        module: template network; ``module(x)`` maps ``(B, *shape)`` to ``(B, outputs)``. It is never trained itself.
        inputs: (R, *shape) table of inputs, shared by all runs: float32, or integers, which ``input_scale`` leaves
            alone and which the module receives as int64.
        max_examples: width of the per-run row and label maps.
        max_batch: batch slots per step; smaller batches use weights.
    Set in some:
        label_dtype: ``torch.int64`` (classes, default) or ``torch.float32`` (regression).
        loss_floor, loss_cap: range of the bounded loss (see ``bounded``).
        score_name: what ``score`` is, such as ``accuracy``; empty when there is none.
        max_phases: the most phases that an instance has.
        reset_each_phase: names of parameters that start every later phase at zero, such as those of an output layer.
    """

    name: str
    doc: str
    module: nn.Module
    inputs: Tensor
    max_examples: int
    max_batch: int = 64
    label_dtype: torch.dtype = torch.int64
    loss_floor: float = 1e-4
    loss_cap: float
    score_name: str = ""
    max_phases: int = 1
    reset_each_phase: tuple[str, ...] = ()

    @property
    def rules(self) -> tuple[str, ...]:
        """Update rules that its instances may use; each costs a little, so a family names those that it draws."""
        return DEFAULT_RULES

    @abstractmethod
    def draw(self, seed: int, *, held_out: bool) -> Instance:
        """Draws the instance of ``seed``; the same arguments give the same instance, whatever else happened.

        Instances drawn with ``held_out=True`` are disjoint from those drawn with ``held_out=False``.
        """

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each example: outputs (B, outputs) and labels (B,) give (B,)."""

    def present(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the module sees, and what ``loss`` compares with: examples (..., B, *shape) and labels (..., B).

        By default they are what the tables hold; a language model's labels are its inputs, one place later.
        """
        return inputs, labels

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Score of each example, (B,) float, for families with a ``score_name``; by default the accuracy of classes."""
        return (outputs.argmax(-1) == labels).float()

    def bounded(self, loss: np.ndarray) -> np.ndarray:
        """Maps any mean loss to ``[loss_floor, loss_cap]``; NaN and infinity give the cap.

        Bounded, NaN-free losses make rewards and scores comparable (the idea of a task normaliser in
        Metz et al., *VeLO*, arXiv 2211.09760, section on training tasks).
        """
        filled = np.where(np.isfinite(loss), loss, self.loss_cap)
        return np.clip(filled, self.loss_floor, self.loss_cap)
