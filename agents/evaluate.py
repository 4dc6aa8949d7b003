"""Judging a policy: whole inner runs on given instances, and what became of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trimtab.agents.conditions import Conditions, LearningRates, is_adaptive
from trimtab.agents.diagnostics import diagnostics_of
from trimtab.agents.evaluation import Evaluation
from trimtab.agents.trial import Trial
from trimtab.envs.episode import Episodes
from trimtab.envs.populations import Populations
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.errors import MismatchError, check_whole
from trimtab.inner_training.device import check_device
from trimtab.inner_training.edits import nudged
from trimtab.inner_training.energy import open_meter
from trimtab.inner_training.levers import LEVERS, resolve_levers
from trimtab.inner_training.signals import all_signals, lever_signals
from trimtab.inner_training.stepping import Mode
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import resolve_family
from trimtab.policies.policy import Policy
from trimtab.policies.registry import check_protocol, load_policy
from trimtab.policies.rules import RULES


class Evaluator:
    """The instances of one (scenario, runs, seed), and the populations that play them, for any number of policies.

    Run ``i`` belongs to a family by the scenario's shares, and its instance is drawn from a seed derived from
    ``(seed, i)``. Nothing of it depends on a policy.

    Args:
        scenario: what is run.
        runs: instances, >= 1.
        seed: of the draw, >= 0.
        device, mode: as for ``Population``.
        batch_of_runs: slots of a population, >= 1. Runs take turns in them, so that slots hardly ever idle; half as many
            slots as runs, or fewer, is best.

    Attributes:
        tick: called with the number of runs that have just ended, for whoever shows progress.

    Raises:
        RangeError: a number out of its range.
    """

    def __init__(
        self,
        scenario: Scenario,
        *,
        runs: int,
        seed: int = 0,
        device: str = "cpu",
        mode: Mode = "auto",
        batch_of_runs: int = 32,
    ) -> None:
        for name, value, low in (("runs", runs, 1), ("seed", seed, 0), ("batch_of_runs", batch_of_runs, 1)):
            check_whole(name, value, low)
        self.scenario, self.runs, self.seed = scenario, runs, seed
        check_device(device)
        self._device, self._mode, self._slots = device, mode, batch_of_runs
        self.tick: Callable[[int], object] = lambda ended: None
        self._families = [resolve_family(share.name) for share in scenario.families]
        shares = np.array([share.share for share in scenario.families])
        # Run i sits at (i + 1/2) / runs on the line of shares, so that each family gets its share of the runs.
        middles = (np.arange(runs) + 0.5) / runs
        self._family_of = np.searchsorted(np.cumsum(shares / shares.sum())[:-1], middles, side="right")
        self._drawn: dict[bool, list[Instance]] = {}
        self._blocks: dict[int, Populations] = {}

    def instances(self, *, held_out: bool = True) -> list[Instance]:
        """The instance of each run, in order; drawn once."""
        if held_out not in self._drawn:
            seeds = [
                int(np.random.SeedSequence([self.seed, run]).generate_state(1)[0] >> 1) for run in range(self.runs)
            ]
            self._drawn[held_out] = [
                self._families[family].draw(seed, held_out=held_out)
                for family, seed in zip(self._family_of, seeds, strict=True)
            ]
        return self._drawn[held_out]

    def adaptive(self, *, held_out: bool = True) -> np.ndarray:
        """(runs,) bool: runs with another rule than SGD (see ``conditions.is_adaptive``)."""
        return np.array([is_adaptive(instance) for instance in self.instances(held_out=held_out)])

    def play(self, policy: Policy, conditions: Conditions | None = None) -> Evaluation:
        """Plays every run under a policy.

        Raises:
            MismatchError: the policy's signals or levers do not fit the scenario.
        """
        conditions = conditions or Conditions()
        return self.play_grid(policy, conditions, [conditions.learning_rates])[0]

    def play_grid(self, policy: Policy, conditions: Conditions, grid: Sequence[LearningRates]) -> list[Evaluation]:
        """Plays every run once for each choice of learning rates, all in one queue.

        Args:
            policy: who steers.
            conditions: but for the learning rates.
            grid: choices of learning rates, as in ``Conditions``.

        Returns:
            One evaluation for each choice; the wall time is shared out by inner steps.
        """
        check_fits(policy, self.scenario)
        drawn = self.instances(held_out=conditions.held_out)
        instances = [one for rates in grid for one in replace(conditions, learning_rates=rates).apply(drawn)]
        scenario = conditions.shown(self.scenario, policy.signals)
        parts: list[tuple[np.ndarray, Trial]] = []
        blocks = {index: self._block(index) for index in np.unique(self._family_of).tolist()}
        meter = open_meter(self._device)  # after the compiler, whose work is on nobody's bill
        before = meter.joules() if meter else np.nan
        for index, populations in blocks.items():
            places = np.flatnonzero(np.tile(self._family_of == index, len(grid)))
            chosen = [instances[place] for place in places]
            noted = diagnostics_of(chosen)
            episodes = Episodes(scenario, populations.num_runs, populations=populations, diagnostics=noted)
            trial = Trial(episodes, chosen, policy, self.tick)
            trial.play()
            parts.append((places, trial))
        return self._collect(policy, instances, parts, meter.joules() - before if meter else None)

    def _block(self, index: int) -> Populations:
        if index not in self._blocks:
            levers, structure = resolve_levers(nudged(self.scenario.levers)), self.scenario.structure
            clip = any(lever.hyperparameter == "grad_clip" for lever in levers)
            slots = min(self._slots, int((self._family_of == index).sum()))
            share = self.scenario.families[index]
            scored = self._families[index].max_phases > 1
            faults = self.scenario.disturbance_settings
            made = Populations(
                [share],
                slots,
                clip=clip,
                score=scored,
                disturbances=faults,
                structure=None if structure is None else structure.config(),
                device=self._device,
                mode=self._mode,
            )
            made.advance(1, self.scenario.val_examples)  # what is slow the first time is on nobody's clock
            self._blocks[index] = made
        return self._blocks[index]

    def _collect(
        self,
        policy: Policy,
        instances: Sequence[Instance],
        parts: Sequence[tuple[np.ndarray, Trial]],
        joules: float | None,
    ) -> list[Evaluation]:
        order = np.argsort(np.concatenate([places for places, _ in parts]))
        width = max(trial.curve.shape[1] for _, trial in parts)
        columns = {}
        for name in ("final_loss", "best_loss", "diverged", "lost_early", "late", "curve", "inner_steps", "rollbacks"):
            values = [getattr(trial, name) for _, trial in parts]
            if name == "curve":
                values = [np.pad(curve, ((0, 0), (0, width - curve.shape[1])), mode="edge") for curve in values]
            columns[name] = np.concatenate(values)[order]
        lengths = [len(places) for places, _ in parts]
        measures = _joined([trial.measures() for _, trial in parts], lengths, order)
        disturbed = _joined([trial.disturbed for _, trial in parts], lengths, order)
        if joules is not None:
            measures["joules"] = joules * columns["inner_steps"] / columns["inner_steps"].sum()
        columns["learning_rates"] = np.array([instance.optimizer.lr for instance in instances])
        columns["budgets"] = np.array([instance.steps for instance in instances])
        seconds = sum(trial.seconds for _, trial in parts)
        found = []
        for start in range(0, len(instances), self.runs):
            chosen = slice(start, start + self.runs)
            share = columns["inner_steps"][chosen].sum() / columns["inner_steps"].sum()
            found.append(
                Evaluation(
                    policy=policy.name,
                    scenario=self.scenario.id,
                    seed=self.seed,
                    interval=self.scenario.interval,
                    keys=tuple(instance.key for instance in instances[chosen]),
                    families=tuple(self._families[index].name for index in self._family_of),
                    wall_seconds=float(seconds * share),
                    measures={name: values[chosen] for name, values in measures.items()},
                    disturbed={kind: steps[chosen] for kind, steps in disturbed.items()},
                    **{name: values[chosen] for name, values in columns.items()},
                )
            )
        return found


def _joined(
    parts: Sequence[Mapping[str, np.ndarray]], lengths: Sequence[int], order: np.ndarray
) -> dict[str, np.ndarray]:
    """Arrays by name, one part after another and then in ``order``; NaN for a part without that name."""
    names = dict.fromkeys(name for part in parts for name in part)
    whole = {
        name: [part.get(name, np.full(length, np.nan)) for part, length in zip(parts, lengths, strict=True)]
        for name in names
    }
    return {name: np.concatenate(values)[order] for name, values in whole.items()}


def check_fits(policy: Policy, scenario: Scenario) -> None:
    """Verifies that a scenario has what a policy reads and moves.

    Raises:
        MismatchError: names the levers, or the signals, that the scenario lacks.
    """
    lacking = [name for name, kind in policy.levers.items() if kind != "events" and name not in scenario.levers]
    if lacking:
        raise MismatchError(
            f"policy {policy.name!r} moves {', '.join(lacking)}, but scenario {scenario.id!r} has only the levers "
            f"{', '.join(scenario.levers)}; choose a scenario with the policy's levers"
        )
    foreign = {s.name for name, lever in LEVERS.items() if name not in scenario.levers for s in lever_signals(lever)}
    known = set(all_signals()) - foreign
    lacking = [name for name in policy.signals if name not in known]
    if lacking:
        raise MismatchError(
            f"policy {policy.name!r} reads {', '.join(lacking)}, which scenario {scenario.id!r} with the levers "
            f"{', '.join(scenario.levers)} does not have; choose a scenario with the policy's signals"
        )


def fitting_policy(name: str | Path, scenario: Scenario) -> Policy:
    """Loads a policy for a scenario; a rule that adapts, such as ``random``, gets the scenario's levers."""
    entry = RULES.get(name) if isinstance(name, str) else None
    return load_policy(name, levers=scenario.levers) if entry is not None and entry.adapts else load_policy(name)


