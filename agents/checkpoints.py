"""Checkpoints of a training: one file each, written so that a crash at any moment leaves the old one whole.

A checkpoint is a safetensors file: the tensors of policy and optimizer, and in its header the counters and the
normaliser's statistics as JSON. One file instead of two, so that weights and counters can never be of different
moments; safetensors instead of pickle, so that loading one cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from torch import Tensor

from trimtab.agents.files import write_atomically
from trimtab.agents.normalize import Normalizer
from trimtab.errors import MismatchError, UserError

FORMAT = "trimtab-checkpoint-2"
LATEST, BEST = "latest.safetensors", "best.safetensors"


@dataclass(frozen=True, kw_only=True)
class Score:
    """An evaluation on the selection instances.

    Attributes:
        steps: environment steps of training done before it.
        final_loss: mean over instances of the natural log of the bounded validation loss at the end of a run.
        mean_return: mean undiscounted return of the instances.
        diverged: share of runs that diverged, in [0, 1].
        height: what the best checkpoint has the lowest of (see ``Selection``).
    """

    steps: int
    final_loss: float
    mean_return: float
    diverged: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The learner between two updates.

    Attributes:
        tensors: ``policy/<name>`` and ``optimizer/<index>/<name>``.
        steps: environment steps done.
        updates: passes over rollouts done (``PPO._n_updates``).
        normalizer: ``Normalizer.state_dict()``.
        evaluated: steps at the last evaluation, 0 for none yet.
        best: the best evaluation up to now, None for none yet.
    """

    tensors: Mapping[str, Tensor]
    steps: int
    updates: int
    normalizer: Mapping[str, Any]
    evaluated: int = 0
    best: Score | None = None

    def policy(self) -> dict[str, Tensor]:
        """State dict of the policy alone."""
        return {name.removeprefix("policy/"): t for name, t in self.tensors.items() if name.startswith("policy/")}


def capture(
    model: OnPolicyAlgorithm, normalizer: Normalizer, *, evaluated: int = 0, best: Score | None = None
) -> Checkpoint:
    """Copies the state of a learner."""
    tensors = {f"policy/{name}": value for name, value in model.policy.state_dict().items()}
    for index, slots in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in slots.items()}
    return Checkpoint(
        tensors={name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()},
        steps=model.num_timesteps,
        updates=model._n_updates,
        normalizer=normalizer.state_dict(),
        evaluated=evaluated,
        best=best,
    )


def restore(checkpoint: Checkpoint, model: OnPolicyAlgorithm, normalizer: Normalizer) -> None:
    """Puts a checkpoint into a learner of the same shape.

    Raises:
        MismatchError: when networks or signals differ from those of the checkpoint.
    """
    normalizer.load_state_dict(checkpoint.normalizer)
    try:
        model.policy.load_state_dict(checkpoint.policy())
    except RuntimeError as error:
        raise MismatchError(
            "the checkpoint's networks differ from the preset's; start anew in another folder"
        ) from error
    optimizer = model.policy.optimizer
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in checkpoint.tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            slots.setdefault(int(index), {})[name] = value.clone()  # the optimizer keeps what it is given
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    model.num_timesteps = checkpoint.steps
    model._n_updates = checkpoint.updates


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint; afterwards `path` holds either the old one or the new one, whole."""
    state = {
        "steps": checkpoint.steps,
        "updates": checkpoint.updates,
        "normalizer": checkpoint.normalizer,
        "evaluated": checkpoint.evaluated,
        "best": None if checkpoint.best is None else vars(checkpoint.best),
    }
    text = json.dumps(state)
    header = {"format": FORMAT, "state": text, "sha256": _digest(text, checkpoint.tensors)}
    write_atomically(path, save(dict(checkpoint.tensors), metadata=header))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint.

    Raises:
        UserError: when there is none at ``path``, or it is damaged or of another format.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {str(path)!r}; train without --resume, into a new folder")
    damaged = f"the checkpoint {str(path)!r} is damaged or of an unknown format; start anew in another folder"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT or header["sha256"] != _digest(header["state"], tensors):
            raise UserError(damaged)
        state = json.loads(header["state"])
        best = None if state["best"] is None else Score(**state.pop("best"))
        return Checkpoint(tensors=tensors, **{**state, "best": best})
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(damaged) from error


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of everything in a checkpoint."""
    digest = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()
