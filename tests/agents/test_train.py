"""Training end to end on a scenario that takes no time: what it writes, logs, resumes, selects and refuses."""

from __future__ import annotations

import io
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from stable_baselines3 import PPO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.agents.tiny import TINY, TWO
from trimtab.agents.checkpoints import Score, load_checkpoint
from trimtab.agents.export import run_export
from trimtab.agents.presets import PRESETS, PPOPreset, RecurrentPPOPreset, describe
from trimtab.agents.selection import FIRST_SEED, Selection
from trimtab.agents.train import Learner, run_train, stream_seed
from trimtab.agents.training_folder import TrainingConfig, TrainingFolder, read_config
from trimtab.envs.sb3_vec_env import make_vec
from trimtab.errors import (
    MismatchError,
    MissingExtraError,
    OutputExistsError,
    RangeError,
    UnknownNameError,
    UserError,
)
from trimtab.policies.bundle import load_bundle
from trimtab.policies.registry import load_policy

SMALL = replace(PRESETS["ppo"], policy_layers=(8,), value_layers=(8,), n_steps=8, batch_size=16, n_epochs=2)
SMALL_RECURRENT = replace(PRESETS["recurrent-ppo"], lstm_units=6, policy_layers=(8,), value_layers=(8,), n_steps=8,
                          batch_size=16, n_epochs=2)  # fmt: skip
ENVS = 3
ROLLOUT = SMALL.n_steps * ENVS
DOCS = Path(__file__).parents[2] / "docs" / "training.md"


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Replaces the preset by one that learns in no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "ppo", SMALL)
        patch.setitem(PRESETS, "recurrent-ppo", SMALL_RECURRENT)
        yield


