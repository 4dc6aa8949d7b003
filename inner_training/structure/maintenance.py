"""Maintenance: named methods that keep a network able to learn, by resetting units or by holding weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trimtab.errors import RangeError, UserError, out_of_range, unknown
from trimtab.inner_training.structure.unit_rules import (
    Contribution,
    Dormant,
    Replacement,
    SelfNormalised,
    UnitRule,
)
from trimtab.inner_training.structure.weight_rules import (
    Clipping,
    DecayAndNoise,
    ShrinkAndPerturb,
    TowardsInitial,
    UtilityPerturbed,
    WeightRule,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A number that a method takes.

    Attributes:
        name: a lower-case word.
        default: its value if none is given.
        low, high: the range, inclusive.
        source: where the default comes from.
        whole: whether it is a whole number.
    """

    name: str
    default: float
    low: float
    high: float
    source: str
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to maintain a network.

    Attributes:
        name: lower-case words with hyphens.
        doc: what it does, in one line.
        source: where it comes from.
        rule: the formula: it says which units are due, or changes gradients and weights.
        settings: the numbers that it takes. Of a method that acts on weights, ``every`` is the number of steps from one
            change of the values to the next.
        compensates: whether the biases of what reads a reset unit take over what it gave on average.
    """

    name: str
    doc: str
    source: str
    rule: UnitRule | WeightRule
    settings: tuple[Setting, ...]
    compensates: bool = False

    @property
    def acts_on(self) -> Literal["units", "weights"]:
        """What it changes."""
        return "units" if isinstance(self.rule, UnitRule) else "weights"

    @property
    def needs(self) -> frozenset[str]:
        """Fields of ``Evidence`` that it reads beside ``alive``."""
        return self.rule.needs if isinstance(self.rule, UnitRule) else frozenset()

    @property
    def sees_outputs(self) -> bool:
        """Whether it reads what units put out."""
        return isinstance(self.rule, UnitRule) and self.rule.sees_outputs


OURS = "ours"
TINY = 1e-12  # the least of what must be above 0
LONG = 10**9  # steps


def _real(name: str, default: float, low: float, high: float, source: str = OURS) -> Setting:
    return Setting(name=name, default=default, low=low, high=high, source=source)


def _steps(name: str, default: int, source: str = OURS, low: int = 1, high: int = LONG) -> Setting:
    return Setting(name=name, default=default, low=low, high=high, source=source, whole=True)


def _table() -> tuple[Method, ...]:
    dohare, kumar = "Dohare et al., Nature 632, 2024", "Kumar et al., arXiv 2308.11958"
    sokar, farias = "Sokar et al., arXiv 2302.12902", "Farias & Jozefiak, arXiv 2410.20098"
    nature = f"{dohare}, code"
    rate = (_real("rate", 1e-4, TINY, 0.999, nature), _steps("maturity", 100, nature, low=0))
    checks = (_steps("every", 1000, f"{sokar}"), _steps("window", 10, high=10**6))
    return (
        Method(name="redo", doc="resets units whose E|h| is a small part of the layer's mean", source=sokar,
               rule=Dormant("mean_abs", spares_silence=False),
               settings=(_real("threshold", 0.1, 0, 1, f"{sokar}; 0.025 in the default of its code"), *checks)),
        Method(name="grama", doc="resets units whose E|dL/dz| is a small part of the layer's mean", source="Liu et al., arXiv 2505.24061",
               rule=Dormant("pre_grad", spares_silence=True), settings=(_real("threshold", 0.01, 0, 1, "AgileRL 2.13, release notes"), *checks)),
        Method(name="continual-backprop", doc="resets at each step a share of the mature units, those of the lowest running utility E|h - mean| x mean |column| / mean |row|", source=dohare,
               rule=Contribution(), settings=(*rate, _real("decay", 0.99, 0, 0.999999, nature)), compensates=True),
        Method(name="random-reset", doc="resets at each step a share of the mature units, at random: the control", source="",
               rule=Replacement(), settings=rate),
        Method(name="self-normalised", doc="resets units that are silent for longer than a percentile of their own silences", source=farias,
               rule=SelfNormalised(),
               settings=(_real("percentile", 0.99, 0.5, 0.9999, f"{farias}, code"), _real("factor", 2, 1.01, 100, f"{farias}, code"),
                         _steps("first", 100, high=10**4), _steps("longest", 1000, high=10**4), _steps("window", 1000))),
        Method(name="shrink-and-perturb", doc="keep x weights + noise x a fresh draw of initial values, every so many steps", source="Ash & Adams, arXiv 1910.08475",
               rule=ShrinkAndPerturb(), settings=(_real("keep", 0.4, 0, 1, "Ash & Adams, code"), _real("noise", 0.1, 0, 1, "Ash & Adams, code"), _steps("every", 1000))),
        Method(name="shrink-and-perturb-step", doc="the same at each step, gently: weights without gradient keep their initial spread, as noise^2 = 1 - keep^2", source=f"after {kumar}",
               rule=ShrinkAndPerturb(), settings=(_real("keep", 0.9999, 0, 1), _real("noise", 0.014142, 0, 1), _steps("every", 1))),
        Method(name="l2-init", doc="adds strength x (w - initial w) to the gradient", source=kumar,
               rule=TowardsInitial(), settings=(_real("strength", 1e-3, 0, 10),)),
        Method(name="l2-noise", doc="adds strength x w to the gradient, and normal noise of a standard deviation to w after each step", source=f"{dohare}: its shrink and perturb",
               rule=DecayAndNoise(), settings=(_real("strength", 1e-4, 0, 10, nature), _real("noise", 1e-5, 0, 1, nature), _steps("every", 1))),
        Method(name="weight-clipping", doc="holds w within +-kappa / sqrt(fan_in), of the layer for biases too", source="Elsayed et al., arXiv 2407.01704",
               rule=Clipping(), settings=(_real("kappa", 1, TINY, 1e6, "Elsayed et al., code"), _steps("every", 1, "Elsayed et al., code"))),
        Method(name="upgd", doc="gradient becomes 2 (g + normal noise) (1 - sigmoid(u / largest u)), u the running average of -g w", source="Elsayed & Mahmood, ICLR 2024",
               rule=UtilityPerturbed(), settings=(_real("decay", 0.999, 0, 0.999999, "Elsayed & Mahmood, code"), _real("noise", 0.001, 0, 10, "Elsayed & Mahmood, code"))),
    )  # fmt: skip


MAINTENANCE: dict[str, Method] = {method.name: method for method in _table()}


def resolve_maintenance(name: str, acts_on: str | None = None) -> Method:
    """The method of a name.

    Args:
        name: of the table.
        acts_on: ``units`` or ``weights``; None for any.

    Raises:
        UnknownNameError: there is none; the message names the nearest.

    >>> resolve_maintenance("redo").acts_on
    'units'
    """
    able = [key for key, method in MAINTENANCE.items() if acts_on in (None, method.acts_on)]
    if name not in able:
        raise unknown("maintenance" if acts_on is None else f"maintenance of {acts_on}", name, able)
    return MAINTENANCE[name]


class Adjustable(Protocol):
    """What has settings: an entry of a table."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> tuple[Setting, ...]: ...


