"""Playing cases under policies, all in one queue, with the environments' own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
from experiments.faults.cases import RATES, Case

from trimtab.agents.conditions import is_adaptive
from trimtab.agents.diagnostics import diagnostics_of
from trimtab.agents.evaluate import fitting_policy
from trimtab.agents.trial import Trial
from trimtab.envs.episode import Episodes
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import DEFAULT_LEVERS, load_scenario
from trimtab.inner_training.disturbances import DISTURBANCES, Event
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance, TaskFamily
from trimtab.policies.policy import Policy
from trimtab.policies.registry import load_policy

INTERVAL, VAL_EXAMPLES, SLOTS = 10, 128, 100
NONE = "no controller"
Plans = Sequence[tuple[Event, ...]]


@dataclass(frozen=True, kw_only=True)
class Played:
    """What became of runs; ln bounded losses.

    Attributes:
        first: (R,) validation loss before the first step.
        curve: (R, T) validation loss after each interval.
        final: (R,) test loss at the end.
        diverged: (R,) bool.
        rollbacks: (R,) of the guard, those that a rule asked for included.
        scores: further figures (R,) by name, of tasks that change.
    """

    first: np.ndarray
    curve: np.ndarray
    final: np.ndarray
    diverged: np.ndarray
    rollbacks: np.ndarray
    scores: Mapping[str, np.ndarray]

    def part(self, runs: slice) -> Played:
        """Some of the runs."""
        scores = {name: values[runs] for name, values in self.scores.items()}
        held = {name: getattr(self, name)[runs] for name in ("first", "curve", "final", "diverged", "rollbacks")}
        return Played(**held, scores=scores)


class _Planned(Episodes):
    """Episodes whose runs meet the events that their instances' traits hold."""

    def reset(self, mask: np.ndarray, seeds: np.ndarray, instances: Mapping[int, Instance] | None = None) -> np.ndarray:
        observations = super().reset(mask, seeds, instances)
        assert instances is not None
        member = self.populations.members[0]
        assert isinstance(member, Population) and member.disturber is not None
        member.disturber.plan(list(instances), [one.traits["plan"] for one in instances.values()])
        for slot, instance in instances.items():
            self.first[instance.traits["place"]] = self.log_val_loss[slot]
        return observations

    first: np.ndarray


class Arena:
    """The runs of one family, for any number of policies; compiled once, when the first is played.

    Args:
        family: what is learned.
        slots: runs side by side.
    """

    def __init__(self, family: TaskFamily, slots: int = SLOTS) -> None:
        self.family, self._slots = family, slots
        self.scenario = load_scenario(family.name).replace(
            levers=list(DEFAULT_LEVERS),
            interval=INTERVAL,
            val_examples=VAL_EXAMPLES,
            missing={"progress": 0.0, "validation": 0.0, "validation_every_max": 1, "measurements": 0.0},
            disturbances=[{"kind": kind, "at": 1} for kind in DISTURBANCES],  # each run has its own plan
        )

    @cached_property
    def _populations(self) -> Populations:
        faults, scored = self.scenario.disturbance_settings, self.family.max_phases > 1
        population = Population(self.family, self._slots, clip=True, score=scored, disturbances=faults)
        return Populations.of([population])

    def policy(self, name: str) -> Policy:
        """A policy by name, for the levers that there are."""
        if name == NONE:
            return load_policy("constant")
        return fitting_policy(name, self.scenario)

    def play(
        self, instances: Sequence[Instance], plans: Plans, policy: Policy, guard: GuardConfig | None = None
    ) -> Played:
        """Plays ``instances[i]`` through ``plans[i]``.

        Args:
            instances: at least one.
            plans: what befalls each.
            policy: who steers.
            guard: None is the usual one.
        """
        chosen = GuardConfig() if guard is None else guard
        scenario = self.scenario.replace(signals=list(policy.signals) or ["started"], guard=asdict(chosen))
        noted = diagnostics_of(instances)
        episodes = _Planned(scenario, self._slots, populations=self._populations, diagnostics=noted)
        episodes.first = np.full(len(instances), np.nan)
        marked = [
            replace(instance, traits={**instance.traits, "plan": plan, "place": place})
            for place, (instance, plan) in enumerate(zip(instances, plans, strict=True))
        ]
        trial = Trial(episodes, marked, policy, best=False)
        trial.play()
        return Played(
            first=episodes.first,
            curve=trial.curve,
            final=trial.final_loss,
            diverged=trial.diverged,
            rollbacks=trial.rollbacks,
            scores=trial.measures(),
        )

    def contest(self, name: str, cases: Sequence[Case]) -> Played:
        """Plays cases under a policy by name and the guard; without both for ``NONE``."""
        guard = GuardConfig.bare() if name == NONE else None
        return self.play([one.instance for one in cases], [one.events for one in cases], self.policy(name), guard)

    def bare(self, cases: Sequence[Case], plans: Plans) -> Played:
        """Plays cases through other events, without controller and guard."""
        return self.play([one.instance for one in cases], plans, load_policy("constant"), GuardConfig.bare())

    def tuned(self, instances: Sequence[Instance]) -> dict[str, float]:
        """The best rate of the grid for SGD and for the other rules: lowest mean final validation loss."""
        kinds = [("sgd", "adaptive")[is_adaptive(one)] for one in instances]
        grid = [at_rates([one], {kind: float(rate)})[0]
                for one, kind in zip(instances, kinds, strict=True) for rate in RATES[kind]]  # fmt: skip
        played = self.play(grid, [()] * len(grid), load_policy("constant"), GuardConfig.bare())
        losses = played.curve[:, -1].reshape(len(instances), -1)
        chosen = {}
        for kind, rates in RATES.items():
            own = losses[[one == kind for one in kinds]]
            chosen[kind] = float(rates[own.mean(0).argmin()] if len(own) else rates[len(rates) // 2])
        return chosen


def at_rates(instances: Sequence[Instance], rates: Mapping[str, float]) -> list[Instance]:
    """The instances at a rate for each kind of optimizer."""
    return [
        replace(one, optimizer=replace(one.optimizer, lr=rates[("sgd", "adaptive")[is_adaptive(one)]]))
        for one in instances
    ]