def files_of(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


def learn(out: Path, rollouts: int = 4, **changes: Any) -> Path:
    options = {"timesteps": rollouts * ROLLOUT, "seed": 3, "num_envs": ENVS, "mode": "eager", **changes}
    return run_train(options.pop("scenario", TINY), out=out, **options)


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Scalars of all event files: tag to (step, value)."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "out"
    assert learn(folder) == folder / "policy"
    return folder


def test_what_is_written(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == ["checkpoints", "config.yaml", "policy", "tensorboard"]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "best.safetensors",
        "latest.safetensors",
    ]
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["command"].startswith("trimtab train tiny --algo ppo --timesteps 96 --num-envs 3 --seed 3")
    assert config["scenario"] == TINY.model_dump(mode="json")
    assert config["preset"] == SMALL.to_dict()
    assert {"python", "torch", "trimtab", "stable-baselines3"} <= set(config["versions"])
    assert read_config(TrainingFolder(root=finished)).preset == SMALL


def test_bundle_is_the_best_checkpoint(finished: Path, tmp_path: Path) -> None:
    best = load_checkpoint(finished / "checkpoints" / "best.safetensors")
    policy = load_bundle(finished / "policy")
    assert best.best is not None
    assert (policy.layers[0][0] == best.tensors["policy/mlp_extractor.policy_net.0.weight"].numpy()).all()
    assert (policy.layers[-1][1] == best.tensors["policy/action_net.bias"].numpy()).all()
    assert policy.obs_mean.tolist() == best.normalizer["mean"]
    assert policy.provenance["scenario"] == "tiny"
    assert policy.provenance["timesteps"] == 4 * ROLLOUT
    assert policy.provenance["settings"]["selected_at"] == best.steps
    assert policy.results["selection_final_loss"] == best.best.final_loss
    scores = logged(finished)["evaluation/final_loss"]
    assert best.best.final_loss == pytest.approx(min(value for _, value in scores))
    exported = run_export(finished, tmp_path / "bundle")
    assert (exported / "policy.json").read_bytes() == (finished / "policy" / "policy.json").read_bytes()


def test_the_score_of_the_bundle_is_the_logged_one(finished: Path) -> None:
    score = Selection(TINY, ENVS, mode="eager").score(load_policy(str(finished / "policy")), 0)
    best = load_checkpoint(finished / "checkpoints" / "best.safetensors").best
    assert best is not None
    assert score.final_loss == pytest.approx(best.final_loss, abs=1e-6)


def test_everything_logged_is_documented(finished: Path) -> None:
    documented = set(re.findall(r"^\| `([a-z_]+/[a-z_<>0-9]+)`", DOCS.read_text(), flags=re.MULTILINE))
    seen = set()
    for tag in logged(finished):
        tag = re.sub(r"^levers/(lr|momentum)_", "levers/<lever>_", tag)
        seen.add(re.sub(r"^reward/(?!total).*", "reward/<term>", tag))
    assert seen == documented


def test_presets_are_documented() -> None:
    text = DOCS.read_text()
    for name, value, reason in describe(PPOPreset()):
        assert f"| `{name}` | {value} | {reason} |" in text
    assert len(describe(PPOPreset())) == len(fields(PPOPreset))
    rows = describe(RecurrentPPOPreset())
    assert len(rows) == len(describe(PPOPreset())) + 2
    for name, value, reason in rows[-2:]:
        assert f"| `{name}` | {value} | {reason} |" in text


def test_what_is_logged(finished: Path) -> None:
    tags = logged(finished)
    for tag, values in tags.items():
        assert np.isfinite([value for _, value in values]).all(), tag
        steps = [step for step, _ in values]
        assert steps == sorted(set(steps)), tag
    assert [step for step, _ in tags["evaluation/final_loss"]] == [2 * ROLLOUT, 3 * ROLLOUT, 4 * ROLLOUT]
    assert [step for step, _ in tags["train/loss"]] == [ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT, 4 * ROLLOUT]
    assert [step for step, _ in tags["reward/total"]] == [ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT, 4 * ROLLOUT]
    parts = [tags[tag] for tag in tags if tag.startswith("reward/") and tag != "reward/total"]
    summed = np.sum([[value for _, value in part] for part in parts], axis=0)
    assert summed == pytest.approx([value for _, value in tags["reward/total"]], abs=1e-5)
    quantiles = [np.array(tags[f"levers/lr_q{share}"])[:, 1] for share in (10, 50, 90)]
    assert (quantiles[0] <= quantiles[1]).all() and (quantiles[1] < quantiles[2]).all()
    per_step = np.array(tags["speed/run_steps_per_second"]) / np.array(tags["speed/env_steps_per_second"])
    assert per_step[:, 1] == pytest.approx(TINY.interval, rel=1e-4)
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    table = events.PluginTagToContent("hparams")
    assert b"n_epochs" in table["_hparams_/session_start_info"]
    assert b"evaluation/final_loss" in table["_hparams_/experiment"]


def config(**changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {"algo": "ppo", "seed": 0, "timesteps": ROLLOUT, "num_envs": ENVS, "source": "tiny"}
    return TrainingConfig(**{**values, "scenario": TINY, "preset": SMALL, "device": "cpu", "mode": "eager", **changes})


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_reward_statistics_against_the_rollout(tmp_path: Path) -> None:
    learner = Learner(config())
    learner.normalizer.norm_reward = False
    learner.learn(TrainingFolder(root=tmp_path), quiet())
    rewards = learner.model.rollout_buffer.rewards
    assert logged(tmp_path)["reward/total"][-1] == (ROLLOUT, pytest.approx(float(rewards.mean()), abs=1e-5))


def test_same_seed_same_policy_and_no_trace(finished: Path, tmp_path: Path) -> None:
    torch.rand(3), np.random.rand(3), random.random()
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    learn(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]
    assert random.getstate() == states[2]
    name = "weights.safetensors"
    assert (tmp_path / "again" / "policy" / name).read_bytes() == (finished / "policy" / name).read_bytes()
    last = [load_checkpoint(folder / "checkpoints" / "latest.safetensors") for folder in (finished, tmp_path / "again")]
    assert all(torch.equal(value, last[1].tensors[key]) for key, value in last[0].tensors.items())


@pytest.mark.parametrize("kind", ["box", "multi-discrete"])
def test_other_kinds_of_scenario(kind: str, tmp_path: Path) -> None:
    folder = learn(tmp_path / "out", 1, scenario=TWO.replace(action=kind), timesteps=1)
    assert load_bundle(folder).action_kind == kind


@pytest.mark.parametrize("kind", ["box", "multi-discrete"])
def test_a_recurrent_training(kind: str, tmp_path: Path) -> None:
    """It learns, selects, exports and resumes as PPO does, and is the same for the same seed."""
    scenario = TINY.replace(action=kind)
    folders = [learn(tmp_path / name, scenario=scenario, algo="recurrent-ppo") for name in ("one", "two")]
    assert files_of(folders[0]) == files_of(folders[1])
    policy = load_bundle(folders[0])
    assert ([layer.units for layer in policy.lstm], policy.action_kind) == ([6], kind)
    assert policy.name == "tiny-recurrent-ppo"
    assert policy.provenance["settings"]["lstm_units"] == 6
    assert policy.provenance["versions"]["sb3-contrib"] == version("sb3-contrib")
    training = TrainingFolder(root=tmp_path / "one")
    assert read_config(training).preset == SMALL_RECURRENT
    first, best = load_checkpoint(training.latest), load_checkpoint(training.best)
    assert (policy.lstm[0].input_weight == best.tensors["policy/lstm_actor.weight_ih_l0"].numpy()).all()
    assert best.best is not None
    assert Selection(scenario, ENVS, mode="eager").score(policy, 0).final_loss == pytest.approx(best.best.final_loss)
    learn(tmp_path / "one", 6, scenario=scenario, algo="recurrent-ppo", resume=True)
    last = load_checkpoint(training.latest)
    assert (first.steps, last.steps) == (4 * ROLLOUT, 6 * ROLLOUT)
    name = "policy/lstm_actor.weight_hh_l0"
    assert not torch.equal(first.tensors[name], last.tensors[name])
    optimized = [key for key in last.tensors if key.startswith("optimizer/") and key.endswith("/step")]
    parameters = [key for key in last.tensors if key.startswith("policy/")]
    assert len(optimized) == len(parameters)  # the LSTM's moments are saved too
    assert max(last.tensors[key] for key in optimized) > max(first.tensors[key] for key in optimized)
    with pytest.raises(MismatchError, match="has algo 'recurrent-ppo', not 'ppo'"):
        learn(tmp_path / "one", 8, scenario=scenario, resume=True)


class Counting:
    """A policy whose state counts its decisions; it moves nothing."""

    name, signals, decide_every = "counting", TINY.signals, None
    levers = dict.fromkeys(TINY.levers, "moves")

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def init(self, num_runs: int) -> dict[str, Any]:
        return {"count": np.zeros(num_runs, dtype=np.int64)}

    def act(self, observations: np.ndarray, state: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        self.seen.append(state["count"].copy())
        return np.zeros((len(observations), len(self.levers))), {"count": state["count"] + 1}


def test_selection_keeps_the_state_of_a_run_and_begins_the_next_one_afresh() -> None:
    selection, policy = Selection(TINY, ENVS, mode="eager"), Counting()
    selection.score(policy, 0)
    seen = np.stack(policy.seen)
    for column in seen.T:
        assert column[0] == 0
        assert (np.diff(column)[column[1:] != 0] == 1).all()
        assert (column == 0).sum() == 2  # two instances, one after the other


def test_recurrent_learning_without_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(
        MissingExtraError, match=r"sb3_contrib is not installed; run: pip install 'trimtab\[recurrent\]'"
    ):
        learn(tmp_path / "out", algo="recurrent-ppo")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"lstm_units": 0}, {"lstm_layers": 5}], ids=str)
