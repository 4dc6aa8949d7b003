"""The optimizer state of newborns, and how fast they move at first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import out_of_range, unknown
from trimtab.inner_training.structure.arithmetic import rows_at

FASTER, WINDOW = 5.0, 1955  # Two-Speed's factor, and for how many steps: Lillo & Cheney, arXiv 2605.15435


@dataclass(frozen=True, kw_only=True)
class NewbornState:
    """One way to begin the optimizer state of newborns.

    Attributes:
        name: lower-case words with hyphens.
        doc: what it does, in one line.
        source: where it comes from.
        copies: whether moments are copied from a matched donor; else they are 0.
        own_steps: whether newborns count their own steps, so that bias correction begins anew (see ``step_correction``).
    """

    name: str
    doc: str
    source: str
    copies: bool = False
    own_steps: bool = False

    def moments(self, held: Tensor, donors: Tensor) -> Tensor:
        """Moments of newborns (..., k, K).

        Args:
            held: (..., U, K) a moment of the group's rows or columns, flattened, unit first.
            donors: (..., k) int64 the donor of each newborn, -1 for none (see ``gradient_growth.matched_donors``).
        """
        return rows_at(held, donors if self.copies else torch.full_like(donors, -1))


NEWBORN_STATES: dict[str, NewbornState] = {
    state.name: state
    for state in (
        NewbornState(name="zero", doc="moments of 0, the parameter's own count of steps", source="Evci et al., arXiv 1911.11134"),
        NewbornState(name="transplant", doc="moments of the incumbent whose row is most alike",
                     source="Moment Transplant, Lillo & Cheney, arXiv 2605.15435", copies=True),
        NewbornState(name="fresh-step", doc="moments of 0, and a count of steps of their own",
                     source="Dohare et al., Nature 632, 2024: AdamGnT", own_steps=True),
    )
}  # fmt: skip


def resolve_newborn_state(name: str) -> NewbornState:
    """The state of a name.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> resolve_newborn_state("zero").moments(torch.ones(2, 3), torch.tensor([1]))
    tensor([[0., 0., 0.]])
    """
    if name not in NEWBORN_STATES:
        raise unknown("newborn state", name, NEWBORN_STATES)
    return NEWBORN_STATES[name]


def step_correction(age: Tensor, step: Tensor, beta1: float, beta2: float) -> Tensor:
    """Factor on an Adam step of entries whose moments began at 0 later than the count of steps did.

    Adam divides by 1 - beta^step; entries of ``age`` steps are owed 1 - beta^age. A step times the factor equals that of an
    entry with a count of its own, up to Adam's eps. It is 1 where age equals step.

    Args:
        age: steps that the entries have had, this one included, >= 1; any shape.
        step: steps that the parameter has had, this one included, >= age.
        beta1, beta2: of Adam, in [0, 1).

    >>> step_correction(torch.tensor([1.0, 100.0]), torch.tensor(100.0), 0.9, 0.999)
    tensor([1.0248, 1.0000])
    """
    first = _debt(beta1, step) / _debt(beta1, age)
    second = _debt(beta2, age) / _debt(beta2, step)
    return torch.where(age == step, 1.0, first * second.sqrt())


def _debt(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps, exact to float32 also for the first steps of a beta near 1."""
    return -torch.expm1(steps * math.log(max(beta, 1e-30)))


def newborn_speed(age: Tensor, factor: float = FASTER, window: int = WINDOW) -> Tensor:
    """Two-Speed: ``factor`` for units of up to ``window`` steps, 1 for all others.

    Args:
        age: (..., U) steps since birth, >= 1; 0 or less for incumbents of the first hour.
        factor: of the newborns' steps, > 0.
        window: steps that a newborn stays fast.

    Raises:
        RangeError: the factor is not above 0.

    >>> newborn_speed(torch.tensor([0, 1, 1955, 1956]))
    tensor([1., 5., 5., 1.])
    """
    if not factor > 0:
        raise out_of_range("factor of newborns' steps", factor, low=0, remedy="above 0; 1 is no difference")
    return torch.where((age >= 1) & (age <= window), factor, 1.0)


def two_speed(before: Tensor, after: Tensor, speed: Tensor) -> Tensor:
    """Two-Speed: parameters after a step that was ``speed`` times as long; bit for bit ``after`` where speed is 1.

    It applies to all entries of a newborn: its row, its bias and its column.

    Args:
        before, after: parameters before and after the optimizer's step, any shape.
        speed: broadcast to them, such as ``newborn_speed(age)[..., None]`` for rows.

    >>> two_speed(torch.tensor([1.0, 1.0]), torch.tensor([1.5, 1.5]), torch.tensor([5.0, 1.0]))
    tensor([3.5000, 1.5000])
    """
    return torch.where(speed == 1, after, before + speed * (after - before))
