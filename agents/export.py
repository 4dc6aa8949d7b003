"""Export: from a trained agent to a learned policy and its bundle."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor, nn

from trimtab.agents import agent_files
from trimtab.agents.agent_files import read_companion, read_parameters
from trimtab.agents.checkpoints import load_checkpoint
from trimtab.agents.files import write_atomically
from trimtab.agents.normalize import check_statistics, observation_statistics
from trimtab.agents.training_folder import TrainingFolder, read_config
from trimtab.envs.scenario import Scenario, load_scenario
from trimtab.errors import MismatchError, UserError, require_extra
from trimtab.policies.bundle import load_bundle, save_bundle
from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.manifest import MANIFEST
from trimtab.policies.network import ActionKind, Activation, LearnedPolicy

ACTIVATIONS: dict[type[nn.Module], Activation] = {nn.Tanh: "tanh", nn.ReLU: "relu"}


def learned_policy(
    state: Mapping[str, Tensor],
    statistics: Mapping[str, Any],
    scenario: Scenario,
    *,
    activation: Activation,
    provenance: Mapping[str, Any],
    results: Mapping[str, float | str] | None = None,
) -> LearnedPolicy:
    """Builds a learned policy from the state dict of an actor-critic policy with an MLP, after an LSTM or without one.

    Args:
        state: of Stable-Baselines3's ``ActorCriticPolicy`` or sb3-contrib's ``RecurrentActorCriticPolicy``; its value
            function is left out.
        statistics: see ``observation_statistics``.
        scenario: what it was trained on; gives the signals, the levers and the decision period.
        activation: between layers.
        provenance: how it was trained; the keys are those of ``policies.manifest.Provenance``.
        results: results to put into the bundle, name to number or text.

    Raises:
        MismatchError: when the network does not fit the scenario.
    """
    layers, lstm = _layers(state), _lstm(state)
    signals, levers = len(scenario.signals), len(scenario.levers)
    inputs, outputs = (lstm[0].input_weight if lstm else layers[0][0]).shape[1], len(layers[-1][1])
    if inputs != signals or outputs not in (levers, 3 * levers):
        raise MismatchError(
            f"the network maps {inputs} signals to {outputs} outputs; scenario {scenario.id!r} has {signals} signals "
            f"and {levers} levers"
        )
    kind: ActionKind = "box" if outputs == levers else "multi-discrete"
    check_statistics(statistics, signals)
    return LearnedPolicy(
        name=f"{scenario.id}-{provenance.get('algorithm') or 'learned'}",
        signals=scenario.signals,
        levers=dict.fromkeys(scenario.levers, "moves"),
        decide_every=scenario.interval,
        layers=layers,
        activation=activation,
        obs_mean=np.asarray(statistics["mean"]),
        obs_var=np.asarray(statistics["var"]),
        obs_clip=float(statistics["clip"]),
        obs_eps=float(statistics["epsilon"]),
        action_kind=kind,
        obs_low=np.asarray(statistics["low"]),
        obs_high=np.asarray(statistics["high"]),
        provenance=provenance,
        results=results or {},
        lstm=lstm,
    )


def _layers(state: Mapping[str, Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases from the observation to the action."""
    pattern = re.compile(r"mlp_extractor\.policy_net\.(\d+)\.weight")
    hidden = sorted(int(found[1]) for name in state if (found := pattern.fullmatch(name)))
    names = [f"mlp_extractor.policy_net.{index}" for index in hidden] + ["action_net"]
    if any(f"{name}.{part}" not in state for name in names for part in ("weight", "bias")):
        raise UserError(
            "the agent is not an actor-critic with an MLP (MlpPolicy of PPO or A2C, MlpLstmPolicy of RecurrentPPO); "
            "only those are exported"
        )
    return [(state[f"{name}.weight"].cpu().numpy(), state[f"{name}.bias"].cpu().numpy()) for name in names]