def test_recurrent_presets_out_of_range(changes: dict[str, int]) -> None:
    with pytest.raises(RangeError, match=f"{next(iter(changes))} is .*; it must be between 1 and"):
        replace(SMALL_RECURRENT, **changes)


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder trained for 4 rollouts and resumed to 8, with the last checkpoints of both."""
    folder = tmp_path_factory.mktemp("resumed") / "out"
    learn(folder, 4)
    first = load_checkpoint(folder / "checkpoints" / "latest.safetensors")
    learn(folder, 8, resume=True)
    return folder, first, load_checkpoint(folder / "checkpoints" / "latest.safetensors")


def test_resume_goes_on(resumed: tuple[Path, Any, Any]) -> None:
    folder, first, last = resumed
    assert (first.steps, last.steps) == (4 * ROLLOUT, 8 * ROLLOUT)
    assert last.updates == 2 * first.updates
    names = [name for name in first.tensors if name.startswith("policy/mlp")]
    assert not any(torch.equal(first.tensors[name], last.tensors[name]) for name in names)
    assert last.tensors["optimizer/0/step"] > first.tensors["optimizer/0/step"]
    assert last.normalizer["count"] > first.normalizer["count"]
    assert last.best.final_loss <= first.best.final_loss
    assert yaml.safe_load((folder / "config.yaml").read_text())["timesteps"] == 8 * ROLLOUT


def test_step_axis_continues(resumed: tuple[Path, Any, Any]) -> None:
    tags = logged(resumed[0])
    assert [step for step, _ in tags["train/loss"]] == [count * ROLLOUT for count in range(1, 9)]
    steps = [step for step, _ in tags["evaluation/final_loss"]]
    assert steps == [count * ROLLOUT for count in (2, 3, 4, 6, 8)]
    rates = [value for _, value in tags["train/learning_rate"]]
    assert rates[-1] == pytest.approx(SMALL.final_learning_rate)


def test_resuming_a_finished_training_changes_nothing(resumed: tuple[Path, Any, Any]) -> None:
    folder, _, last = resumed
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("\n  doc: ", "\n  doc: in other words, "))
    assert "in other words" in config.read_text()
    before = (folder / "policy" / "policy.json").read_bytes()
    learn(folder, 8, resume=True)
    again = load_checkpoint(folder / "checkpoints" / "latest.safetensors")
    assert all(torch.equal(value, last.tensors[name]) for name, value in again.tensors.items())
    assert (folder / "policy" / "policy.json").read_bytes() == before


def test_a_training_is_not_shortened_afterwards(resumed: tuple[Path, Any, Any]) -> None:
    config = (resumed[0] / "config.yaml").read_bytes()
    with pytest.raises(RangeError, match=f"timesteps is {ROLLOUT}; it must be at least {8 * ROLLOUT}"):
        learn(resumed[0], 1, resume=True)
    assert (resumed[0] / "config.yaml").read_bytes() == config


def test_best_evaluation_is_kept(tmp_path: Path) -> None:
    """A resumed training that only gets worse leaves the best checkpoint as it is."""
    learn(tmp_path / "out", 4)
    best = tmp_path / "out" / "checkpoints" / "best.safetensors"
    before = best.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        worse = Score(steps=0, final_loss=9.0, mean_return=-9.0, diverged=0.0, height=9.0)
        patch.setattr(Selection, "score", lambda self, policy, steps: replace(worse, steps=steps))
        learn(tmp_path / "out", 5, resume=True)
    assert best.read_bytes() == before
    assert logged(tmp_path / "out")["evaluation/final_loss"][-1] == (5 * ROLLOUT, 9.0)


def test_interrupted_training_goes_on_from_its_last_rollout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was logged after the last checkpoint is dropped, so that no step is there twice."""
    calls = 0

    def interrupted(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        original(self)

    original = PPO.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPO, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            learn(tmp_path / "out")
    assert "go on with --resume" in " ".join(capsys.readouterr().err.split())
    assert load_checkpoint(tmp_path / "out" / "checkpoints" / "latest.safetensors").steps == 2 * ROLLOUT
    assert not (tmp_path / "out" / "policy").exists()
    learn(tmp_path / "out", resume=True)
    tags = logged(tmp_path / "out")
    for tag in ("reward/total", "train/loss"):
        assert [step for step, _ in tags[tag]] == [ROLLOUT, 2 * ROLLOUT, 3 * ROLLOUT, 4 * ROLLOUT]


def test_resumed_episodes_are_new() -> None:
    def seeds(steps: int) -> set[int]:
        env = make_vec(TINY, ENVS, mode="eager")
        env.seed(stream_seed(3, steps))
        env.reset()
        seen: set[int] = set()
        for _ in range(40):
            seen |= set(env.episodes.seeds.tolist())
            env.step(np.zeros((ENVS, len(TINY.levers))))
        return seen

    first, second = seeds(0), seeds(2 * ROLLOUT)
    assert len(first) > 10 and len(second) > 10
    assert not first & second
    assert max(first | second) < FIRST_SEED


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"algo": "ppoo"}, UnknownNameError, "unknown algorithm 'ppoo'; did you mean 'ppo'"),
        ({"scenario": "digits-mpl"}, UnknownNameError, "unknown scenario 'digits-mpl'; did you mean 'digits-mlp'"),
        ({"timesteps": 0}, RangeError, "timesteps is 0; it must be at least 1"),
        ({"num_envs": 0}, RangeError, "num_envs is 0; it must be at least 1"),
        ({"seed": -1}, RangeError, "seed is -1; it must be at least 0"),
        ({"scenario": TWO, "num_envs": 1}, RangeError, "num_envs is 1; it must be at least 2"),
        (
            {"resume": True},
            UserError,
            "there is no checkpoint at .*; train without --resume, into a new folder",
        ),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        learn(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(OutputExistsError, match="already holds something; give another --out, or add --resume"):
            learn(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "note").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "has seed 3, not 4"),
        ({"num_envs": 4}, "has num_envs 3, not 4"),
        ({"scenario": TINY.replace(interval=4)}, "has scenario interval 5, not 4"),
        ({"scenario": TWO}, "has scenario id 'tiny', not 'tiny-two'"),
    ],
)
def test_another_training_is_not_resumed(changes: dict[str, Any], message: str, finished: Path) -> None:
    before = (finished / "config.yaml").read_bytes()
    with pytest.raises(MismatchError, match=message):
        learn(finished, 8, resume=True, **changes)
    assert (finished / "config.yaml").read_bytes() == before


def test_damaged_configuration(tmp_path: Path) -> None:
    folder = TrainingFolder(root=tmp_path)
    good = config().to_yaml()
    for text, message in (
        ("format: another", "not the configuration of a training of this version"),
        (good.replace("seed: 0\n", ""), "seed is missing"),
        (good.replace("n_epochs:", "n_epoch:"), "unknown setting 'n_epoch'; did you mean 'n_epochs'"),
        (good.replace("interval: 5", "interval: -5"), "scenario: interval"),
    ):
        folder.config.write_text(text)
        with pytest.raises(UserError, match=message):
            read_config(folder)
    folder.config.write_text(good)
    assert read_config(folder) == config()
    with pytest.raises(UserError, match="has not been evaluated yet; go on with train --resume"):
        run_export(tmp_path, tmp_path / "bundle")
