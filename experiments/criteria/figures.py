"""What the tables show of a task, from its raw figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from experiments.criteria import measure
from experiments.criteria.arms import FIELDS, FRESH, INHERITED, REWOUND, Arm, Plan
from experiments.criteria.dense import GLOBAL, RANDOM_DRAWS, Choice, compared

JUDGED = FIELDS[:3]


class Played:
    """Figures (S,) of arms."""

    def __init__(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self._rows = rows

    def of(
        self, choice: Choice, sparsity: float, field: str = "accuracy", start: str = INHERITED, full: bool = False
    ) -> np.ndarray:
        """A field of an arm."""
        return np.array(self._rows[Arm(choice, sparsity, start, full).key][field])

    def control(self, sparsity: float, field: str = "accuracy") -> np.ndarray:
        """Mean over the draws of ``random``."""
        draws = [self.of(Choice("random", draw=draw), sparsity, field) for draw in range(RANDOM_DRAWS)]
        values: np.ndarray = np.mean(draws, 0)
        return values


def figures(raw: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Means with intervals, differences to controls, and verdicts."""
    played = Played(raw["arms"])
    labels = {f"{share:g}": share for share in plan.sparsities}
    return {
        "layer": {label: _in_layers(played, share) for label, share in labels.items()},
        "scratch": {label: _scratch(played, share) for label, share in labels.items()},
        "global": {label: _over_layers(played, share) for label, share in labels.items()},
        "dense": {field: measure.interval(np.array(raw["arms"]["dense"][field])) for field in JUDGED},
    }


def _in_layers(played: Played, sparsity: float) -> dict[str, Any]:
    """Every criterion, by its share of each layer, against the mean of the draws of ``random``."""
    choices = {name: Choice(name) for name in (*compared(), "agf-100") if name != "random"}
    choices |= {f"{name} + repair": Choice(name, repaired=True) for name in ("obs", "random")}
    found: dict[str, Any] = {}
    for field in JUDGED:
        rows = {name: played.of(choice, sparsity, field) for name, choice in choices.items()}
        control = played.control(sparsity, field)
        spread = {name: round(float(one.std(ddof=1)), 4) for name, one in {"random": control, **rows}.items()}
        found[field] = {"random": measure.interval(control), "spread": spread, **measure.against(rows, control)}
    found["work"] = float(played.of(choices["agf"], sparsity, "work").mean())
    found["few against many"] = measure.interval(
        played.of(choices["agf"], sparsity) - played.of(choices["agf-100"], sparsity)
    )
    return found


def _scratch(played: Played, sparsity: float) -> dict[str, Any]:
    agf, random = Choice("agf"), Choice("random")
    inherited = played.of(agf, sparsity)
    rows = {
        "inherited, agf": inherited,
        "inherited, random": played.control(sparsity),
        "rewound, agf": played.of(agf, sparsity, start=REWOUND),
        "rewound, random": played.of(random, sparsity, start=REWOUND),
        "fresh": played.of(agf, sparsity, start=FRESH),
        "fresh, long": played.of(agf, sparsity, start=FRESH, full=True),
    }
    return {
        name: {"value": measure.interval(values), "agf_minus": measure.interval(inherited - values)}
        for name, values in rows.items()
    }


def _over_layers(played: Played, sparsity: float) -> dict[str, Any]:
    """Criteria whose scores compare over all layers, and each minus its shares of each layer."""
    found = {}
    for name, scope in GLOBAL:
        own = Choice(name, scope)
        layer = played.of(Choice(name), sparsity)
        fields = ("work", "accuracy before", "accuracy")
        found[f"{name} {scope}"] = {
            **{field: measure.interval(played.of(own, sparsity, field)) for field in fields},
            "minus_layer": measure.interval(played.of(own, sparsity) - layer),
        }
    return found
