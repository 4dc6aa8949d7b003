"""An exported policy acts as the agent that it came from, wherever the agent is read from."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import nn

from trimtab.agents import agent_files
from trimtab.agents.export import learned_policy, learned_policy_from_sb3, run_export, save_for_export
from trimtab.agents.normalize import Normalizer, observation_statistics
from trimtab.envs.catalogue import SCENARIOS
from trimtab.envs.scenario import Scenario
from trimtab.errors import ConfigError, MismatchError, MissingExtraError, OutputExistsError, UserError
from trimtab.policies.bundle import load_bundle
from trimtab.policies.manifest import MANIFEST, ONNX
from trimtab.policies.network import LearnedPolicy

KINDS = ("box", "multi-discrete")
BASE = SCENARIOS["digits-mlp"].replace(id="small")


class Spaces(VecEnv):
    """A vector environment of the right shapes, whose observations are noise of different scales."""

    def __init__(self, scenario: Scenario) -> None:
        signals, levers = len(scenario.signals), len(scenario.levers)
        action: spaces.Space[Any] = spaces.Box(-1, 1, (levers,), np.float32)
        if scenario.action == "multi-discrete":
            action = spaces.MultiDiscrete([3] * levers)
        super().__init__(3, spaces.Box(-1, 1, (signals,), np.float32), action)
        self.rng = np.random.default_rng(0)
        self.scales = self.rng.uniform(0, 1, signals)

    def reset(self) -> np.ndarray:
        return (self.rng.normal(size=(3, len(self.scales))) * self.scales).clip(-1, 1).astype(np.float32)

    def step_async(self, actions: np.ndarray) -> None:
        pass

    def step_wait(self) -> Any:
        return self.reset(), np.zeros(3, dtype=np.float32), np.zeros(3, dtype=bool), [{} for _ in range(3)]

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * 3

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        pass

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [None] * 3

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * 3


def environment(scenario: Scenario, wrapper: type[VecNormalize] = Normalizer) -> VecNormalize:
    """A wrapper that has seen observations."""
    env = wrapper(Spaces(scenario), gamma=1.0, clip_obs=2.0)
    env.reset()
    for _ in range(20):
        env.step(np.zeros((3, len(scenario.levers))))
    return env


def agent(scenario: Scenario, activation: type[nn.Module] = nn.Tanh, wrapper: type[VecNormalize] = Normalizer) -> PPO:
    """An agent with random weights, whose actions have a standard deviation of 1 before clipping."""
    env = environment(scenario, wrapper)
    arch = {"pi": [24, 16], "vf": [8]}
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=24, seed=0, device="cpu",
                policy_kwargs={"net_arch": arch, "activation_fn": activation})  # fmt: skip
    inputs = torch.as_tensor(env.normalize_obs(observations(scenario, 500)))
    outputs = model.policy.action_net(model.policy.mlp_extractor.forward_actor(inputs))
    model.policy.action_net.weight.data /= outputs.std().detach()
    return model


def recurrent(scenario: Scenario, layers: int = 1) -> RecurrentPPO:
    """The same with an LSTM before the layers, whose weights are large enough that the past matters."""
    architecture: dict[str, Any] = {"net_arch": {"pi": [16], "vf": [8]}, "lstm_hidden_size": 24, "n_lstm_layers": layers,
                                    "enable_critic_lstm": False}  # fmt: skip
    model = RecurrentPPO("MlpLstmPolicy", environment(scenario), n_steps=8, batch_size=24, seed=0, device="cpu",
                         policy_kwargs=architecture)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for name, value in model.policy.lstm_actor.named_parameters():
        value.data.normal_(0, 0.25 if "_hh_" in name else 0.4, generator=generator)
    inputs = torch.as_tensor(normalizer(model).normalize_obs(observations(scenario, 500)))
    with torch.no_grad():
        hidden, _ = model.policy.lstm_actor(inputs)
        outputs = model.policy.action_net(model.policy.mlp_extractor.forward_actor(hidden))
        model.policy.action_net.weight *= 0.5 / outputs.std()
    return model


def normalizer(model: OnPolicyAlgorithm) -> VecNormalize:
    env = model.get_vec_normalize_env()
    assert env is not None
    return env


def observations(scenario: Scenario, rows: int = 10_000) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (rows, len(scenario.signals))).astype(np.float32)


def moves(model: PPO, scenario: Scenario, raw: np.ndarray) -> np.ndarray:
    """What the agent would do, as moves."""
    actions, _ = model.predict(normalizer(model).normalize_obs(raw), deterministic=True)
    return actions - 1 if scenario.action == "multi-discrete" else actions


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_predict(kind: str, activation: type[nn.Module], tmp_path: Path) -> None:
    scenario = BASE.replace(action=kind)
    model = agent(scenario, activation)
    raw = observations(scenario)
    wanted = moves(model, scenario, raw)
    save_for_export(model, normalizer(model), scenario, tmp_path / "model.zip")
    live = learned_policy_from_sb3(model, normalizer(model), scenario, {"algorithm": "ppo"})
    for policy in (live, load_bundle(run_export(tmp_path / "model.zip", tmp_path / "bundle"))):
        actual, _ = policy.act(raw, policy.init(len(raw)))
        if kind == "box":
            assert np.abs(actual - wanted).max() <= 1e-6
            assert (np.abs(wanted) == 1).mean() > 0.05  # the clip matters
        else:
            assert (actual == wanted).all()
            assert set(np.unique(wanted)) == {-1, 0, 1}


def test_normalisation_is_baked_in() -> None:
    model = agent(BASE)
    raw = observations(BASE)
    without, _ = model.predict(raw, deterministic=True)
    policy = learned_policy_from_sb3(model, normalizer(model), BASE, {})
    assert (np.abs(policy.act(raw, {})[0] - without).max(1) > 1e-3).mean() > 0.9


def test_plain_vec_normalize_and_none_at_all() -> None:
    model = agent(BASE, wrapper=VecNormalize)
    raw = observations(BASE, 500)
    for norm_obs in (True, False):
        normalizer(model).norm_obs = norm_obs
        policy = learned_policy_from_sb3(model, normalizer(model), BASE, {})
        assert np.abs(policy.act(raw, {})[0] - moves(model, BASE, raw)).max() <= 1e-6
        assert (policy.obs_low == -1).all() and (policy.obs_high == 1).all()


def test_what_the_bundle_says() -> None:
    model = agent(BASE)
    policy = learned_policy_from_sb3(model, normalizer(model), BASE, {"algorithm": "ppo", "timesteps": 7})
    assert policy.name == "small-ppo"
    assert policy.signals == BASE.signals
    assert tuple(policy.levers) == BASE.levers
    assert policy.decide_every == BASE.interval
    assert policy.provenance["timesteps"] == 7
    seen = normalizer(model)
    assert isinstance(seen, Normalizer)
    assert (policy.obs_low == seen.obs_low).all() and (policy.obs_high == seen.obs_high).all()
    assert (policy.obs_low > -1).any()


@pytest.mark.parametrize("kind", KINDS)
def test_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    scenario = BASE.replace(action=kind)
    model = agent(scenario)
    save_for_export(model, normalizer(model), scenario, tmp_path / "model.zip")
    bundle = run_export(tmp_path / "model.zip", tmp_path / "bundle", onnx=True)
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert sorted(path.name for path in bundle.iterdir()) == sorted([MANIFEST, *manifest["files"]])
    session = onnxruntime.InferenceSession((bundle / ONNX).read_bytes())
    raw = observations(scenario)
    for rows in (1, 2, len(raw)):
        (actual,) = session.run(["moves"], {"observations": raw[:rows]})
        assert actual.dtype == np.float32
        assert np.abs(actual - moves(model, scenario, raw[:rows])).max() <= (1e-6 if kind == "box" else 0)


# --- recurrent --------------------------------------------------------------------------------------------------


def starts(decisions: int, runs: int) -> np.ndarray:
    """(decisions, runs) bool: where a new run begins; runs are of 1 to some 80 decisions."""
    begun = np.random.default_rng(2).random((decisions, runs)) < 0.04
    begun[0] = True
    return begun


def played_by_sb3(model: RecurrentPPO, raw: np.ndarray, begun: np.ndarray) -> np.ndarray:
    state, moves = None, []
    for row, start in zip(raw, begun, strict=True):
        normalised = normalizer(model).normalize_obs(row)
        action, state = model.predict(normalised, state=state, episode_start=start, deterministic=True)
        moves.append(action)
    return np.stack(moves)


def played(policy: LearnedPolicy, raw: np.ndarray, begun: np.ndarray) -> np.ndarray:
    state, moves = policy.init(raw.shape[1]), []
    for row, start in zip(raw, begun, strict=True):
        for value in state.values():
            value[start] = 0
        action, state = policy.act(row, state)
        moves.append(action)
    return np.stack(moves)


def played_by_onnx(content: bytes, raw: np.ndarray, begun: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(content)
    names = [entry.name for entry in session.get_inputs()][1:]
    assert [entry.name for entry in session.get_outputs()] == ["moves", *(f"next_{name}" for name in names)]
    units = [entry.shape[1] for entry in session.get_inputs()][1:]
    state = {name: np.zeros((raw.shape[1], size), np.float32) for name, size in zip(names, units, strict=True)}
    moves = []
    for row, start in zip(raw, begun, strict=True):
        for value in state.values():
            value[start] = 0
        action, *following = session.run(None, {"observations": row, **state})
        state = dict(zip(names, following, strict=True))
        moves.append(action)
    return np.stack(moves)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_of_a_recurrent_agent(kind: str, layers: int, tmp_path: Path) -> None:
    """10,000 observations in sequences with resets: Stable-Baselines3, the bundle's runtime and ONNX Runtime agree."""
    pytest.importorskip("onnxscript")
    scenario = BASE.replace(action=kind)
    model = recurrent(scenario, layers)
    save_for_export(model, normalizer(model), scenario, tmp_path / "model.zip")
    bundle = run_export(tmp_path / "model.zip", tmp_path / "bundle", onnx=True)
    policy = load_bundle(bundle)
    assert policy.name == "small-recurrent-ppo"
    assert [layer.units for layer in policy.lstm] == [24] * layers
    raw, begun = observations(scenario).reshape(500, 20, -1), starts(500, 20)
    wanted = played_by_sb3(model, raw, begun) - (kind == "multi-discrete")
    for actual in (played(policy, raw, begun), played_by_onnx((bundle / ONNX).read_bytes(), raw, begun)):
        assert actual.dtype == np.float32
        assert np.abs(actual - wanted).max() <= (1e-6 if kind == "box" else 0)
    amnesic = played(policy, raw, np.ones_like(begun))
    assert (np.abs(amnesic - wanted).max(-1) > 1e-3).mean() > (0.5 if kind == "box" else 0.2)  # the state matters
    if kind == "box":
        assert 0.01 < (np.abs(wanted) == 1).mean() < 0.5
    else:
        assert set(np.unique(wanted)) == {-1, 0, 1}


