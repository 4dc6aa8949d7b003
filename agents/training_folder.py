"""The folder of a training: its names, its ``config.yaml``, and what it records of how a policy was made."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from trimtab.agents.checkpoints import BEST, LATEST, Score
from trimtab.agents.files import versions, write_atomically
from trimtab.agents.presets import PPOPreset, RecurrentPPOPreset, preset
from trimtab.envs.config import read_yaml
from trimtab.envs.scenario import Scenario
from trimtab.errors import ConfigError, MismatchError, OutputExistsError, UserError, out_of_range
from trimtab.inner_training.stepping import Mode

FORMAT = "trimtab-training-1"


@dataclass(frozen=True, kw_only=True)
class TrainingFolder:
    """Where a training keeps what.

    Attributes:
        root: the ``--out`` of ``trimtab train``.
    """

    root: Path

    @property
    def config(self) -> Path:
        """What was trained, how, and with which versions."""
        return self.root / "config.yaml"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.root / "tensorboard"

    @property
    def latest(self) -> Path:
        """Checkpoint of the last rollout."""
        return self.root / "checkpoints" / LATEST

    @property
    def best(self) -> Path:
        """Checkpoint with the best evaluation on the selection instances."""
        return self.root / "checkpoints" / BEST

    @property
    def policy(self) -> Path:
        """The bundle of the best checkpoint."""
        return self.root / "policy"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that defines a training.

    Attributes:
        scenario: what is trained on.
        algo: learning algorithm.
        preset: its settings.
        seed: of everything random, >= 0.
        timesteps: environment steps in all.
        num_envs: runs side by side.
        device, mode: of the inner runs.
        source: the scenario as the user named it, an id or a file.
    """

    scenario: Scenario
    algo: str
    preset: PPOPreset
    seed: int
    timesteps: int
    num_envs: int
    device: str
    mode: Mode
    source: str

    def command(self, out: str = "DIR") -> str:
        """The command that repeats the training."""
        words = ["trimtab", "train", self.source, "--algo", self.algo, "--timesteps", str(self.timesteps)]
        words += ["--num-envs", str(self.num_envs), "--seed", str(self.seed)]
        words += ["--device", self.device, "--mode", self.mode, "--out", out]
        return shlex.join(words)

    def to_yaml(self) -> str:
        """YAML text that ``read_config`` reads back as an equal configuration."""
        content = {
            "format": FORMAT,
            "command": self.command(),
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "preset": self.preset.to_dict(),
            "versions": self._versions(),
            "scenario": self.scenario.model_dump(mode="json"),
        }
        text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)
        return text

    def _versions(self) -> dict[str, str]:
        return versions("sb3-contrib") if isinstance(self.preset, RecurrentPPOPreset) else versions()

    def provenance(self, score: Score) -> dict[str, Any]:
        """How the policy of an evaluated checkpoint was made, for its bundle."""
        settings = {**self.preset.to_dict(), "num_envs": self.num_envs, "selected_at": score.steps}
        return {
            "scenario": self.scenario.id,
            "families": [family.name for family in self.scenario.families],
            "algorithm": self.algo,
            "timesteps": self.timesteps,
            "seed": self.seed,
            "command": self.command(),
            "versions": self._versions(),
            "settings": {name: str(value) if isinstance(value, list) else value for name, value in settings.items()},
        }


def read_config(folder: TrainingFolder) -> TrainingConfig:
    """Reads ``config.yaml``; ``UserError`` when there is none or it is of another format."""
    if not folder.config.is_file():
        raise UserError(f"{str(folder.root)!r} holds no config.yaml; give the --out folder of a training")
    content = read_yaml(folder.config)
    if content.get("format") != FORMAT:
        raise ConfigError(f"{folder.config} is not the configuration of a training of this version ({FORMAT})")
    values: dict[str, Any] = {entry.name: content.get(entry.name) for entry in fields(TrainingConfig)}
    lacking = [name for name, value in values.items() if value is None]
    if lacking:
        raise ConfigError(f"{folder.config}: {lacking[0]} is missing; start anew in another folder")
    kind = type(preset(values["algo"]))
    return TrainingConfig(
        **{
            **values,
            "scenario": Scenario.of(values["scenario"], f"{folder.config}: scenario"),
            "preset": kind.from_dict(values["preset"]),
        }
    )


def write_config(folder: TrainingFolder, config: TrainingConfig) -> None:
    """Writes ``config.yaml``, and the folder with it."""
    write_atomically(folder.config, config.to_yaml().encode())


def check_free(folder: TrainingFolder) -> None:
    """Refuses a path that holds anything (``OutputExistsError``)."""
    root = folder.root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OutputExistsError(f"{str(root)!r} already holds something; give another --out, or add --resume")


def config_to_resume(folder: TrainingFolder, config: TrainingConfig, done: int) -> TrainingConfig:
    """With which settings a training goes on.

    Args:
        folder: of the training.
        config: what was asked for now; scenario, algorithm, seed and num_envs must be those of the training.
        done: environment steps of its last checkpoint.

    Returns:
        The preset that the training began with, and the budget and machine asked for now.

    Raises:
        UserError: when there is no training to resume.
        RangeError: when more steps are done than the budget asked for now.
        MismatchError: when it is a training of something else.
    """
    before = read_config(folder)
    if config.timesteps < min(done, before.timesteps):  # the record of the training would say that it took less
        raise out_of_range("timesteps", config.timesteps, low=min(done, before.timesteps), remedy="so many are done")
    # With other instances to select on, which follow from num_envs, scores would not compare.
    for name in ("algo", "seed", "num_envs"):
        _same(folder, name, getattr(before, name), getattr(config, name))
    was, now = before.scenario.model_dump(mode="json"), config.scenario.model_dump(mode="json")
    for name in was:
        if name != "doc":  # which may say the same in other words
            _same(folder, f"scenario {name}", was[name], now[name])
    return replace(config, preset=before.preset)


def _same(folder: TrainingFolder, name: str, was: object, now: object) -> None:
    if was != now:
        raise MismatchError(
            f"the training in {str(folder.root)!r} has {name} {was!r}, not {now!r}; "
            "resume with the same, or give another --out"
        )
