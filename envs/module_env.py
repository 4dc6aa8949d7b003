"""A training run of the user's own as an environment: any module, optimizer and loader (see docs/module_run.md)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trimtab.envs.gymnasium_env import TrimtabEnv
from trimtab.envs.populations import Populations
from trimtab.envs.sb3_vec_env import TrimtabVecEnv
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.errors import MismatchError, UserError
from trimtab.inner_training.measurements import check_live
from trimtab.inner_training.module_family import ModuleFamily
from trimtab.inner_training.module_parts import Parts
from trimtab.inner_training.module_run import ModuleRun, Snapshots

__all__ = ["ModuleFamily", "ModuleRun", "Parts", "module_env", "module_populations", "module_vec"]

OWN = "module:run"  # stands for the task families of a scenario whose runs are given


def _shown(scenario: str | Path | Scenario | None) -> Scenario:
    """The scenario as the environment has it."""
    if scenario is None:
        return Scenario.of({"id": "module-run", "families": [OWN]})
    given = load_scenario(scenario)
    for name, present in (("disturbances", given.disturbances != ()), ("a deadline", given.deadline is not None)):
        if present:
            raise MismatchError(f"scenario {given.id!r} has {name}, which only populations know; leave that key out")
    check_live(f"guard.curvature_share of scenario {given.id!r}", given.guard.config().needs)
    return given.replace(families=[OWN])


def module_populations(families: Sequence[ModuleFamily], scenario: Scenario, snapshots: Snapshots) -> Populations:
    """One run of each family, in this order; they keep no snapshots where the scenario's guard does not roll back."""
    if not families or not all(isinstance(family, ModuleFamily) for family in families):
        raise UserError(f"families are {families!r}; give at least one ModuleFamily")
    kept: Snapshots = snapshots if scenario.guard.rollback else "off"
    return Populations.of([ModuleRun(family, snapshots=kept) for family in families])


def module_env(
    family: ModuleFamily,
    *,
    scenario: str | Path | Scenario | None = None,
    held_out: bool = False,
    snapshots: Snapshots = "device",
) -> TrimtabEnv:
    """A training run of one's own as a Gymnasium environment; an episode is one run.

    Args:
        family: makes the runs; each needs validation data, which the reward is made of.
        scenario: levers, signals, interval, guard and reward: an id, a YAML file, a scenario, or None for the defaults.
            Its task families give way to the run; it may have no disturbances and no deadline.
        held_out: take held-out seeds.
        snapshots: where the guard's two copies of the run lie: ``"device"``, ``"cpu"``, or ``"off"`` for none.

    Raises:
        UserError: an argument cannot be used. What ``family.make`` returns is verified by ``reset``.
    """
    shown = _shown(scenario)
    return TrimtabEnv(shown, held_out=held_out, populations=module_populations([family], shown, snapshots))


def module_vec(
    families: Sequence[ModuleFamily],
    *,
    scenario: str | Path | Scenario | None = None,
    seed: int = 0,
    held_out: bool = False,
    snapshots: Snapshots = "device",
) -> TrimtabVecEnv:
    """Training runs of one's own side by side, one after the other at each decision, for Stable-Baselines3.

    Args:
        families: one for each environment; the same one may be given several times, and each run is made anew.
        scenario, held_out, snapshots: as for ``module_env``.
        seed: environment i takes ``seed + i`` for its first episode.
    """
    shown = _shown(scenario)
    populations = module_populations(families, shown, snapshots)
    return TrimtabVecEnv(shown, populations.num_runs, seed=seed, held_out=held_out, populations=populations)