@pytest.mark.parametrize("lstm", [{"bias": False}, {"proj_size": 6}], ids=str)
def test_an_lstm_that_is_not_plain(lstm: dict[str, Any]) -> None:
    model = recurrent(BASE)
    state = dict(model.policy.state_dict())
    theirs = nn.LSTM(len(BASE.signals), 24, **lstm)
    state = {name: value for name, value in state.items() if not name.startswith("lstm_actor.")}
    state |= {f"lstm_actor.{name}": value for name, value in theirs.state_dict().items()}
    with pytest.raises(UserError, match="the agent's LSTM is not a plain one; only those with biases"):
        learned_policy(state, observation_statistics(normalizer(model)), BASE, activation="tanh", provenance={})


@pytest.mark.parametrize("module", ["onnx", "onnxscript"])
def test_onnx_without_the_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    pytest.importorskip(module)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"^{module} is not installed; run: pip install 'trimtab\[onnx\]'"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle", onnx=True)
    assert not (tmp_path / "bundle").exists()


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_no_pickle_is_read(tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    model.bomb = Bomb(tmp_path / "mark")
    model.save(tmp_path / "model.zip")
    with (tmp_path / "vecnormalize.pkl").open("wb") as file:
        pickle.dump(Bomb(tmp_path / "mark"), file)
    run_export(tmp_path / "model.zip", tmp_path / "bundle")
    assert not (tmp_path / "mark").exists()
    (tmp_path / "model.json").unlink()
    with pytest.raises(UserError, match=r"write 'model.json' beside it with .*save_for_export"):
        run_export(tmp_path / "model.zip", tmp_path / "other")
    assert not (tmp_path / "mark").exists()


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"no archive")
    (tmp_path / "text").write_text("text")
    for name, message in (
        ("nowhere", "does not exist; give the --out folder"),
        ("text", "is no agent; give the --out folder"),
        ("empty", "holds no config.yaml"),
        ("a.zip", "save_for_export"),
    ):
        with pytest.raises(UserError, match=message):
            run_export(tmp_path / name, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_damaged_zip_and_companion(tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    companion = tmp_path / "model.json"
    good = companion.read_text()
    for text in ("{", "[]", "{}", good.replace("statistics-1", "statistics-2"), good.replace('"mean"', '"moan"')):
        companion.write_text(text)
        with pytest.raises(ConfigError):
            run_export(tmp_path / "model.zip", tmp_path / "bundle")
    companion.write_text(good)
    (tmp_path / "model.zip").write_bytes((tmp_path / "model.zip").read_bytes()[:2000])
    with pytest.raises(UserError, match="not the .zip of an agent, or is damaged"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")


def broken_companion(good: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**good, **changes}).encode()


def deep(levels: int) -> Any:
    return [deep(levels - 1)] if levels else []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": ["x"] * 9}, "is of format .'x'"),
        ({"activation": "sine"}, "activation is 'sine'; it must be one of tanh, relu"),
        ({"activation": ["tanh"]}, "activation is .'tanh'."),
        ({"scenario": "digits-mlp"}, "scenario is no mapping"),
        ({"scenario": {"id": 3}}, "scenario: id is 3"),
        ({"statistics": []}, "statistics is no mapping"),
        ({"statistics": {"mean": "x"}}, "not made of numbers"),
        ({"statistics": {"mean": [10**400]}}, "not made of numbers"),
        ({"statistics": {"mean": [1.0]}}, "'mean' must be .* finite numbers"),
        ({"provenance": None}, "provenance is no mapping"),
        ({"more": deep(500)}, "at most 8 levels"),
        ({"more": [0] * 5000}, "at most 1024 are allowed"),
        ({"more": math.nan}, "NaN is not allowed"),
        ({"more": "x" * (1 << 20)}, "larger than the 1,048,576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_companions_that_are_none(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    good = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_bytes(broken_companion(good, **change))
    with pytest.raises(ConfigError, match=words) as caught:
        run_export(tmp_path / "model.zip", tmp_path / "bundle")
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b"[" * 10**5, "not strict JSON"),
        (b"\xff", "not strict JSON"),
    ],
)
def test_companions_that_are_no_strict_json(text: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(b"never looked at")
    (tmp_path / "model.json").write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")


def test_what_is_no_regular_file_is_not_exported(tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    good = (tmp_path / "model.json").read_bytes()
    (tmp_path / "model.json").unlink()
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(ConfigError, match="it is not a regular file"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").write_bytes(good)
    (tmp_path / "model.zip").unlink()
    os.mkfifo(tmp_path / "model.zip")
    with pytest.raises(UserError, match="is no agent"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    with zipfile.ZipFile(tmp_path / "model.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.pth", bytes(1 << 22))
    small = (tmp_path / "model.zip").stat().st_size + (1 << 20)
    monkeypatch.setattr(agent_files, "MOST_ZIP", small)
    with pytest.raises(UserError, match="is not the .zip of an agent, .* unpacks to more than"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")
    monkeypatch.setattr(agent_files, "MOST_ZIP", 1000)
    with pytest.raises(UserError, match="larger than the 1,000 bytes"):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ([1, 2], "not made of named tensors"),
        ({"action_net.weight": 3}, "not made of named tensors"),
        ({"action_net.weight": torch.zeros(2, 2, dtype=torch.int64)}, "not made of named tensors of floats"),
        ({"action_net.weight": torch.zeros(2, 2).to_sparse()}, "not made of named tensors of floats"),
        ({"action_net.weight": torch.zeros(()), "action_net.bias": torch.zeros(())}, "cannot|can be exported"),
        ({"other": torch.zeros(2)}, "not an actor-critic with an MLP"),
    ],
    ids=str,
)
def test_archives_of_something_else(policy: Any, words: str, tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    held = io.BytesIO()
    torch.save(policy, held)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("policy.pth", held.getvalue())
    with pytest.raises(UserError, match=words):
        run_export(tmp_path / "model.zip", tmp_path / "bundle")


def test_bundle_as_source(tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    bundle = run_export(tmp_path / "model.zip", tmp_path / "bundle")
    again = run_export(bundle, tmp_path / "again")
    assert (again / MANIFEST).read_bytes() == (bundle / MANIFEST).read_bytes()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = agent(BASE)
    save_for_export(model, normalizer(model), BASE, tmp_path / "model.zip")
    bundle = run_export(tmp_path / "model.zip", tmp_path / "bundle")
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(OutputExistsError):
        run_export(tmp_path / "model.zip", bundle)
    assert (bundle / MANIFEST).read_bytes() == before


def test_agents_that_do_not_fit() -> None:
    model = agent(BASE)
    with pytest.raises(MismatchError, match="signals to 4 outputs; scenario 'small' has"):
        learned_policy_from_sb3(model, normalizer(model), BASE.replace(signals=("progress",)), {})
    with pytest.raises(UserError, match="activation ELU cannot be exported; use nn.Tanh or nn.ReLU"):
        learned_policy_from_sb3(agent(BASE, nn.ELU), normalizer(model), BASE, {})
