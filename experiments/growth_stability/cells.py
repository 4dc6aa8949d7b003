"""The cells of the study: what is done to the units of a run, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

COMPACTNESS = (20, 30, 40, 50)  # per cent of the weights of the dense head
BEGIN = 0.1  # share of each layer's units that a grown network begins with
CYCLES = 5
FACTOR = 5.0  # of Two-Speed, as in the paper
FAST = 1 / 8  # of a cycle, for which newborns go faster: the paper's 1955 steps of 40 epochs of 391
SCALE = 3.0  # insertion scale: factor on the columns of newborns


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to treat a network.

    Attributes:
        arm: ``dense``, ``grow`` or ``prune``.
        variant: what is unlike the plain arm; empty for the plain one.
        percent: compactness, of the weights of the dense head; 100 is dense.
        cycles: parts of the budget; an edit comes before each but the first.
        method: growth method.
        newborn_state: of the optimizer, for newborns.
        scale: factor on their columns.
        speed: of their steps, see Two-Speed.
        rewinds: whether all surviving weights go back to their initial values at each edit.
        anew: whether the learning rate's cosine begins anew in each cycle; else there is one over all of them.
    """

    arm: str
    variant: str = ""
    percent: int = 100
    cycles: int = CYCLES
    method: str = "activation-frequency"
    newborn_state: str = "zero"
    scale: float = 1.0
    speed: float = 1.0
    rewinds: bool = False
    anew: bool = False

    @property
    def treatment(self) -> str:
        """Arm and variant."""
        return f"{self.arm}, {self.variant}" if self.variant else self.arm

    @property
    def rated(self) -> str:
        """The treatment whose learning rate it has: its own where rewinding or the schedule differ, else that of its arm."""
        return self.treatment if self.variant in OWN_RATES else self.arm

    @property
    def name(self) -> str:
        """Treatment and compactness."""
        return self.treatment if self.arm == "dense" else f"{self.treatment}, {self.percent} %"


DENSE = Cell(arm="dense")
GROW = Cell(arm="grow")
PRUNE = Cell(arm="prune", rewinds=True)
REMAIN = replace(PRUNE, variant="no rewind", rewinds=False)
RESTART = replace(GROW, variant="rewound", rewinds=True)
ANEW = "rate anew each cycle"
OWN_RATES = ("no rewind", "rewound", ANEW)


def at(percents: tuple[int, ...], *cells: Cell) -> list[Cell]:
    """Each cell at each compactness."""
    return [replace(cell, percent=percent) for cell in cells for percent in percents]


MAIN = [DENSE, *at(COMPACTNESS, GROW, PRUNE, REMAIN)]
CONTROLS = [
    *at((50,), RESTART, replace(GROW, variant=ANEW, anew=True)),
    *at((20, 50), replace(PRUNE, variant=ANEW, anew=True)),
]
INTERVENTIONS = at(
    (50,),
    replace(GROW, variant="chosen at random", method="random-parked"),
    replace(GROW, variant="chosen by gradient", method="gradient"),
    replace(GROW, variant="Two-Speed", speed=FACTOR),
    replace(GROW, variant="Moment Transplant", newborn_state="transplant"),
    replace(GROW, variant=f"columns x {SCALE:g}", scale=SCALE),
    replace(GROW, variant="Net2Wider", method="net2wider"),
    replace(GROW, variant="pairs", method="pairing"),
)
EVENTS = at((50,), *(replace(GROW, variant=f"{cycles} cycles", cycles=cycles) for cycles in (10, 20)))
OTHER = [DENSE, *at((20, 50), GROW, PRUNE, REMAIN)]  # of the perceptron
SMOOTH = [DENSE, *at((50,), GROW, PRUNE, REMAIN)]  # of smooth-leaky units


def units_at(percent: float, inputs: int, units: int, outputs: int) -> int:
    """Units of each of two hidden layers that leave a share of the head's weights, to the nearest unit.

    >>> [units_at(percent, 256, 96, 16) for percent in (20, 50, 100)]
    [24, 54, 96]
    """
    wanted = percent / 100 * (inputs * units + units * units + units * outputs)
    middle = (inputs + outputs) / 2
    return round(math.sqrt(middle * middle + wanted) - middle)


def plan(cell: Cell, inputs: int, units: int, outputs: int) -> list[int]:
    """Active units of each layer in each cycle: as many more, or fewer, at each edit.

    >>> plan(replace(GROW, percent=50), 256, 96, 16), plan(replace(PRUNE, percent=50), 256, 96, 16)
    ([10, 21, 32, 43, 54], [96, 86, 75, 65, 54])
    """
    last = units_at(cell.percent, inputs, units, outputs)
    first = round(BEGIN * units) if cell.arm == "grow" else units
    return [first + math.trunc((last - first) * cycle / (cell.cycles - 1)) for cycle in range(cell.cycles)]
