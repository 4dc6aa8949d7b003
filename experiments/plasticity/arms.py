"""The arms: what maintains a run, which knob it has, and the settings that it is tuned over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from experiments.plasticity.tasks import Network

from trimtab.inner_training.structure.maintenance import MAINTENANCE

RATES = (3e-3, 1e-2)  # beside three values of the knob
ALONE = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # of arms without a knob
ALONE_SGD = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
START, END = 0.1, 0.5  # of the units that Grow begins with, and of the weights that Grow and Prune end with
EDITS, RESTS = (5, 10, 20), (1, 2, 4, 8)  # numbers of edits, and phases from one to the next
USUAL = Network()
Settings = dict[str, float | torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        doc: for tables.
        rates: learning rates that it is tuned over.
        knob, values: name of its knob, and what it is tuned over; no name for none.
        method: of the table of maintenance.
        settings: (knob values (n,), steps of a phase) to the method's settings.
        operator: ``grow``, ``prune``, or ``prune-rewind``; its knob is the number of phases between edits.
        rule: of the optimizer.
        network: that learns.
        narrow: whether it has the width that Grow and Prune end with from the beginning on.
        decays: whether the knob is the weight decay.
        forgets: whether the optimizer's state is reset at the end of each phase.
    """

    doc: str
    rates: tuple[float, ...] = ALONE
    knob: str = ""
    values: tuple[float, ...] = ()
    method: str = ""
    settings: Callable[[torch.Tensor, int], Settings] | None = None
    operator: str = ""
    rule: str = "adam"
    network: Network = USUAL
    narrow: bool = False
    decays: bool = False
    forgets: bool = False

    def grid(self) -> list[tuple[float, float]]:
        """(learning rate, knob) of each setting that is tried; the knob is 0 where there is none."""
        return [(rate, value) for rate in self.rates for value in self.values or (0.0,)]


def _of_method(name: str, knob: str, values: tuple[float, ...], make: Callable[[torch.Tensor, int], Settings]) -> Arm:
    return Arm(doc=MAINTENANCE[name].doc, rates=RATES, knob=knob, values=values, method=name, settings=make)


def _checked(knob: torch.Tensor, steps: int) -> Settings:
    return {"threshold": knob, "every": steps // 2, "window": min(10, steps // 2)}


def _replacing(knob: torch.Tensor, steps: int) -> Settings:
    return {"rate": knob, "maturity": steps // 2}


def _edits(operator: str, doc: str) -> Arm:
    return Arm(doc=doc, rates=RATES, knob="phases between edits", values=(1, 2, 4), operator=operator)


ARMS: dict[str, Arm] = {
    "none": Arm(doc="plain training"),
    "none-sgd": Arm(doc="plain training by SGD", rates=ALONE_SGD, rule="sgd"),
    "fresh": Arm(
        doc="new weights and optimizer state at the start of each phase: knows when the task changes",
        method="shrink-and-perturb",
        settings=lambda knob, steps: {"keep": 0.0, "noise": 1.0, "every": steps},
        forgets=True,
    ),
    "narrow": Arm(doc="the width that Grow and Prune end with, from the beginning on", narrow=True),
    "l2": Arm(doc="weight decay", rates=RATES, knob="weight decay", values=(1e-4, 1e-3, 1e-2), decays=True),
    "redo": _of_method("redo", "threshold", (0.025, 0.1, 0.3), _checked),
    "grama": _of_method("grama", "threshold", (0.01, 0.1, 0.3), _checked),
    "continual-backprop": _of_method("continual-backprop", "rate", (1e-3, 5e-3, 2e-2), _replacing),
    "random-reset": _of_method("random-reset", "rate", (1e-3, 5e-3, 2e-2), _replacing),
    "self-normalised": _of_method(
        "self-normalised", "percentile", (0.9, 0.97, 0.99),
        lambda knob, steps: {"percentile": knob, "first": 20, "longest": 200, "window": 200},
    ),
    "shrink-and-perturb": _of_method(
        "shrink-and-perturb", "keep", (0.2, 0.5, 0.8),
        lambda knob, steps: {"keep": knob, "noise": 1 - knob, "every": steps},
    ),
    "shrink-and-perturb-step": _of_method(
        "shrink-and-perturb-step", "1 - keep", (4e-3, 1.6e-2, 6.4e-2),
        lambda knob, steps: {"keep": 1 - knob, "noise": (1 - (1 - knob) ** 2).sqrt(), "every": 10},
    ),
    "l2-init": _of_method("l2-init", "strength", (1e-3, 1e-2, 1e-1), lambda knob, steps: {"strength": knob}),
    "l2-noise": _of_method(
        "l2-noise", "strength", (1e-4, 1e-3, 1e-2), lambda knob, steps: {"strength": knob, "noise": 1e-3, "every": 10}
    ),
    "weight-clipping": _of_method("weight-clipping", "kappa", (1.0, 2.0, 4.0), lambda knob, steps: {"kappa": knob}),
    "upgd": _of_method("upgd", "noise", (1e-4, 1e-3, 1e-2), lambda knob, steps: {"noise": knob}),
    "crelu": Arm(doc="CReLU, of half as many units", network=Network(activation="crelu")),
    "layer-norm": Arm(doc="layer norm before each activation function", network=Network(norm=True)),
    "smooth-leaky": Arm(doc="smooth-leaky units", network=Network(activation="smooth-leaky")),
    "grow": _edits("grow", "wakes the units that would be active most often, from a tenth of the units on"),
    "prune": _edits("prune-rewind", "takes out the units of the lowest mean weight, and puts the others back to their first weights"),
    "prune-stay": _edits("prune", "takes the same units out, and leaves the others as they are"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of an arm.

    Attributes:
        task, arm: names.
        seed: of its data.
        rate: learning rate.
        knob: value; 0 where the arm has none.
        edits: number of edits of an operator.
    """

    task: str
    arm: str
    seed: int
    rate: float
    knob: float
    edits: int = 10


def end_width(units: int, inputs: int, outputs: int) -> int:
    """Units of two hidden layers that leave the share ``END`` of the weights.

    >>> end_width(48, 64, 10)
    29
    """
    weights = np.array([inputs * u + u * u + u * outputs for u in range(units + 1)])
    return int(np.abs(weights - END * weights[-1]).argmin())


def widths(arm: Arm, units: int, end: int, edits: int) -> list[int]:
    """Units of a layer before the first edit and after each one.

    >>> widths(ARMS["grow"], 48, 28, 5), widths(ARMS["prune"], 48, 28, 5)
    ([5, 10, 14, 19, 23, 28], [48, 44, 40, 36, 32, 28])
    """
    begin = max(1, round(START * units)) if arm.operator == "grow" else units
    return [round(one) for one in np.linspace(begin, end, edits + 1)]