def evaluate(
    policy: Policy | str | Path,
    scenario: Scenario | str | Path,
    *,
    runs: int,
    seed: int = 0,
    device: str = "cpu",
    mode: Mode = "auto",
    conditions: Conditions | None = None,
    batch_of_runs: int = 32,
) -> Evaluation:
    """Plays a policy on instances that no policy has trained on.

    The same ``(scenario, runs, seed)`` gives every policy the same instances, run by run. To judge several policies
    make one ``Evaluator``, which draws and compiles only once.

    Args:
        policy: a policy, or what ``load_policy`` takes.
        scenario: a scenario, an id, or the path of a YAML file.
        runs: instances, >= 1.
        seed: of the draw, >= 0.
        device, mode: as for ``Population``.
        conditions: None is held-out instances as they are, with the scenario's guard and nothing hidden.
        batch_of_runs: slots of a population, see ``Evaluator``.

    Raises:
        UserError: an unknown name, a number out of range, or a policy that does not fit.
    """
    where = load_scenario(scenario)
    what = fitting_policy(policy, where) if isinstance(policy, str | Path) else check_protocol(policy, "the policy")
    check_fits(what, where)
    evaluator = Evaluator(where, runs=runs, seed=seed, device=device, mode=mode, batch_of_runs=batch_of_runs)
    return evaluator.play(what, conditions)
