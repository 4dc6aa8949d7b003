"""Meta-training: a Stable-Baselines3 agent learns to steer inner runs; its best policy becomes a bundle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from trimtab.agents.algorithms import check_algorithm, make_agent
from trimtab.agents.callbacks import (
    Checkpoints,
    Evaluations,
    EventFile,
    HyperparameterTable,
    RolloutStatistics,
    Standing,
    UpdateLog,
)
from trimtab.agents.checkpoints import Checkpoint, Score, load_checkpoint, restore
from trimtab.agents.export import learned_policy_from_sb3, policy_of_training
from trimtab.agents.normalize import Normalizer
from trimtab.agents.presets import preset
from trimtab.agents.progress import ProgressDisplay, say
from trimtab.agents.selection import Selection
from trimtab.agents.training_folder import TrainingConfig, TrainingFolder, check_free, config_to_resume, write_config
from trimtab.envs.sb3_vec_env import TrimtabVecEnv, make_vec
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.errors import check_whole
from trimtab.inner_training.stepping import Mode
from trimtab.policies.bundle import save_bundle


def run_train(
    scenario: str | Path | Scenario,
    *,
    algo: str = "ppo",
    timesteps: int = 200_000,
    seed: int = 0,
    out: str | Path,
    resume: bool = False,
    num_envs: int = 64,
    device: str = "cpu",
    mode: Mode = "auto",
) -> Path:
    """Trains a policy and exports the best one.

    Writes into ``out``: ``config.yaml``, ``tensorboard/``, ``checkpoints/`` and ``policy/``, the bundle of the
    checkpoint that did best on the selection instances (docs/training.md).

    Args:
        scenario: an id, the path of a YAML file, or a scenario.
        algo: a name of ``PRESETS``.
        timesteps: environment steps (decisions of single runs) in all, rounded up to whole rollouts; >= 1.
        seed: of everything random, >= 0.
        out: folder of the training.
        resume: go on from the last checkpoint in ``out``; inner runs start anew, on other instances than before.
        num_envs: runs side by side, >= 1.
        device: of the inner runs; the learner's small networks are fastest on the CPU and stay there.
        mode: how inner runs step, see ``Population``.

    Returns:
        The path of the bundle.

    Raises:
        UserError: an unknown name, a number out of range, an ``out`` that holds something already, or a training
            that cannot be resumed. Nothing is overwritten.
    """
    for name, value, low in (("timesteps", timesteps, 1), ("seed", seed, 0), ("num_envs", num_envs, 1)):
        check_whole(name, value, low)
    settings = preset(algo)
    check_algorithm(settings)
    folder = TrainingFolder(root=Path(out))
    config = TrainingConfig(
        scenario=load_scenario(scenario),
        algo=algo,
        preset=settings,
        seed=seed,
        timesteps=timesteps,
        num_envs=num_envs,
        device=device,
        mode=mode,
        source=scenario.id if isinstance(scenario, Scenario) else str(scenario),
    )
    if not resume:
        check_free(folder)
        return _train(config, folder, None)
    checkpoint = load_checkpoint(folder.latest)
    return _train(config_to_resume(folder, config, checkpoint.steps), folder, checkpoint)


def _train(config: TrainingConfig, folder: TrainingFolder, checkpoint: Checkpoint | None) -> Path:
    """Trains from the start, or from a checkpoint, and writes the bundle."""
    console = Console(stderr=True)
    with _own_randomness():
        say(console, f"preparing {config.num_envs} inner runs of {config.scenario.id}")
        learner = Learner(config, checkpoint)
        write_config(folder, config)
        try:
            learner.learn(folder, console)
        except KeyboardInterrupt:
            say(console, f"what was learned up to the last update is in {folder.root}; go on with --resume")
            raise
    bundle = save_bundle(policy_of_training(folder), folder.policy, overwrite=True)
    say(console, f"the best policy is in {bundle}")
    return bundle


@dataclass
class Learner:
    """An agent with its environment, new or as a checkpoint left it.

    Args:
        config: of the training.
        checkpoint: to go on from; None to begin.

    Attributes:
        env: N inner runs.
        normalizer: around them.
        model: the agent.
        standing: how well it does.
    """

    config: TrainingConfig
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        """Makes environment, networks and selection instances; compiles where the mode says so."""
        config, settings = self.config, self.config.preset
        self.env: TrimtabVecEnv = make_vec(config.scenario, config.num_envs, device=config.device, mode=config.mode)
        self.normalizer = Normalizer(
            self.env,
            clip_obs=settings.obs_clip,
            clip_reward=settings.reward_clip,
            gamma=settings.gamma,
            epsilon=settings.obs_epsilon,
        )
        self.selection = Selection(config.scenario, config.num_envs, device=config.device, mode=config.mode)
        done = self.checkpoint.steps if self.checkpoint else 0
        self.model = make_agent(config, self.normalizer, stream_seed(config.seed, done))
        self.standing = Standing()
        if self.checkpoint is not None:
            restore(self.checkpoint, self.model, self.normalizer)
            self.standing = Standing(evaluated=self.checkpoint.evaluated, best=self.checkpoint.best)

    def judge(self, model: OnPolicyAlgorithm) -> Score:
        """Evaluates the present policy on the selection instances."""
        policy = learned_policy_from_sb3(model, self.normalizer, self.config.scenario, {})
        return self.selection.score(policy, model.num_timesteps)

    def learn(self, folder: TrainingFolder, console: Console) -> None:
        """Learns until the budget is spent, writing into ``folder`` and telling ``console`` how far it is."""
        config, model = self.config, self.model
        rollout = model.n_steps * config.num_envs
        rollouts = -(-max(config.timesteps - model.num_timesteps, 0) // rollout)
        display = ProgressDisplay(model.num_timesteps + rollouts * rollout, self.standing.words, console)
        logger = Logger(str(folder.tensorboard), [EventFile(str(folder.tensorboard), model.num_timesteps)])
        model.set_logger(logger)
        try:
            model.learn(
                max(config.timesteps - model.num_timesteps, 0),
                callback=self._callbacks(folder, display),
                reset_num_timesteps=False,
            )
        finally:
            display.close()
            logger.close()

    def _callbacks(self, folder: TrainingFolder, display: ProgressDisplay) -> list[BaseCallback]:
        """In the order of their moments: an update is logged, then judged, then saved."""
        every = self.config.preset.evaluation_interval(self.config.timesteps, self.selection.decisions)
        return [
            HyperparameterTable(self._hyperparameters()),
            UpdateLog(),
            RolloutStatistics(self.env),
            Evaluations(every, self.judge, self.standing, folder, self.normalizer),
            Checkpoints(self.standing, folder, self.normalizer),
            display,
        ]

    def _hyperparameters(self) -> dict[str, Any]:
        config = self.config
        made = {"scenario": config.scenario.id, "algo": config.algo, "seed": config.seed, "num_envs": config.num_envs}
        settings = config.preset.to_dict().items()
        return {**made, **{name: str(value) if isinstance(value, list) else value for name, value in settings}}


def stream_seed(seed: int, steps: int) -> int:
    """Seed of the random streams of a training that (re)starts after ``steps``: a resumed one repeats no episode.

    >>> stream_seed(0, 0) != stream_seed(0, 4096)
    True
    """
    return int(np.random.SeedSequence((seed, steps)).generate_state(1)[0])


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Stable-Baselines3 seeds and uses the process's generators; afterwards they are as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)
