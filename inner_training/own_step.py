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
        deaf_to: hyperparameters whose levers would do nothing, so that they are not available.
    """

    kind: str
    classes: tuple[str, ...]
    marks: frozenset[str]
    kept: frozenset[str]
    meaning: str
    deaf_to: frozenset[str] = frozenset()

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
    # The rest are of torch.optim (2.13), known by their groups; tests/inner_training/test_own_step.py measures every one of them.
    OwnStep(
        kind="a size for each weight, by the signs of its gradients",
        classes=(),
        marks=frozenset(("etas", "step_sizes")),
        kept=frozenset(),
        meaning=(
            "the learning rate is the size of the very first step alone, so the levers lr and grad_clip are not available, and "
            "the guard cannot lower the rate after a rollback; give another optimizer to steer its rate"
        ),
        deaf_to=frozenset(("lr", "grad_clip")),
    ),
    OwnStep(
        kind="a size that it works out for the next step at each one",
        classes=(),
        marks=frozenset(("lambd", "alpha", "t0")),
        kept=frozenset(),
        meaning="the multiplier takes effect one step late, also after a rollback, and so does the way back to 1",
    ),
    OwnStep(
        kind="at most one over the root of the number of steps",
        classes=(),
        marks=frozenset(("beta2_decay",)),
        kept=frozenset(),
        meaning=(
            "the multiplier scales the learning rate, which does nothing as long as it lies above that: at lr=0.01 from step "
            "10,000 on; a smaller learning rate leaves it to the multiplier for longer"
        ),
    ),
    OwnStep(
        kind="several iterations, perhaps with a line search",
        classes=(),
        marks=frozenset(("history_size", "line_search_fn")),
        kept=frozenset(),
        meaning=(
            "the multiplier scales each of its iterations, of which the later ones make up for the first; with a line search "
            "it is only where that begins; with max_iter=1 and none it scales the step"
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
    >>> sorted(own_step(torch.optim.Rprop([torch.zeros(1)])).deaf_to)
    ['grad_clip', 'lr']
    """
    names = [base.__name__.lower() for base in type(optimizer).__mro__]
    keys = set(optimizer.param_groups[0])
    for found in OWN_STEPS:
        if found.marks <= keys or any(part in name for part in found.classes for name in names):
            return found
    return None
