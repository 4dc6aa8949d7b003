"""Optimizers that set their own step: what a nudge of the learning rate means there, and what they keep in their groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class OwnStep:
    """A kind of optimizer that sets its own step.

    Attributes:
        kind: its name, for people.
        classes: parts of class names in lower case, any of which gives it away.
        marks: keys of a parameter group that give it away when all are there.
        kept: keys under which it keeps its state in the parameter groups, outside of ``optimizer.state``.
        meaning: what a multiplier on the learning rate does there.
    """

    kind: str
    classes: tuple[str, ...]
    marks: frozenset[str]
    kept: frozenset[str]
    meaning: str

    def warning(self, name: str) -> str:
        """What to tell a user whose optimizer has this class name."""
        return f"{name} sets its own step ({self.kind}): {self.meaning}"


OWN_STEPS = (
    # prodigyopt 1.1 and dadaptation 3.2; Mishchenko and Defazio 2023 (arXiv:2306.06101), Defazio and Mishchenko 2023 (arXiv:2301.07733)
    OwnStep(
        kind="a distance that it estimates",
        classes=("prodigy", "dadapt"),
        marks=frozenset(("d", "d0")),
        kept=frozenset(("d", "d_max", "d_hat", "d_numerator", "d_denom", "numerator_weighted", "gsq_weighted", "k")),
        meaning=(
            "the multiplier scales the step that it estimates, and the estimate goes on from steps of that size; keep "
            "the learning rate at 1 in all groups, and prefer levers other than lr"
        ),
    ),
    # schedulefree 1.4; Defazio et al. 2024 (arXiv:2405.15682)
    OwnStep(
        kind="an average over its steps",
        classes=("schedulefree",),
        marks=frozenset(("weight_sum", "lr_max")),
        kept=frozenset(("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")),
        meaning=(
            "the multiplier moves the fast sequence, while the weights that you evaluate average over all steps and "
            "follow slowly; a raised rate also weighs later steps more, for good. A momentum lever would shift the "
            "point at which it evaluates: govern lr alone"
        ),
    ),
)


def own_step(optimizer: torch.optim.Optimizer) -> OwnStep | None:
    """The kind of an optimizer that sets its own step, by its class's name or by its groups; None for all others.

    >>> own_step(torch.optim.SGD([torch.zeros(1)], lr=0.1)) is None
    True
    >>> class Prodigy(torch.optim.SGD): ...
    >>> own_step(Prodigy([torch.zeros(1)], lr=1.0)).kind
    'a distance that it estimates'
    """
    names = [base.__name__.lower() for base in type(optimizer).__mro__]
    keys = set(optimizer.param_groups[0])
    for found in OWN_STEPS:
        if found.marks <= keys or any(part in name for part in found.classes for name in names):
            return found
    return None
