"""A checkpoint brings back what was saved, or says that it cannot; a crash never leaves half of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from stable_baselines3 import PPO

from tests.agents.tiny import TINY
from trimtab.agents.checkpoints import Checkpoint, Score, capture, load_checkpoint, restore, save_checkpoint
from trimtab.agents.normalize import Normalizer
from trimtab.envs.sb3_vec_env import make_vec
from trimtab.errors import MismatchError, UserError

SCORE = Score(steps=48, final_loss=-0.1 - 1e-17, mean_return=1.5, diverged=0.125, height=-0.1)


def learner(seed: int = 0, width: int = 6) -> tuple[PPO, Normalizer]:
    env = Normalizer(make_vec(TINY, 3, mode="eager"), gamma=1.0, epsilon=1e-3)
    arch = {"net_arch": {"pi": [width], "vf": [width]}}
    return PPO("MlpPolicy", env, n_steps=8, batch_size=24, n_epochs=2, device="cpu", seed=seed, policy_kwargs=arch), env


@pytest.fixture(scope="module")
def trained() -> tuple[PPO, Normalizer]:
    model, env = learner()
    model.learn(48)
    return model, env


@pytest.fixture(scope="module")
def checkpoint(trained: tuple[PPO, Normalizer]) -> Checkpoint:
    return capture(*trained, evaluated=24, best=SCORE)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys()
    tensors &= all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())
    return tensors and replace(one, tensors={}) == replace(other, tensors={})


def test_round_trip_is_exact(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(checkpoint, tmp_path / "deep" / "a.safetensors")
    assert same(load_checkpoint(tmp_path / "deep" / "a.safetensors"), checkpoint)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_restored_learner_is_the_saved_one(
    trained: tuple[PPO, Normalizer], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(checkpoint, tmp_path / "a.safetensors")
    model, env = learner(seed=5)
    assert not same(capture(model, env, evaluated=24, best=SCORE), checkpoint)
    restore(load_checkpoint(tmp_path / "a.safetensors"), model, env)
    assert same(capture(model, env, evaluated=24, best=SCORE), checkpoint)
    assert model.num_timesteps == 48
    raw = np.random.default_rng(0).uniform(-1, 1, (50, len(TINY.signals))).astype(np.float32)
    wanted = trained[0].predict(trained[1].normalize_obs(raw), deterministic=True)[0]
    assert (model.predict(env.normalize_obs(raw), deterministic=True)[0] == wanted).all()
    rewards = np.linspace(-3, 3, 7)
    assert (env.normalize_reward(rewards) == trained[1].normalize_reward(rewards)).all()


def test_restored_learner_makes_the_same_update(checkpoint: Checkpoint) -> None:
    """The optimizer's moments and step count are part of the state: equal gradients give equal parameters."""

    def updated(seed: int) -> list[torch.Tensor]:
        model, env = learner(seed)
        restore(checkpoint, model, env)
        for index, parameter in enumerate(model.policy.parameters()):
            parameter.grad = torch.full_like(parameter, 0.01 * (index + 1))
        model.policy.optimizer.step()
        return [parameter.detach() for parameter in model.policy.parameters()]

    first, second = updated(0), updated(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    bare, _ = learner()
    bare.policy.load_state_dict(checkpoint.policy())
    for index, parameter in enumerate(bare.policy.parameters()):
        parameter.grad = torch.full_like(parameter, 0.01 * (index + 1))
    bare.policy.optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(first, bare.policy.parameters(), strict=True))


def test_capture_is_a_copy(checkpoint: Checkpoint) -> None:
    model, env = learner()
    kept = capture(model, env)
    before = {name: value.clone() for name, value in kept.tensors.items()}
    model.learn(24)
    assert all(torch.equal(value, before[name]) for name, value in kept.tensors.items())
    assert kept.best is None and kept.evaluated == 0


def test_other_shapes_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(MismatchError, match="networks differ from the preset's"):
        restore(checkpoint, *learner(width=7))
    model, _ = learner()
    narrow = Normalizer(make_vec(TINY.replace(signals=TINY.signals[:4]), 3, mode="eager"))
    with pytest.raises(MismatchError, match=f"of {len(TINY.signals)} signals; the scenario has 4"):
        restore(checkpoint, model, narrow)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no checkpoint at"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_every_change_is_noticed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, path)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for place in [0, 5, 9, len(good) // 2, len(good) - 1, *rng.integers(len(good), size=60).tolist()]:
        changed = bytearray(good)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert same(load_checkpoint(path), checkpoint)  # a changed space between entries is no damage
        except UserError as error:
            assert "damaged or of an unknown format" in str(error)
    for size in (0, 7, 100, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(UserError, match="damaged or of an unknown format"):
            load_checkpoint(path)


def test_other_contents_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(checkpoint, path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    state = json.loads(header["state"])
    for changed in (
        {},
        {**header, "format": "trimtab-checkpoint-3"},
        {**header, "state": json.dumps({**state, "steps": 99})},
        {name: value for name, value in header.items() if name != "sha256"},
    ):
        save_file(dict(checkpoint.tensors), path, metadata=changed)
        with pytest.raises(UserError, match="damaged or of an unknown format"):
            load_checkpoint(path)


KILLED = """
import os, sys, threading, time
import torch
from pathlib import Path
from trimtab.agents.checkpoints import Checkpoint, save_checkpoint
path = Path(sys.argv[1])
steps = 0
save_checkpoint(Checkpoint(tensors={"policy/a": torch.zeros(1)}, steps=0, updates=0, normalizer={}), path)
print("ready", flush=True)
while True:
    steps += 1
    filled = {"policy/a": torch.full((200_000,), float(steps))}
    save_checkpoint(Checkpoint(tensors=filled, steps=steps, updates=0, normalizer={}), path)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(float(rng.uniform(0.02, 0.2)))
            process.kill()
        kept = load_checkpoint(path)
        assert (kept.tensors["policy/a"] == kept.steps).all()
