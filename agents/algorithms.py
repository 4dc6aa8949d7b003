"""The learning algorithms: an agent of Stable-Baselines3 with the settings of a preset."""

from __future__ import annotations

from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import nn

from trimtab.agents.normalize import Normalizer
from trimtab.agents.presets import PPOPreset, RecurrentPPOPreset
from trimtab.agents.training_folder import TrainingConfig
from trimtab.errors import require_extra

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


def check_algorithm(settings: PPOPreset) -> None:
    """Refuses a recurrent preset where its algorithm is not installed (``MissingExtraError``)."""
    if isinstance(settings, RecurrentPPOPreset):
        require_extra("sb3_contrib", "recurrent")


def make_agent(config: TrainingConfig, env: Normalizer, seed: int) -> OnPolicyAlgorithm:
    """A fresh agent: PPO, or for a recurrent preset ``RecurrentPPO`` of sb3-contrib.

    Args:
        config: of the training.
        env: normalised environment; it is seeded too.
        seed: of networks, sampling, minibatches and episodes, in [0, 2**32).

    Raises:
        MissingExtraError: when sb3-contrib is needed and not installed.
    """
    settings = config.preset
    n_steps, batch_size = settings.rollout(config.timesteps, config.num_envs)
    options: dict[str, Any] = {
        "learning_rate": settings.schedule(),
        "n_steps": n_steps,
        "batch_size": batch_size,
        "n_epochs": settings.n_epochs,
        "gamma": settings.gamma,
        "gae_lambda": settings.gae_lambda,
        "clip_range": settings.clip_range,
        "ent_coef": settings.ent_coef,
        "vf_coef": settings.vf_coef,
        "max_grad_norm": settings.max_grad_norm,
        "target_kl": settings.target_kl,
        "seed": seed,
        "device": "cpu",
    }
    architecture: dict[str, Any] = {
        "net_arch": {"pi": list(settings.policy_layers), "vf": list(settings.value_layers)},
        "activation_fn": ACTIVATIONS[settings.activation],
        "log_std_init": settings.log_std_init,
    }
    if not isinstance(settings, RecurrentPPOPreset):
        return PPO("MlpPolicy", env, policy_kwargs=architecture, **options)
    recurrent: type[OnPolicyAlgorithm] = require_extra("sb3_contrib", "recurrent").RecurrentPPO
    architecture |= {"lstm_hidden_size": settings.lstm_units, "n_lstm_layers": settings.lstm_layers}
    return recurrent("MlpLstmPolicy", env, policy_kwargs=architecture, **options)