def checked_settings(method: Adjustable, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """All settings of a method, on the CPU: those that are given, and defaults; int64 where they are whole, else float64.

    Args:
        method: of the table.
        given: numbers or tensors by name.

    Raises:
        UserError: a name is not one of the method's, or a value is out of its range.

    >>> checked_settings(resolve_maintenance("l2-init"), {})
    {'strength': tensor(0.0010, dtype=torch.float64)}
    """
    known = {setting.name: setting for setting in method.settings}
    for name in given:
        if name not in known:
            raise unknown(f"setting of {method.name}", name, known)
    return {name: _checked(setting, given.get(name, setting.default), method.name) for name, setting in known.items()}


def _checked(setting: Setting, value: Any, owner: str) -> Tensor:
    what = f"{setting.name} of {owner}"
    try:
        plain = value.detach().cpu() if isinstance(value, Tensor) else value  # some devices have no float64
        number = torch.as_tensor(plain, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what} is {value!r}; give a number between {setting.low:g} and {setting.high:g}") from error
    if isinstance(value, bool) or not bool(((number >= setting.low) & (number <= setting.high)).all()):
        shown = value if not isinstance(value, Tensor) else f"between {number.min():g} and {number.max():g}"
        raise out_of_range(what, shown, setting.low, setting.high)
    if not setting.whole:
        return number
    if not bool((number == number.round()).all()):
        raise RangeError(f"{what} is {value}; it must be a whole number")
    return number.to(torch.int64)
