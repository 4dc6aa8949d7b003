"""The three studies: transient faults, lasting shifts, and what is forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from experiments.faults import measure
from experiments.faults.cases import HARMLESS, LASTING, Case, faulty, seeds, shortened, small_batches
from experiments.faults.measure import Outcome, References
from experiments.faults.play import NONE, SLOTS, Arena, Played, at_rates

from trimtab.inner_training.disturbances import DISTURBANCES, Event
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import make_family
from trimtab.policies.registry import load_policy
from trimtab.policies.rules.composite import compose
from trimtab.policies.rules.composites import COMPOSITES

GUARD = "constant"  # the policy that does nothing, so what is left is the guard
POLICIES = (GUARD, *COMPOSITES, "opt-restart", "moment-reset", "default")
FAMILIES = ("digits-mlp", "graph", "sprites-conv")
SHIFTING = "shifted-digits"
SEQUENCES = ("permuted-digits", "class-incremental-digits", "alternating-classes")
PERFECT, FRESH = "perfect rollback", "fresh start"
TRANSIENT = tuple(kind for kind in DISTURBANCES if kind not in (LASTING, *HARMLESS))
FEW = 20  # runs side by side, at least
TUNED_ON = 24  # instances of training
SCORES = ("forgetting", "last_score", "phase_score")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is played.

    Attributes:
        runs: instances of each family, each with one fault of each kind.
        seed: of instances and faults.
        held_out: instances that no policy and no threshold was made on.
        policies: who competes.
        keep: a folder for what has been played already; None keeps nothing.
    """

    runs: int
    seed: int
    held_out: bool
    policies: tuple[str, ...] = POLICIES
    keep: Path | None = None

    @property
    def slots(self) -> int:
        """Runs side by side: a hundred, or of a quick look as few as need no compiler."""
        return min(SLOTS, max(self.runs, FEW))

    def rates(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The learning rates that were found before under this name, or are found now."""
        path = None if self.keep is None else self.keep / f"{name}-rates.json"
        if path is not None and path.exists():
            stored: dict[str, float] = json.loads(path.read_text())
            return stored
        found = make()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return found

    def played(self, name: str, make: Callable[[], Played]) -> Played:
        """What was played before under this name, or is played now."""
        if self.keep is None:
            return make()
        path = self.keep / f"{name.replace(' ', '-')}.npz"
        if not path.exists():
            found = make()
            held = {field.name: getattr(found, field.name) for field in fields(found) if field.name != "scores"}
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **held, **{f"score/{one}": values for one, values in found.scores.items()})
        with np.load(path) as stored:
            scores = {key[6:]: stored[key] for key in stored if key.startswith("score/")}
            return Played(**{key: stored[key] for key in stored if not key.startswith("score/")}, scores=scores)


def drawn(arena: Arena, setting: Setting, *, budget: bool) -> tuple[list[Instance], dict[str, float]]:
    """Instances at the rates that are best for instances of training, and those rates."""
    family = arena.family

    def draw(count: int, seed: int, held_out: bool) -> list[Instance]:
        found = [family.draw(one, held_out=held_out) for one in seeds(count, seed)]
        return [shortened(one, family) for one in found] if budget else found

    tuned_on = min(TUNED_ON, setting.runs)
    rates = setting.rates(family.name, lambda: arena.tuned(draw(tuned_on, 1_000_003, False)))
    return at_rates(draw(setting.runs, setting.seed, setting.held_out), rates), rates


@dataclass(frozen=True)
class Faults:
    """Outcomes of one family.

    Attributes:
        outcomes: by policy and kind.
        calm: by policy, (R,) final loss minus that without controller, where nothing happens.
        calm_rollbacks: by policy, (R,).
        above: by policy and kind, mean ln validation loss above the undisturbed run at each decision from the end of the
            fault on.
    """

    outcomes: dict[str, dict[str, Outcome]]
    calm: dict[str, np.ndarray]
    calm_rollbacks: dict[str, np.ndarray]
    above: dict[str, dict[str, np.ndarray]]


def faults(name: str, setting: Setting) -> tuple[Faults, dict[str, Any]]:
    """Every kind of fault on one family, under every policy."""
    arena = Arena(small_batches(name), setting.slots)
    instances, rates = drawn(arena, setting, budget=True)
    cases = [Case(instance) for instance in instances]
    blocks: dict[str, list[Case]] = {
        "": cases,
        **{kind: faulty(instances, kind, setting.seed) for kind in DISTURBANCES},
    }
    everything = [case for block in blocks.values() for case in block]
    place = {kind: slice(at * setting.runs, (at + 1) * setting.runs) for at, kind in enumerate(blocks)}
    bare = setting.played(f"{name}-none", lambda: arena.contest(NONE, everything))
    perfect = setting.played(f"{name}-perfect", lambda: arena.bare(everything, [one.undone for one in everything]))
    calm = bare.part(place[""])
    references = {kind: References(calm, bare.part(place[kind]), perfect.part(place[kind])) for kind in DISTURBANCES}
    found = Faults({}, {}, {}, {})
    for policy in (NONE, PERFECT, *setting.policies):
        given = {NONE: bare, PERFECT: perfect}
        all_runs = given[policy] if policy in given else _contest(arena, name, policy, everything, setting)
        own = all_runs.part(place[""])
        found.outcomes[policy] = {
            kind: measure.outcome(blocks[kind], all_runs.part(place[kind]), own, references[kind])
            for kind in DISTURBANCES
        }
        found.above[policy] = {
            kind: measure.above(blocks[kind], all_runs.part(place[kind]), own, calm) for kind in DISTURBANCES
        }
        found.calm[policy], found.calm_rollbacks[policy] = own.final - calm.final, own.rollbacks
    return found, {"rates": rates, "undisturbed": round(float(calm.final.mean()), 3)}


def _contest(arena: Arena, name: str, policy: str, cases: Sequence[Case], setting: Setting) -> Played:
    return setting.played(f"{name}-{policy}", lambda: arena.contest(policy, cases))


def shifts(name: str, setting: Setting) -> dict[str, Any]:
    """A shift that lasts: inputs that are shifted to the end of the budget, or the second phase of ``SHIFTING``."""
    phased = name == SHIFTING
    arena = Arena(make_family(name) if phased else small_batches(name), setting.slots)
    instances, _ = drawn(arena, setting, budget=not phased)
    if phased:
        begins = [Event("slow-steps", one.all_phases[1].first_step, 1, 1.0) for one in instances]  # marks the place
        cases = [Case(instance, begin) for instance, begin in zip(instances, begins, strict=True)]
    else:
        cases = faulty(instances, LASTING, setting.seed, to_the_end=True)
    label = f"shift-{name}"
    bare = setting.played(f"{label}-none", lambda: arena.contest(NONE, cases))
    fresh = setting.played(f"{label}-fresh", lambda: arena.bare(cases, [one.fresh_start for one in cases]))
    rows = {}
    for policy in (NONE, FRESH, *setting.policies):
        given = {NONE: bare, FRESH: fresh}
        played = given[policy] if policy in given else _contest(arena, label, policy, cases, setting)
        rows[policy] = {
            "final": measure.compared(played.final, np.zeros_like(played.final), setting.seed),
            "minus_bare": measure.compared(played.final, bare.final, setting.seed),
            "minus_fresh": measure.compared(played.final, fresh.final, setting.seed),
            "diverged": int(played.diverged.sum()),
            "rollbacks": round(float(played.rollbacks.mean()), 2),
        }
    return rows


def forgetting(name: str, setting: Setting) -> dict[str, Any]:
    """A sequence of tasks with and without the anchor, alone and in the composite that has it."""
    arena = Arena(make_family(name), setting.slots)
    instances, _ = drawn(arena, setting, budget=False)
    calm = [Case(instance) for instance in instances]
    levers = arena.scenario.levers
    blocks = [one for one in COMPOSITES["shifting"][0] if one != "anchor"]
    contestants: Mapping[str, tuple[Any, str]] = {
        GUARD: (load_policy(GUARD), ""),
        "anchor": (load_policy("anchor"), GUARD),
        "shifting without anchor": (compose("shifting-without-anchor", blocks, levers=levers), ""),
        "shifting": (load_policy("shifting", levers=levers), "shifting without anchor"),
    }
    rows: dict[str, Any] = {}
    played: dict[str, Played] = {}
    for label, (policy, against) in contestants.items():
        played[label] = setting.played(
            f"sequence-{name}-{label}", lambda policy=policy: arena.play(instances, [()] * len(calm), policy)
        )
        scores = played[label].scores
        rows[label] = {one: measure.compared(scores[one], np.zeros(len(calm)), setting.seed) for one in SCORES}
        if against:
            differences = {
                one: measure.compared(scores[one], played[against].scores[one], setting.seed) for one in SCORES
            }
            rows[label] |= {"against": against, "differences": differences}
    return rows
