"""Who competes: policies as they are, rules with a tuned learning rate, and the oracle that tunes on each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from trimtab.agents.conditions import Conditions
from trimtab.agents.evaluate import Evaluator, check_fits, fitting_policy
from trimtab.agents.evaluation import Evaluation
from trimtab.agents.results import Entry
from trimtab.envs.scenario import Scenario
from trimtab.errors import UserError
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.policy import Policy
from trimtab.policies.registry import DEFAULT

Setting = Literal["untuned", "tuned", "oracle"]

# The grids cover the range that initial learning rates are drawn from, half a decade apart.
GRID: Mapping[str, np.ndarray] = {"sgd": np.geomspace(1e-4, 1.0, 9), "adaptive": np.geomspace(1e-5, 1e-1, 9)}
POINTS = len(GRID["sgd"])
TUNED_RULES = ("constant", "cosine")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One row of the table.

    Attributes:
        label: ``NAME``, ``NAME@tuned`` or ``NAME@oracle``.
        source: what ``load_policy`` takes.
        policy: the policy itself.
        setting: where its initial learning rates come from. ``"untuned"``: the instance's own random one;
            ``"tuned"``: one for the SGD kinds and one for the Adam kinds, chosen on training instances;
            ``"oracle"``: the best of the grid for each instance by its final validation loss.
    """

    label: str
    source: str
    policy: Policy
    setting: Setting

    @property
    def learned(self) -> bool:
        """Whether the policy is an exported network."""
        return isinstance(self.policy, LearnedPolicy)

    @property
    def provenance(self) -> dict[str, Any]:
        """How a learned policy was trained; empty for others."""
        return dict(self.policy.provenance) if isinstance(self.policy, LearnedPolicy) else {}


def make_contestants(names: Sequence[str], scenario: Scenario, *, tuned: bool = False) -> tuple[Contestant, ...]:
    """Loads what competes on a scenario.

    Args:
        names: what ``load_policy`` takes, each optionally followed by ``@tuned`` or ``@oracle``.
        scenario: all must fit it.
        tuned: add constant and cosine, tuned and by the oracle.

    Returns:
        Contestants in order, without repetitions. Policies that share a name are labelled by what was given instead, and
        so is the one that comes with trimtab.

    Raises:
        UserError: an unknown name, a damaged bundle, a policy that does not fit, or nothing to compare.
    """
    wanted = [*names, *(f"{rule}@{setting}" for rule in TUNED_RULES for setting in ("tuned", "oracle") if tuned)]
    if not wanted:
        raise UserError("no policy is given; name a rule, a bundle's folder, or module:object")
    given = [_split(name) for name in dict.fromkeys(wanted)]
    policies = {source: fitting_policy(source, scenario) for source, _ in given}
    names_of = [policy.name for policy in policies.values()]
    found = []
    for source, setting in given:
        policy = policies[source]
        check_fits(policy, scenario)
        called = source if source == DEFAULT or names_of.count(policy.name) > 1 else policy.name
        label = called if setting == "untuned" else f"{called}@{setting}"
        found.append(Contestant(label=label, source=source, policy=policy, setting=setting))
    return tuple(found)


def _split(name: str) -> tuple[str, Setting]:
    """``NAME@tuned`` as a name and a setting; an ``@`` that is followed by anything else belongs to the name."""
    source, _, setting = name.rpartition("@")
    if source and setting == "tuned":
        return source, "tuned"
    if source and setting == "oracle":
        return source, "oracle"
    return name, "untuned"


def count_evaluations(contestants: Sequence[Contestant]) -> int:
    """How often a ``Competition`` of these plays every run; tuned and oracle share the grid on held-out instances."""
    untuned = sum(one.setting == "untuned" for one in contestants)
    on_grid = {one.source for one in contestants if one.setting != "untuned"}
    chosen = {one.source for one in contestants if one.setting == "tuned"}
    return untuned + POINTS * (len(on_grid) + len(chosen))


