"""What happens around learning, each in a small callback: measuring, evaluating, saving."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, TensorBoardOutputFormat
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch.utils.tensorboard import SummaryWriter

from trimtab.agents.checkpoints import Score, capture, save_checkpoint
from trimtab.agents.normalize import Normalizer
from trimtab.agents.training_folder import TrainingFolder
from trimtab.envs.sb3_vec_env import TrimtabVecEnv

QUANTILES = (0.1, 0.5, 0.9)


@dataclass
class Standing:
    """How well a training does so far.

    Attributes:
        evaluated: environment steps at the last evaluation, 0 for none yet.
        last, best: the last and the best evaluation.
    """

    evaluated: int = 0
    last: Score | None = None
    best: Score | None = None

    def words(self) -> str:
        """For people; empty before the first evaluation.

        >>> Standing(last=Score(steps=9, final_loss=-0.25, mean_return=1.0, diverged=0.0, height=-0.25)).words()
        'evaluation -0.250'
        """
        named = (("evaluation", self.last), ("best", self.best))
        return "  ".join(f"{name} {score.height:.3f}" for name, score in named if score is not None)


class EventFile(TensorBoardOutputFormat):
    """TensorBoard's event file; on resuming, what an interrupted training logged after its checkpoint is dropped."""

    def __init__(self, folder: str, steps: int) -> None:
        self.writer = SummaryWriter(log_dir=folder, purge_step=steps + 1 if steps else None)
        self._is_closed = False


@dataclass
class _Tally:
    """Sums over a rollout."""

    terms: dict[str, float] = field(default_factory=dict)
    rewards: float = 0.0
    positions: list[np.ndarray] = field(default_factory=list)
    rollbacks: int = 0
    steps: int = 0
    ended: list[dict[str, Any]] = field(default_factory=list)


class RolloutStatistics(BaseCallback):
    """Logs what a rollout was like: reward terms, lever positions, divergence, rollbacks, speed (docs/training.md).

    Args:
        env: the environment itself, under any wrappers.
    """

    def __init__(self, env: TrimtabVecEnv) -> None:
        super().__init__()
        self.env = env
        self._tally, self._begun = _Tally(), 0.0

    def _on_rollout_start(self) -> None:
        self._tally, self._begun = _Tally(), time.perf_counter()

    def _on_step(self) -> bool:
        result, tally = self.env.last_result, self._tally
        assert result is not None
        tally.steps += self.env.num_envs
        for name, values in result.terms.items():
            tally.terms[name] = tally.terms.get(name, 0.0) + float(values.sum())
        tally.positions.append(np.log(np.maximum(result.multipliers, 1e-30)))
        tally.rollbacks += int(result.rolled_back.sum())
        tally.ended.extend(info["run"] for info in self.locals["infos"] if "run" in info)
        return True

    def _on_rollout_end(self) -> None:
        tally, record = self._tally, self.logger.record
        for name, total in tally.terms.items():
            record(f"reward/{name}", total / tally.steps)
        record("reward/total", sum(tally.terms.values()) / tally.steps)
        positions = np.stack(tally.positions)
        for column, name in enumerate(self.env.episodes.multiplier_levers):
            values = positions[:, :, column]
            record(f"levers/{name}_mean", float(values.mean()))
            for share, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True):
                record(f"levers/{name}_q{round(100 * share)}", float(value))
        record("runs/rollbacks", tally.rollbacks / tally.steps)
        if tally.ended:
            record("runs/final_loss", float(np.mean([run["log_val_loss"] for run in tally.ended])))
            record("runs/diverged", float(np.mean([run["diverged"] for run in tally.ended])))
        seconds = time.perf_counter() - self._begun
        record("speed/env_steps_per_second", tally.steps / seconds)
        record("speed/run_steps_per_second", tally.steps * self.env.scenario.interval / seconds)


class UpdateLog(BaseCallback):
    """Writes what an update recorded at the step at which it was made, not at the end of the next rollout."""

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.logger.name_to_value:
            self.logger.dump(self.model.num_timesteps)

    def _on_training_end(self) -> None:
        self.logger.dump(self.model.num_timesteps)


class Evaluations(BaseCallback):
    """Evaluates between updates, logs it, and keeps the best policy.

    Args:
        every: environment steps between evaluations, >= 1; the last one follows the last update.
        judge: plays the learner's policy on the selection instances.
        standing: updated in place.
        folder: of the training.
        normalizer: saved with the best policy.
    """

    def __init__(
        self,
        every: int,
        judge: Callable[[OnPolicyAlgorithm], Score],
        standing: Standing,
        folder: TrainingFolder,
        normalizer: Normalizer,
    ) -> None:
        super().__init__()
        self.every, self.judge, self.standing = every, judge, standing
        self.folder, self.normalizer = folder, normalizer

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps // self.every > self.standing.evaluated // self.every:
            self._evaluate()

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self.standing.evaluated:
            self._evaluate()

    def _evaluate(self) -> None:
        assert isinstance(self.model, OnPolicyAlgorithm)
        begun = time.perf_counter()
        score = self.judge(self.model)
        standing = self.standing
        standing.evaluated, standing.last = score.steps, score
        if standing.best is None or score.height < standing.best.height:
            standing.best = score
            kept = capture(self.model, self.normalizer, evaluated=score.steps, best=score)
            save_checkpoint(kept, self.folder.best)
        self.logger.record("evaluation/final_loss", score.final_loss)
        self.logger.record("evaluation/best_final_loss", standing.best.final_loss)
        self.logger.record("evaluation/mean_return", score.mean_return)
        self.logger.record("evaluation/diverged", score.diverged)
        self.logger.record("speed/evaluation_seconds", time.perf_counter() - begun)
        self.logger.dump(self.model.num_timesteps)


class Checkpoints(BaseCallback):
    """Saves the learner before every rollout and at the end.

    Args:
        standing: saved with it.
        folder: of the training.
        normalizer: saved with it.
    """

    def __init__(self, standing: Standing, folder: TrainingFolder, normalizer: Normalizer) -> None:
        super().__init__()
        self.standing, self.folder, self.normalizer = standing, folder, normalizer

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        self._save()

    def _on_rollout_start(self) -> None:
        self._save()

    def _on_training_end(self) -> None:
        self._save()

    def _save(self) -> None:
        assert isinstance(self.model, OnPolicyAlgorithm)
        kept = capture(self.model, self.normalizer, evaluated=self.standing.evaluated, best=self.standing.best)
        save_checkpoint(kept, self.folder.latest)


class HyperparameterTable(BaseCallback):
    """Fills TensorBoard's HPARAMS tab.

    Args:
        hyperparameters: name to number, bool or text.
    """

    METRICS = ("evaluation/best_final_loss", "evaluation/final_loss", "evaluation/diverged", "rollout/ep_rew_mean")

    def __init__(self, hyperparameters: dict[str, Any]) -> None:
        super().__init__()
        self.hyperparameters = hyperparameters

    def _on_step(self) -> bool:
        return True

    def _on_training_start(self) -> None:
        # TensorBoard shows a metric here only if it is named beforehand; its value is that of the scalar.
        table = HParam(self.hyperparameters, dict.fromkeys(self.METRICS, 0.0))
        self.logger.record("hparams", table, exclude=("stdout", "log", "json", "csv"))
        self.logger.dump(self.model.num_timesteps)
