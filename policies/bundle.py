"""Bundles: a learned policy as a folder with ``policy.json`` and ``weights.safetensors``. No pickle anywhere."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.numpy

from trimtab.errors import BundleError, MismatchError, UserError, unknown
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.signals import all_signals
from trimtab.policies.bundle_files import check_target, read_file, write_folder
from trimtab.policies.manifest import FORMAT_VERSION, GOLDEN, MANIFEST, ONNX, WEIGHTS, Manifest, parse, seal, validate
from trimtab.policies.network import LearnedPolicy, LeverLimits
from trimtab.policies.policy import Kind, Policy

TOLERANCE = 1e-5  # of the golden actions; machines differ in the last bits of a float32 sum


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
    files = {WEIGHTS: safetensors.numpy.save(_tensors(policy))}
    if onnx is not None:
        files[ONNX] = onnx
    files[MANIFEST] = _manifest_bytes(policy, {name: _sha256(content) for name, content in files.items()})
    write_folder(target, files)
    return Path(path)


def _tensors(policy: LearnedPolicy) -> dict[str, np.ndarray]:
    return {
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
    actions, _ = policy.act(observations, policy.init(GOLDEN))
    content = {
        "format_version": FORMAT_VERSION,
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
        "network": {"activation": policy.activation, "sizes": policy.sizes},
        "recurrent_state": [],
        "training_ranges": {"low": policy.obs_low.tolist(), "high": policy.obs_high.tolist()},
        "provenance": dict(policy.provenance),
        "results": dict(policy.results),
        "golden": {"observations": observations.tolist(), "actions": actions.tolist()},
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
    return _load(Path(path))[0]


def _load(folder: Path) -> tuple[LearnedPolicy, Manifest]:
    where = str(folder / MANIFEST)
    manifest = parse(read_file(folder, MANIFEST), where)
    contents: dict[str, bytes] = {}
    for name, sha256 in manifest.files.items():
        contents[name] = read_file(folder, name)
        if _sha256(contents[name]) != sha256:
            raise BundleError(f"{folder / name}: its SHA-256 is not that of files.{name}; the file was changed")
    _check_table(manifest, where)
    policy = _policy(manifest, _arrays(contents[WEIGHTS], manifest, str(folder / WEIGHTS)))
    observations = np.array(manifest.golden.observations, dtype=np.float32)
    actions, _ = policy.act(observations, policy.init(GOLDEN))
    off = float(np.abs(actions - np.array(manifest.golden.actions)).max())
    if not off <= TOLERANCE:
        raise BundleError(f"{where}: golden: the replayed actions are off by {off:.1e}; at most {TOLERANCE} is allowed")
    return policy, manifest


def _arrays(content: bytes, manifest: Manifest, where: str) -> dict[str, np.ndarray]:
    try:
        arrays = safetensors.numpy.load(content)
    except Exception as error:  # the parser's errors are of many types
        raise BundleError(f"{where}: not a safetensors file: {error}") from error
    sizes = manifest.network.sizes
    wanted: dict[str, tuple[int, ...]] = {}
    for number, (width, out) in enumerate(itertools.pairwise(sizes)):
        wanted[f"layers.{number}.weight"], wanted[f"layers.{number}.bias"] = (out, width), (out,)
    strange = sorted(wanted.keys() ^ arrays.keys())
    if strange:
        raise BundleError(f"{where}: tensor {strange[0]!r} is {'missing' if strange[0] in wanted else 'unknown'}")
    for name, shape in wanted.items():
        array = arrays[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise BundleError(f"{where}: {name} is {array.dtype} of shape {array.shape}; it must be float32 of {shape}")
        if not np.isfinite(array).all():
            raise BundleError(f"{where}: {name} holds a number that is not finite")
    return arrays


def _check_table(manifest: Manifest, where: str) -> None:
    """Signals and levers must be those of this version, or of the user's own registration."""
    signals = all_signals()
    for name in manifest.signals:
        if name not in signals:
            raise MismatchError(f"{where}: signals: {unknown('signal', name, signals)}")
    for entry in manifest.levers:
        if entry.name not in LEVERS:
            raise MismatchError(f"{where}: levers: {unknown('lever', entry.name, LEVERS)}")
        for key in ("low", "high", "rate"):
            trained, here = getattr(entry, key), float(getattr(LEVERS[entry.name], key))
            if trained != here:
                raise MismatchError(
                    f"{where}: levers: the {key} of {entry.name!r} was {trained:g} in training and is {here:g} here; "
                    "train the policy again, or use the version of trimtab that made it"
                )


def _policy(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> LearnedPolicy:
    layers = range(len(manifest.network.sizes) - 1)
    return LearnedPolicy(
        name=manifest.name,
        signals=tuple(manifest.signals),
        levers={entry.name: cast(Kind, entry.kind) for entry in manifest.levers},
        decide_every=manifest.decide_every,
        layers=[(arrays[f"layers.{i}.weight"], arrays[f"layers.{i}.bias"]) for i in layers],
        activation=manifest.network.activation,
        obs_mean=np.array(manifest.normalisation.mean),
        obs_var=np.array(manifest.normalisation.var),
        obs_clip=manifest.normalisation.clip,
        obs_eps=manifest.normalisation.eps,
        action_kind=manifest.action_kind,
        obs_low=np.array(manifest.training_ranges.low),
        obs_high=np.array(manifest.training_ranges.high),
        provenance=manifest.provenance.model_dump(),
        results=manifest.results,
        limits={entry.name: LeverLimits(entry.low, entry.high, entry.rate) for entry in manifest.levers},
        sha256=manifest.sha256,
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- describing -------------------------------------------------------------------------------------------------


def describe(path: str | os.PathLike[str]) -> str:
    """What a bundle holds, as plain text; raises what ``load_bundle`` raises."""
    policy, manifest = _load(Path(path))
    made = manifest.provenance
    parameters = sum(weight.size + bias.size for weight, bias in policy.layers)
    widths = "-".join(str(size) for size in policy.sizes)
    versions = ", ".join(f"{package} {version}" for package, version in made.versions.items())
    facts = {
        "name": policy.name,
        "format version": str(manifest.format_version),
        "network": f"{widths}, {policy.activation}, {parameters} parameters, {policy.action_kind} actions",
        "decides every": f"{policy.decide_every} optimizer steps",
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
    return "\n".join(lines)
