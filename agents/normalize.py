"""Normalisation of observations and rewards, with statistics that are saved as JSON, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from trimtab.errors import ConfigError, MismatchError


def moments(vec_normalize: VecNormalize) -> RunningMeanStd:
    """Running mean and variance of the observations (flat boxes only, which all of trimtab's are)."""
    statistics = vec_normalize.obs_rms
    if not isinstance(statistics, RunningMeanStd):
        raise MismatchError("observations are a dict; trimtab normalises flat observations only")
    return statistics


class Normalizer(VecNormalize):
    """``VecNormalize`` that also keeps the range of the observations seen in training.

    Created:
        obs_low, obs_high: (S,) float32, smallest and largest raw observation; infinite before the first one.
    """

    def __init__(self, venv: VecEnv, **options: Any) -> None:
        super().__init__(venv, **options)
        self.obs_low = np.full(self.observation_space.shape or (), np.inf, dtype=np.float32)
        self.obs_high = np.full(self.observation_space.shape or (), -np.inf, dtype=np.float32)

    def reset(self) -> np.ndarray:
        """Resets all runs."""
        observations = super().reset()
        self._widen()
        return np.asarray(observations)

    def step_wait(self) -> VecEnvStepReturn:
        """Waits for the step begun last."""
        result = super().step_wait()
        self._widen()
        return result

    def _widen(self) -> None:
        if self.training:
            raw = np.asarray(self.old_obs)
            np.minimum(self.obs_low, raw.min(0), out=self.obs_low)
            np.maximum(self.obs_high, raw.max(0), out=self.obs_high)

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable statistics; float64 survives exactly."""
        rewards = self.ret_rms
        return {
            **observation_statistics(self),
            "reward": {"mean": float(rewards.mean), "var": float(rewards.var), "count": float(rewards.count)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave; ``MismatchError`` where the number of signals differs."""
        size = len(np.atleast_1d(self.obs_low))
        if len(state["mean"]) != size:
            raise MismatchError(f"the saved statistics are of {len(state['mean'])} signals; the scenario has {size}")
        statistics = moments(self)
        statistics.mean = np.asarray(state["mean"], dtype=np.float64)
        statistics.var = np.asarray(state["var"], dtype=np.float64)
        statistics.count = float(state["count"])
        self.obs_low = np.asarray(state["low"], dtype=np.float32)
        self.obs_high = np.asarray(state["high"], dtype=np.float32)
        self.clip_obs, self.epsilon = float(state["clip"]), float(state["epsilon"])
        self.ret_rms.mean = np.asarray(state["reward"]["mean"])
        self.ret_rms.var = np.asarray(state["reward"]["var"])
        self.ret_rms.count = float(state["reward"]["count"])


def observation_statistics(vec_normalize: VecNormalize) -> dict[str, Any]:
    """What a policy needs to normalise observations by itself.

    Args:
        vec_normalize: the wrapper that a policy was trained behind.

    Returns:
        ``mean``, ``var``, ``count``, ``clip``, ``epsilon`` and the range ``low``, ``high`` of the observations in
        training ([-1, 1], the range of every signal, where the wrapper did not record it).
    """
    shape = vec_normalize.observation_space.shape or ()
    low = getattr(vec_normalize, "obs_low", np.full(shape, -1.0))
    high = getattr(vec_normalize, "obs_high", np.full(shape, 1.0))
    # Without normalisation: mean 0, variance 1 and an epsilon that a float32 cannot feel.
    statistics = moments(vec_normalize) if vec_normalize.norm_obs else RunningMeanStd(epsilon=0.0, shape=shape)
    return {
        "mean": np.asarray(statistics.mean, dtype=np.float64).tolist(),
        "var": np.asarray(statistics.var, dtype=np.float64).tolist(),
        "count": float(statistics.count),
        "clip": float(vec_normalize.clip_obs),
        "epsilon": float(vec_normalize.epsilon) if vec_normalize.norm_obs else 1e-12,
        "low": low.tolist(),
        "high": high.tolist(),
    }


def check_statistics(state: Mapping[str, Any], signals: int) -> None:
    """Refuses statistics that lack an entry, are of another size, or are not finite (``ConfigError``)."""
    for name in ("mean", "var", "low", "high"):
        values = np.asarray(state.get(name), dtype=np.float64)
        if values.shape != (signals,) or not np.isfinite(values).all():
            raise ConfigError(f"normalisation statistic {name!r} must be {signals} finite numbers, one for each signal")
    for name in ("clip", "epsilon"):
        if not isinstance(state.get(name), (int, float)) or not np.isfinite(state[name]):
            raise ConfigError(f"normalisation statistic {name!r} must be a finite number")
