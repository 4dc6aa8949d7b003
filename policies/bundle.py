"""Bundles: a learned policy as a folder with ``policy.json`` and ``weights.safetensors``. No pickle anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UserError
from trimtab.policies.bundle_files import check_target, write_folder
from trimtab.policies.bundle_reading import read_bundle, replay, sha256
from trimtab.policies.manifest import GOLDEN, MANIFEST, ONNX, WEIGHTS, seal, validate
from trimtab.policies.network import LearnedPolicy
from trimtab.policies.policy import Policy
from trimtab.policies.tensors import write_tensors
from trimtab.printing import printable

# --- saving -----------------------------------------------------------------------------------------------------


def save_policy(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Saves a learned policy as a bundle.

    Args:
        policy: a learned policy; a rule is not saved, but loaded again by its name and options.
        path: a folder that does not exist yet, or is empty.

    Raises:
        UserError: for a rule.
        OutputExistsError: when something is there already.
    """
    if not isinstance(policy, LearnedPolicy):
        name = getattr(policy, "name", type(policy).__name__)
        raise UserError(f"policy {name!r} is not a learned policy; a rule is not saved, load it by its name instead")
    save_bundle(policy, path)


def save_bundle(
    policy: LearnedPolicy, path: str | os.PathLike[str], *, overwrite: bool = False, onnx: bytes | None = None
) -> Path:
    """Writes a bundle: all of it or nothing, through a temporary folder beside it.

    Args:
        policy: the learned policy.
        path: the folder; its parents are made.
        overwrite: replace a bundle that is there already; anything else is never replaced.
        onnx: content of ``policy.onnx``; None for no such file.

    Returns:
        The path.

    Raises:
        OutputExistsError: when the path holds something already.
        BundleError: when a field of the manifest, such as the provenance, is not valid, or a file is too large.
    """
    target = Path(path).resolve()
    check_target(target, overwrite)
    files = {WEIGHTS: write_tensors(_tensors(policy))}
    if onnx is not None:
        files[ONNX] = onnx
    files[MANIFEST] = _manifest_bytes(policy, {name: sha256(content) for name, content in files.items()})
    write_folder(target, files)
    return Path(path)


def _tensors(policy: LearnedPolicy) -> dict[str, np.ndarray]:
    gates = {
        f"lstm.{number}.{part}": getattr(layer, part)
        for number, layer in enumerate(policy.lstm)
        for part in ("input_weight", "state_weight", "bias")
    }
    return gates | {
        f"layers.{number}.{part}": array
        for number, layer in enumerate(policy.layers)
        for part, array in zip(("weight", "bias"), layer, strict=True)
    }


def _golden_observations(policy: LearnedPolicy) -> np.ndarray:
    """(8, S) float32: the corners of the training ranges first, then draws inside them."""
    draws = np.random.Generator(np.random.Philox(key=[0, len(policy.signals)]))
    rows = draws.uniform(policy.obs_low, policy.obs_high, (GOLDEN, len(policy.signals)))
    rows[0], rows[1] = policy.obs_low, policy.obs_high
    return rows.astype(np.float32)


def _manifest_bytes(policy: LearnedPolicy, hashes: Mapping[str, str]) -> bytes:
    observations = _golden_observations(policy)
    actions, state = replay(policy, observations)
    golden = {"observations": observations.tolist(), "actions": actions.tolist()}
    network = {"activation": policy.activation, "sizes": policy.sizes}
    recurrent: dict[str, Any] | list[Any] = []
    if policy.lstm:
        golden["state"] = {name: value[0].tolist() for name, value in state.items()}
        network["lstm"] = [layer.units for layer in policy.lstm]
        recurrent = {name: list(value.shape[1:]) for name, value in state.items()}
    content = {
        "format_version": 2 if policy.lstm else 1,
        "name": policy.name,
        "signals": list(policy.signals),
        "normalisation": {
            "mean": policy.obs_mean.tolist(),
            "var": policy.obs_var.tolist(),
            "clip": float(policy.obs_clip),
            "eps": float(policy.obs_eps),
        },
        "levers": [
            {"name": name, "kind": kind, **{key: float(value) for key, value in vars(policy.limits[name]).items()}}
            for name, kind in policy.levers.items()
        ],
        "decide_every": policy.decide_every,
        "action_kind": policy.action_kind,
        "network": network,
        "recurrent_state": recurrent,
        "training_ranges": {"low": policy.obs_low.tolist(), "high": policy.obs_high.tolist()},
        "provenance": dict(policy.provenance),
        "results": dict(policy.results),
        "golden": golden,
        "files": dict(hashes),
        "sha256": "0" * 64,
    }
    return seal(validate(content, f"policy {policy.name!r}").model_dump(mode="json"))


# --- loading ----------------------------------------------------------------------------------------------------


def load_bundle(path: str | os.PathLike[str]) -> LearnedPolicy:
    """Reads a bundle, verifies all of it, and replays its golden vectors.

    Args:
        path: the folder.

    Raises:
        BundleError: when it is missing or damaged, or its format is of another version; the message names the field.
        MismatchError: when its signals or levers are not those of this version.
    """
    return read_bundle(Path(path))[0]


# --- describing -------------------------------------------------------------------------------------------------


def describe(path: str | os.PathLike[str]) -> str:
    """What a bundle holds, as plain text, control characters escaped; raises what ``load_bundle`` raises."""
    policy, manifest = read_bundle(Path(path))
    made = manifest.provenance
    widths = "-".join(str(size) for size in policy.sizes)
    if policy.lstm:
        widths = f"{len(policy.signals)}, LSTM {'-'.join(str(units) for units in manifest.lstm)}, then {widths}"
    versions = ", ".join(f"{package} {version}" for package, version in made.versions.items())
    facts = {
        "name": policy.name,
        "format version": str(manifest.format_version),
        "network": f"{widths}, {policy.activation}, {policy.parameters} parameters, {policy.action_kind} actions",
        "decides every": f"{policy.decide_every} optimizer steps",
        "state of a run": ", ".join(f"{name} ({shape[0]},)" for name, shape in manifest.states().items()),
        "trained on": made.scenario,
        "task families": ", ".join(made.families),
        "algorithm": made.algorithm,
        "timesteps": "" if made.timesteps is None else f"{made.timesteps:,}",
        "seed": "" if made.seed is None else str(made.seed),
        "command": made.command,
        "versions": versions,
        **{f"setting {key}": str(value) for key, value in made.settings.items()},
        **{f"result {key}": str(value) for key, value in manifest.results.items()},
        f"sha256 {MANIFEST}": manifest.sha256,
        **{f"sha256 {name}": sha256 for name, sha256 in manifest.files.items()},
    }
    lines = [f"{key:<27} {value}" for key, value in facts.items() if value]
    lines += ["", f"{'lever':<24} {'lowest':>8} {'highest':>8}   largest change of ln(multiplier) per decision"]
    for lever in manifest.levers:
        lines.append(f"{lever.name:<24} {lever.low:>8g} {lever.high:>8g}   {lever.rate:g}")
    lines += ["", f"{'signal':<24} {'lowest':>8} {'highest':>8}   in training"]
    for name, low, high in zip(policy.signals, policy.obs_low, policy.obs_high, strict=True):
        lines.append(f"{name:<24} {low:>8.3f} {high:>8.3f}")
    return "\n".join(map(printable, lines))