def _lstm(state: Mapping[str, Tensor]) -> list[LSTMLayer]:
    """The LSTM of the policy, not of the value function; none, for a feed-forward agent."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    held = {name: value.cpu().numpy() for name, value in state.items() if name.startswith("lstm_actor.")}
    layers = -(-len(held) // len(parts))
    wanted = {f"lstm_actor.{part}_l{number}" for number in range(layers) for part in parts}
    if held.keys() != wanted:
        raise UserError(
            "the agent's LSTM is not a plain one; only those with biases, in one direction and without projection are "
            "exported"
        )
    return [
        LSTMLayer(weights, states, bias + other)
        for weights, states, bias, other in ([held[f"lstm_actor.{part}_l{i}"] for part in parts] for i in range(layers))
    ]


def learned_policy_from_sb3(
    model: OnPolicyAlgorithm, vec_normalize: VecNormalize, scenario: Scenario, provenance: Mapping[str, Any]
) -> LearnedPolicy:
    """Builds a learned policy from a live Stable-Baselines3 agent.

    Its actions equal ``model.predict(vec_normalize.normalize_obs(observations), deterministic=True)``, and with
    ``MlpLstmPolicy`` its state equals that of ``predict``.

    Args:
        model: PPO or A2C with ``MlpPolicy``, or RecurrentPPO with ``MlpLstmPolicy``.
        vec_normalize: the wrapper that it was trained behind.
        scenario: what it was trained on.
        provenance: how; the keys are those of ``policies.manifest.Provenance``.
    """
    return learned_policy(
        model.policy.state_dict(),
        observation_statistics(vec_normalize),
        scenario,
        activation=_activation(model),
        provenance=provenance,
    )


def _activation(model: OnPolicyAlgorithm) -> Activation:
    policy = model.policy
    used = policy.activation_fn if isinstance(policy, ActorCriticPolicy) else None
    if used not in ACTIVATIONS:
        raise UserError(f"activation {getattr(used, '__name__', used)} cannot be exported; use nn.Tanh or nn.ReLU")
    return ACTIVATIONS[used]


def save_for_export(
    model: OnPolicyAlgorithm, vec_normalize: VecNormalize, scenario: str | Path | Scenario, path: Path
) -> None:
    """Saves an agent of your own training so that ``trimtab export`` can read it.

    Args:
        model: PPO or A2C with ``MlpPolicy``, or RecurrentPPO with ``MlpLstmPolicy``, trained on
            ``trimtab.make_vec(scenario, ...)``.
        vec_normalize: the wrapper that it was trained behind.
        scenario: what it was trained on.
        path: the agent's ``.zip``. The statistics go into a ``.json`` beside it, since reading the pickle of
            ``VecNormalize.save`` would run code.
    """
    loaded = load_scenario(scenario)
    content = {
        "format": agent_files.FORMAT,
        "scenario": loaded.model_dump(mode="json"),
        "activation": _activation(model),
        "statistics": observation_statistics(vec_normalize),
        "provenance": {
            "scenario": loaded.id,
            "families": [family.name for family in loaded.families],
            "algorithm": {"RecurrentPPO": "recurrent-ppo"}.get(type(model).__name__, type(model).__name__.lower()),
            "timesteps": int(model.num_timesteps),
        },
    }
    write_atomically(path.with_suffix(".json"), json.dumps(content, indent=1).encode())
    model.save(path.with_suffix(".zip"))


def run_export(source: Path, out: Path, onnx: bool = False) -> Path:
    """Writes a bundle.

    Args:
        source: the ``--out`` folder of a training (its best checkpoint is taken), a bundle, or a ``.zip`` of
            ``save_for_export``.
        out: folder of the bundle; it must not exist yet, or be empty.
        onnx: also write ``policy.onnx``.

    Returns:
        The path of the bundle.

    Raises:
        UserError: when the source is none of these or damaged, something is at ``out`` already, or the extra
            ``onnx`` is not installed.
    """
    if onnx:
        for module in ("onnx", "onnxscript"):
            require_extra(module, "onnx")
    if source.is_dir():
        policy = (
            load_bundle(source) if (source / MANIFEST).is_file() else policy_of_training(TrainingFolder(root=source))
        )
    elif source.suffix == ".zip" and source.is_file():
        policy = _policy_of_zip(source)
    else:
        what = "is no agent" if source.exists() else "does not exist"
        raise UserError(f"{str(source)!r} {what}; give the --out folder of train, a bundle, or the .zip of an agent")
    content = None
    if onnx:
        from trimtab.agents.onnx_graph import to_onnx

        content = to_onnx(policy)
    return save_bundle(policy, out, onnx=content)


def policy_of_training(folder: TrainingFolder) -> LearnedPolicy:
    """The learned policy of a training's best checkpoint."""
    config = read_config(folder)
    checkpoint = load_checkpoint(folder.best) if folder.best.is_file() else None
    if checkpoint is None or checkpoint.best is None:
        raise UserError(f"the training in {str(folder.root)!r} has not been evaluated yet; go on with train --resume")
    score = checkpoint.best
    return learned_policy(
        checkpoint.policy(),
        checkpoint.normalizer,
        config.scenario,
        activation="relu" if config.preset.activation == "relu" else "tanh",
        provenance=config.provenance(score),
        results={
            "selection_final_loss": score.final_loss,
            "selection_mean_return": score.mean_return,
            "selection_diverged": score.diverged,
        },
    )


def _policy_of_zip(path: Path) -> LearnedPolicy:
    companion = path.with_suffix(".json")
    if not companion.exists():
        raise UserError(
            f"{str(path)!r} holds no normalisation statistics, and a pickle of VecNormalize is not read because that "
            f"runs code; write {companion.name!r} beside it with trimtab.agents.export.save_for_export"
        )
    described, state = read_companion(companion), read_parameters(path)
    try:
        return learned_policy(
            state,
            described.statistics,
            described.scenario,
            activation=described.activation,
            provenance=described.provenance,
        )
    except UserError:
        raise
    except Exception as error:  # tensors of shapes that no such agent has
        raise UserError(f"{str(path)!r} is not of an agent that can be exported: {error}") from error
