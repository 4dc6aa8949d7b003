"""Learned policies: the obligations of every policy, and equality with Stable-Baselines3."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from tests.policies.made_up import SIGNALS, learned
from tests.policies.obligations import OBLIGATIONS, play

from trimtab.errors import MismatchError, UnknownNameError
from trimtab.inner_training.levers import LEVERS
from trimtab.policies.lstm import LSTMLayer, run_layers
from trimtab.policies.network import LearnedPolicy, LeverLimits
from trimtab.policies.policy import Policy
from trimtab.policies.registry import check_policy

VARIANTS = [("box", "tanh"), ("box", "relu"), ("multi-discrete", "tanh"), ("multi-discrete", "relu")]


@pytest.mark.parametrize("obligation", OBLIGATIONS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("lstm", [(), (5,), (4, 6)], ids=str)
@pytest.mark.parametrize(("action_kind", "activation"), VARIANTS)
def test_obligations(
    action_kind: str, activation: str, lstm: tuple[int, ...], obligation: Callable[[Policy], None]
) -> None:
    obligation(learned(action_kind, activation, lstm=lstm))


def test_it_passes_the_check_of_loaded_policies() -> None:
    assert check_policy(learned(), "made-up").name == "made-up"


# --- the forward pass -------------------------------------------------------------------------------------------


def slow_act(policy: LearnedPolicy, row: np.ndarray) -> list[float]:
    """One run in plain float64 Python."""
    hidden = []
    for value, mean, var in zip(row, policy.obs_mean, policy.obs_var, strict=True):
        scaled = (float(value) - mean) / (var + policy.obs_eps) ** 0.5
        hidden.append(max(-policy.obs_clip, min(policy.obs_clip, scaled)))
    for number, (weight, bias) in enumerate(policy.layers):
        hidden = [sum(float(w) * h for w, h in zip(ws, hidden, strict=True)) + float(b)
                  for ws, b in zip(weight, bias, strict=True)]  # fmt: skip
        if number < len(policy.layers) - 1:
            hidden = [float(np.tanh(h)) if policy.activation == "tanh" else max(h, 0.0) for h in hidden]
    if policy.action_kind == "box":
        return [max(-1.0, min(1.0, h)) for h in hidden]
    triples = [hidden[3 * lever : 3 * lever + 3] for lever in range(len(policy.levers))]
    return [float(triple.index(max(triple)) - 1) for triple in triples]


@pytest.mark.parametrize(("action_kind", "activation"), VARIANTS)
@pytest.mark.parametrize("hidden", [(), (5,), (16, 16)], ids=str)
def test_forward_pass(hidden: tuple[int, ...], action_kind: str, activation: str) -> None:
    policy = learned(action_kind, activation, hidden, obs_clip=2.0)
    seen = np.random.default_rng(1).uniform(-1, 1, (40, len(SIGNALS))).astype(np.float32)
    actions, _ = policy.act(seen, {})
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, [slow_act(policy, row) for row in seen], rtol=0, atol=1e-5)
    assert len(np.unique(actions)) > 1
    if action_kind == "box":
        assert (np.abs(policy.outputs(seen)) > 1).any()  # some are clipped
    assert policy.sizes == [7, *hidden, 2 if action_kind == "box" else 6]


# --- recurrent --------------------------------------------------------------------------------------------------


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def slow_lstm(layer: LSTMLayer, seen: np.ndarray) -> list[list[float]]:
    """Hidden states of one run over a sequence of inputs, in float64 Python."""
    hidden, cell, result = [0.0] * layer.units, [0.0] * layer.units, []
    for row in seen:
        gates = []
        for gate in range(4 * layer.units):
            inputs = sum(float(w) * float(x) for w, x in zip(layer.input_weight[gate], row, strict=True))
            states = sum(float(w) * h for w, h in zip(layer.state_weight[gate], hidden, strict=True))
            gates.append(inputs + states + float(layer.bias[gate]))
        for unit in range(layer.units):
            i, f, g, o = (gates[unit + part * layer.units] for part in range(4))
            cell[unit] = sigmoid(f) * cell[unit] + sigmoid(i) * math.tanh(g)
            hidden[unit] = sigmoid(o) * math.tanh(cell[unit])
        result.append(list(hidden))
    return result


def test_an_lstm_layer_is_that_of_the_paper() -> None:
    policy = learned(lstm=(5,))
    seen = np.random.default_rng(1).normal(0, 1.5, (30, 7)).astype(np.float32)
    state, hidden = policy.init(1), []
    for row in seen:
        _, state = run_layers(policy.lstm, row[None], state)
        hidden.append(state["hidden_0"][0].copy())
    np.testing.assert_allclose(hidden, slow_lstm(policy.lstm[0], seen), rtol=0, atol=1e-6)
    assert np.abs(hidden).max() > 0.5


def test_lstm_layers_are_those_of_torch() -> None:
    policy = learned(lstm=(6, 4))
    theirs = [torch.nn.LSTM(7, 6), torch.nn.LSTM(6, 4)]
    for module, layer in zip(theirs, policy.lstm, strict=True):
        for name, value in (("weight_ih_l0", layer.input_weight), ("weight_hh_l0", layer.state_weight),
                            ("bias_ih_l0", layer.bias), ("bias_hh_l0", 0 * layer.bias)):  # fmt: skip
            getattr(module, name).data = torch.tensor(value)
    seen = np.random.default_rng(1).normal(0, 2, (100, 3, 7)).astype(np.float32)
    state, outputs = policy.init(3), []
    for row in seen:
        output, state = run_layers(policy.lstm, row, state)
        outputs.append(output)
    with torch.no_grad():
        first, _ = theirs[0](torch.tensor(seen))
        wanted, (hidden, cell) = theirs[1](first)
    np.testing.assert_allclose(outputs, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(state["hidden_1"], hidden[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(state["cell_1"], cell[0], rtol=0, atol=3e-6)


def test_extreme_inputs_of_an_lstm_do_not_overflow() -> None:
    layer = LSTMLayer(np.full((8, 3), 1e30), np.ones((8, 2)), np.zeros(8))
    for sign in (-1, 1):
        hidden, cell = layer.step(np.full((1, 3), sign * 1e3, dtype=np.float32), *np.zeros((2, 1, 2), dtype=np.float32))
        assert np.isfinite([hidden, cell]).all()


def test_the_past_matters() -> None:
    policy = learned(lstm=(8,))
    seen = np.random.default_rng(1).uniform(-1, 1, (20, 4, 7)).astype(np.float32)
    actions, _ = play(policy, seen)
    alone = np.stack([policy.act(row, policy.init(4))[0] for row in seen])
    np.testing.assert_array_equal(actions[0], alone[0])
    assert (np.abs(actions[1:] - alone[1:]).max(-1) > 1e-3).mean() > 0.9


@pytest.mark.parametrize("shapes", [((8, 3), (8, 2), (9,)), ((8, 3), (8, 3), (8,)), ((7, 3), (8, 2), (8,)),
                                    ((8,), (8, 2), (8,)), ((0, 3), (0, 0), (0,)), ((8, 3), (8, 2), (8, 1))], ids=str)  # fmt: skip
def test_lstm_arrays_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(MismatchError, match="an LSTM layer has arrays of shapes"):
        LSTMLayer(*(np.zeros(shape) for shape in shapes))


def test_an_lstm_that_does_not_fit() -> None:
    with pytest.raises(MismatchError, match=r"input_weight of LSTM layer 0 has shape \(8, 3\); it must be \(8, 7\)"):
        replace(learned(lstm=(2,)), lstm=[LSTMLayer(*zeros(3, 2))])
    with pytest.raises(MismatchError, match=r"weight of layer 0 has shape \(16, 7\); it must be \(16, 2\)"):
        replace(learned(), lstm=[LSTMLayer(*zeros(7, 2))])
    with pytest.raises(MismatchError, match="an LSTM layer holds a number that is not finite"):
        LSTMLayer(np.full((8, 7), np.nan), *zeros(7, 2)[1:])


def zeros(inputs: int, units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros((4 * units, inputs)), np.zeros((4 * units, units)), np.zeros(4 * units)


@pytest.mark.parametrize("state", [{}, {"hidden_0": np.zeros((2, 5))}, {"hidden_0": np.zeros((3, 5)), "cell_0": np.zeros((2, 5))},
                                   {"hidden_0": np.zeros((2, 4)), "cell_0": np.zeros((2, 4))}], ids=str)  # fmt: skip
def test_a_state_that_does_not_fit(state: dict[str, np.ndarray]) -> None:
    with pytest.raises(MismatchError, match=r"hidden_0 and cell_0 of the state must be of shape \(2, 5\), but got"):
        learned(lstm=(5,)).act(np.zeros((2, 7), dtype=np.float32), state)


# --- against Stable-Baselines3 ----------------------------------------------------------------------------------


class Dummy(gymnasium.Env[np.ndarray, Any]):
    """Random observations in [-1, 1] of uneven spread."""

    observation_space = gymnasium.spaces.Box(-1, 1, (len(SIGNALS),), dtype=np.float32)

    def __init__(self, action_space: gymnasium.Space[Any]) -> None:
        self.action_space = action_space

    def _observe(self) -> np.ndarray:
        spread = np.linspace(0.05, 1.0, len(SIGNALS))
        return np.clip(self.np_random.normal(0.1, spread), -1, 1).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._observe(), float(np.mean(action)), False, False, {}


def exported(model: Any, envs: VecNormalize, action_kind: str, activation: str) -> LearnedPolicy:
    """The arrays of a trained agent as a learned policy."""
    linear = [m for m in [*model.policy.mlp_extractor.policy_net, model.policy.action_net] if hasattr(m, "weight")]
    return learned(
        action_kind,
        activation,
        layers=[(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linear],
        obs_mean=envs.obs_rms.mean,
        obs_var=envs.obs_rms.var,
        obs_clip=envs.clip_obs,
        obs_eps=envs.epsilon,
    )


@pytest.mark.parametrize(("action_kind", "activation"), VARIANTS)
def test_equals_stable_baselines3(action_kind: str, activation: str) -> None:
    space: gymnasium.Space[Any]
    if action_kind == "box":
        space = gymnasium.spaces.Box(-1, 1, (2,), dtype=np.float32)
    else:
        space = gymnasium.spaces.MultiDiscrete([3, 3])
    envs = VecNormalize(DummyVecEnv([lambda: Dummy(space)]), clip_obs=3.0)
    function = torch.nn.Tanh if activation == "tanh" else torch.nn.ReLU
    architecture = {"net_arch": [64, 64], "activation_fn": function}
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=64, n_epochs=2, seed=0, device="cpu",
                policy_kwargs=architecture)  # fmt: skip
    model.learn(256)
    with torch.no_grad():  # a mean that hardly was trained stays near zero: make it large enough to be clipped
        generator = torch.Generator().manual_seed(0)
        model.policy.action_net.weight.normal_(0, 0.15, generator=generator)
        model.policy.action_net.bias.normal_(0, 0.3, generator=generator)
    seen = np.random.default_rng(0).uniform(-1, 1, (10_000, len(SIGNALS))).astype(np.float32)
    theirs, _ = model.predict(envs.normalize_obs(seen), deterministic=True)
    policy = exported(model, envs, action_kind, activation)
    ours, _ = policy.act(seen, policy.init(len(seen)))
    wanted = theirs if action_kind == "box" else theirs - 1
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-6)
    assert {-1.0, 1.0} <= set(np.unique(ours).tolist())
    singles = [policy.act(row[None], {})[0][0] for row in seen[:500]]
    np.testing.assert_allclose(singles, wanted[:500], rtol=0, atol=1e-6)


def test_normalisation_is_that_of_vec_normalize_bit_for_bit() -> None:
    identity = np.eye(len(SIGNALS), dtype=np.float32)[:2]
    policy = learned(layers=[(identity, np.zeros(2, dtype=np.float32))], obs_clip=1.5)
    envs = VecNormalize(DummyVecEnv([lambda: Dummy(gymnasium.spaces.Box(-1, 1, (2,)))]), clip_obs=1.5)
    envs.obs_rms.mean, envs.obs_rms.var = policy.obs_mean, policy.obs_var
    seen = np.random.default_rng(0).uniform(-1, 1, (5000, len(SIGNALS))).astype(np.float32)
    np.testing.assert_array_equal(policy.outputs(seen), envs.normalize_obs(seen)[:, :2])


# --- checks ------------------------------------------------------------------------------------------


def test_arrays_are_copied_and_read_only() -> None:
    layers = [(np.ones((2, 7), dtype=np.float32), np.zeros(2, dtype=np.float32))]
    policy = learned(layers=layers)
    layers[0][0][:] = 5
    assert (policy.layers[0][0] == 1).all()
    for array in (policy.layers[0][0], policy.layers[0][1], policy.obs_mean, policy.obs_high):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_limits_are_those_of_the_lever_table() -> None:
    limits = learned().limits
    lever = LEVERS["lr"]
    assert limits["lr"] == LeverLimits(lever.low, lever.high, lever.rate)
    assert list(limits) == ["lr", "momentum"]


def layer(out: int, width: int, fill: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    return np.full((out, width), fill, dtype=np.float32), np.zeros(out, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signals": ()}, r"signals is \[\]"),
        ({"signals": ("started",) * 7}, "signals is .* different names"),
        ({"levers": {}}, "levers is"),
        ({"levers": {"lr": "targets", "momentum": "moves"}}, "lever 'lr' is of kind 'targets'"),
        ({"activation": "gelu"}, "activation is 'gelu'; allowed: tanh, relu"),
        ({"action_kind": "discrete"}, "action_kind is 'discrete'"),
        ({"limits": {"lr": LeverLimits(0.1, 10, 1)}}, "limits are of"),
        ({"obs_mean": np.zeros(6)}, r"obs_mean has shape \(6,\); it must be \(7,\)"),
        ({"obs_var": np.full(7, -1.0)}, "obs_var must be at least 0"),
        ({"obs_low": np.full(7, np.nan)}, "obs_low holds a number that is not finite"),
        ({"obs_low": np.ones(7), "obs_high": np.zeros(7)}, "obs_low at most obs_high"),
        ({"obs_clip": 0.0}, "obs_clip is 0.0"),
        ({"obs_eps": float("nan")}, "obs_eps is nan"),
        ({"decide_every": 0}, "decide_every is 0"),
        ({"layers": []}, "layers is empty"),
        ({"layers": [layer(3, 7)]}, r"weight of layer 0 has shape \(3, 7\); it must be \(2, 7\)"),
        ({"layers": [layer(2, 6)]}, r"weight of layer 0 has shape \(2, 6\)"),
        ({"layers": [layer(4, 7), layer(2, 5)]}, r"weight of layer 1 has shape \(2, 5\); it must be \(2, 4\)"),
        ({"layers": [layer(2, 7, np.inf)]}, "weight of layer 0 holds a number that is not finite"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        learned(**changes)


def test_unknown_lever() -> None:
    with pytest.raises(UnknownNameError, match="unknown lever 'momentun'"):
        learned(levers={"lr": "moves", "momentun": "moves"})


@pytest.mark.parametrize("shape", [(7,), (3, 6), (3, 1), (1, 3, 7)], ids=str)
def test_observations_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match="reads 7 signals"):
        learned().act(np.zeros(shape, dtype=np.float32), {})


def test_deploying_imports_neither_gymnasium_nor_stable_baselines3() -> None:
    code = (
        "import sys, trimtab.policies.registry as r, trimtab.policies.bundle; r.load_policy('cosine'); "
        "print(sorted({'gymnasium', 'stable_baselines3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