class Competition:
    """Plays contestants on the same instances of one scenario; grids that two of them need are played once.

    Args:
        evaluator: the instances.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self._grids: dict[tuple[str, bool], list[Evaluation]] = {}

    def play(self, contestant: Contestant) -> Entry:
        """Evaluates one contestant on the held-out instances, tuning it first where it is to be tuned."""
        if contestant.setting == "untuned":
            return _entry(contestant, self.evaluator.play(contestant.policy), {})
        grid = self._grid(contestant, held_out=True)
        if contestant.setting == "oracle":
            # The run of the grid that ends best on its own validation set; all nine are paid for.
            choice = np.stack([one.final_validation_loss for one in grid]).argmin(0)
            seconds = sum(one.wall_seconds for one in grid)
            return _entry(contestant, _picked(grid, choice, seconds), _tuning(len(choice) * POINTS))
        best, means = self._tune(contestant)
        choice = np.where(self.evaluator.adaptive(held_out=True), best["adaptive"], best["sgd"])
        seconds = float(np.mean([one.wall_seconds for one in grid]))
        tuning = _tuning(len(choice) * POINTS) | {
            "chosen": {kind: float(GRID[kind][point]) for kind, point in best.items()},
            "mean_validation_loss": means,
        }
        return _entry(contestant, _picked(grid, choice, seconds), tuning)

    def _grid(self, contestant: Contestant, *, held_out: bool) -> list[Evaluation]:
        key = (contestant.source, held_out)
        if key not in self._grids:
            points = [{kind: float(rates[point]) for kind, rates in GRID.items()} for point in range(POINTS)]
            conditions = Conditions(held_out=held_out, base_schedule="constant")
            self._grids[key] = self.evaluator.play_grid(contestant.policy, conditions, points)
        return self._grids[key]

    def _tune(self, contestant: Contestant) -> tuple[dict[str, int], dict[str, list[float]]]:
        """Grid point with the lowest mean final validation loss on training instances, for each kind of optimizer."""
        scores = np.stack([one.final_validation_loss for one in self._grid(contestant, held_out=False)])
        adaptive = self.evaluator.adaptive(held_out=False)
        best, means = {}, {}
        for kind, members in (("sgd", ~adaptive), ("adaptive", adaptive)):
            # A kind that the draw left out has no evidence of its own; all runs together decide.
            mean = scores[:, members if members.any() else slice(None)].mean(1)
            best[kind], means[kind] = int(mean.argmin()), mean.tolist()
        return best, means


def _entry(contestant: Contestant, evaluation: Evaluation, tuning: Mapping[str, Any]) -> Entry:
    return Entry(
        label=contestant.label,
        setting=contestant.setting,
        learned=contestant.learned,
        evaluation=replace(evaluation, policy=contestant.label),
        tuning=tuning,
        training_steps=(contestant.provenance.get("timesteps") or 0) * (contestant.policy.decide_every or 1),
    )


def _tuning(budget: int) -> dict[str, Any]:
    return {"grid": {kind: rates.tolist() for kind, rates in GRID.items()}, "tuning_runs": budget}


def _picked(evaluations: Sequence[Evaluation], choice: np.ndarray, wall_seconds: float) -> Evaluation:
    """Run by run, the evaluation that ``choice`` (runs,) names."""
    runs, first = np.arange(len(choice)), evaluations[0]

    def pick(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.stack(values)[choice, runs]

    ends = ("final_loss", "best_loss", "diverged", "lost_early", "late", "curve", "inner_steps", "rollbacks")
    arrays: dict[str, Any] = {name: pick([getattr(one, name) for one in evaluations]) for name in ends}
    measures = {name: pick([one.measures[name] for one in evaluations]) for name in first.measures}
    if "joules" in measures:  # like the time, that of all
        measures["joules"] = np.sum([one.measures["joules"] for one in evaluations], axis=0)
    return replace(
        first,
        **arrays,
        learning_rates=pick([one.learning_rates for one in evaluations]),
        measures=measures,
        disturbed={kind: pick([one.disturbed[kind] for one in evaluations]) for kind in first.disturbed},
        wall_seconds=wall_seconds,
    )
