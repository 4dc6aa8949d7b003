"""The tables of docs/faults.md, made of docs/results/faults.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.pages import span, table

LEGEND = (
    "policy",
    "recovered",
    "of perfect",
    "back, of perfect",
    "extra steps",
    "minus undisturbed",
    "minus no controller",
    "diverged",
)


def summary(found: Mapping[str, Any]) -> list[str]:
    """Every policy over all transient faults of all families."""
    return table(LEGEND, [[policy, *cells(row)] for policy, row in found["transient"]["all"].items()])


def cells(row: Mapping[str, Any]) -> list[str]:
    """One line of the summary."""
    return [
        *(span(row[name], ".2f") for name in ("recovered", "of_perfect", "back")),
        "never" if row["extra_steps"] is None else str(row["extra_steps"]),
        *(span(row[name]) for name in ("minus_undisturbed", "minus_bare")),
        str(row["diverged"]),
    ]


def by_kind(found: Mapping[str, Any], field: str, form: str, family: str = "all") -> list[str]:
    """One figure of every policy, by kind of fault."""
    kinds = list(found["kinds"][family])
    policies = found["kinds"][family][kinds[0]]
    rows = [
        [policy, *(f"{found['kinds'][family][kind][policy][field][0]:{form}}" for kind in kinds)] for policy in policies
    ]
    return table(("policy", *kinds), rows)


def by_family(found: Mapping[str, Any]) -> list[str]:
    """Of all transient faults, what share of the perfect rollback's recoveries each policy has in each family."""
    families = [one for one in found["transient"] if one != "all"]
    rows = [
        [policy, *(span(found["transient"][family][policy]["of_perfect"], ".2f") for family in families)]
        for policy in found["transient"]["all"]
    ]
    return table(("policy", *families), rows)


def calm(found: Mapping[str, Any]) -> list[str]:
    """What policies do to runs to which nothing happens."""
    families = list(found["calm"])
    rows = [
        [policy, *(f"{span(found['calm'][family][policy]['minus_bare'])}, {found['calm'][family][policy]['rollbacks']:.2f}"
                   for family in families)]
        for policy in found["calm"][families[0]]
    ]  # fmt: skip
    return table(("policy", *families), rows)


def lasting(found: Mapping[str, Any]) -> list[str]:
    """Every policy under shifts that last."""
    places = list(found["shifts"])
    head = tuple(f"{place}: minus {what}" for place in places for what in ("no controller", "fresh start"))
    rows = [
        [
            policy,
            *(
                span(found["shifts"][place][policy][field])
                for place in places
                for field in ("minus_bare", "minus_fresh")
            ),
        ]
        for policy in found["shifts"][places[0]]
    ]
    return table(("policy", *head), rows)


def sequences(found: Mapping[str, Any]) -> list[str]:
    """The safeguard on sequences of tasks: with it, and the difference to the same without."""
    rows = []
    for family, contestants in found["sequences"].items():
        for policy, row in contestants.items():
            differences = row.get("differences")
            for_scores = [
                f"{row[score][0]:.3f}" + (f" ({span(differences[score], '+.3f')})" if differences else "")
                for score in ("forgetting", "last_score", "phase_score")
            ]
            rows.append([f"`{family}`", policy, *for_scores])
    return table(("sequence", "policy", "forgetting", "all phases at the end", "each phase at its end"), rows)


TABLES = {
    "summary": summary,
    "share recovered": lambda found: by_kind(found, "recovered", ".2f"),
    "of perfect": lambda found: by_kind(found, "of_perfect", ".2f"),
    "back": lambda found: by_kind(found, "back", ".2f"),
    "minus undisturbed": lambda found: by_kind(found, "minus_undisturbed", "+.2f"),
    "families": by_family,
    "calm": calm,
    "lasting": lasting,
    "sequences": sequences,
}


NEEDS = dict.fromkeys(TABLES, "transient") | {"lasting": "shifts", "sequences": "sequences"}  # which study


def tables_of(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """The lines of every table whose study has been made, by name."""
    return {name: make(found) for name, make in TABLES.items() if NEEDS[name] in found}
