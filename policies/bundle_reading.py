"""Reading a bundle: every field, hash, weight and golden vector is verified before the first decision."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from trimtab.errors import BundleError, MismatchError, UserError, unknown
from trimtab.inner_training.edits import EDITS
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.signals import all_signals
from trimtab.policies.bundle_files import check_entries, read_file
from trimtab.policies.defects import Refuse, at_once, refuse_all
from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.manifest import MANIFEST, ONNX, WEIGHTS, AnyManifest, RecurrentManifest, parse
from trimtab.policies.network import LearnedPolicy, LeverLimits
from trimtab.policies.policy import Kind
from trimtab.policies.tensors import read_tensors

TOLERANCE = 1e-5  # of the golden actions; machines differ in the last bits of a float32 sum


def read_bundle(folder: Path, refuse: Refuse = at_once) -> tuple[LearnedPolicy, AnyManifest]:
    """The policy and the manifest of a bundle, verified as in ``load_bundle``.

    Args:
        folder: of the bundle.
        refuse: called with each defect after which there is something left to verify; it raises it, or notes it.
    """
    where = str(folder / MANIFEST)
    raw = read_file(folder, MANIFEST)
    check_entries(folder, refuse)
    manifest = parse(raw, where, refuse)
    contents = _read_files(folder, manifest, refuse)
    _check_table(manifest, where, refuse)
    arrays = read_tensors(contents[WEIGHTS], manifest.tensors(), str(folder / WEIGHTS), refuse)
    try:
        with np.errstate(over="raise", invalid="raise"):
            policy = _policy(manifest, arrays)
    except FloatingPointError as error:
        raise BundleError(f"{where}: normalisation: {error}") from error
    _check_golden(policy, manifest, where)
    return policy, manifest


def _read_files(folder: Path, manifest: AnyManifest, refuse: Refuse) -> dict[str, bytes]:
    """Contents by name of the files of the manifest, whose hashes agree."""
    contents: dict[str, bytes] = {}
    missing: list[UserError] = []
    for name, expected in manifest.files.items():
        try:
            contents[name] = read_file(folder, name)
        except BundleError as error:
            missing.append(error)
            continue
        if sha256(contents[name]) != expected:
            refuse(BundleError(f"{folder / name}: its SHA-256 is not that of files.{name}; the file was changed"))
    if ONNX not in manifest.files and os.path.lexists(folder / ONNX):
        refuse(BundleError(f"{folder / ONNX}: it is not among files of {MANIFEST}; remove it"))
    refuse_all(missing, refuse)
    return contents


def _check_golden(policy: LearnedPolicy, manifest: AnyManifest, where: str) -> None:
    with np.errstate(all="ignore"):  # weights that overflow give what no golden vector equals
        actions, state = replay(policy, np.array(manifest.golden.observations, dtype=np.float32))
    pairs: dict[str, tuple[np.ndarray, list[Any]]] = {"actions": (actions, manifest.golden.actions)}
    if isinstance(manifest, RecurrentManifest):
        pairs |= {f"state {name}": (state[name][0], row) for name, row in manifest.golden.state.items()}
    for what, (replayed, golden) in pairs.items():
        off = float(np.abs(replayed - np.array(golden)).max())
        if not off <= TOLERANCE:
            raise BundleError(
                f"{where}: golden: the replayed {what} are off by {off:.1e}; at most {TOLERANCE} is allowed"
            )


def _check_table(manifest: AnyManifest, where: str, refuse: Refuse) -> None:
    """Signals and levers must be those of this version, or of the user's own registration."""
    signals, levers = all_signals(), {**LEVERS, **EDITS}
    wrong: list[UserError] = []
    for name in manifest.signals:
        if name not in signals:
            wrong.append(MismatchError(f"{where}: signals: {unknown('signal', name, signals)}"))
    for entry in manifest.levers:
        if entry.name not in levers:
            wrong.append(MismatchError(f"{where}: levers: {unknown('lever', entry.name, levers)}"))
            continue
        for key in ("low", "high", "rate"):
            trained, here = getattr(entry, key), float(getattr(levers[entry.name], key))
            if trained != here:
                wrong.append(
                    MismatchError(
                        f"{where}: levers: the {key} of {entry.name!r} was {trained:g} in training and is {here:g} "
                        "here; train the policy again, or use the version of trimtab that made it"
                    )
                )
    refuse_all(wrong, refuse)


def _policy(manifest: AnyManifest, arrays: Mapping[str, np.ndarray]) -> LearnedPolicy:
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
        lstm=[
            LSTMLayer(*(arrays[f"lstm.{i}.{part}"] for part in ("input_weight", "state_weight", "bias")))
            for i in range(len(manifest.lstm))
        ],
    )


def replay(policy: LearnedPolicy, observations: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Actions (8, L) and the last state: of eight runs at once or, with an LSTM, of one run that takes eight decisions."""
    if not policy.lstm:
        return policy.act(observations, policy.init(len(observations)))
    state, actions = policy.init(1), []
    for row in observations:
        action, state = policy.act(row[None], state)
        actions.append(action[0])
    return np.stack(actions), state


def sha256(content: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(content).hexdigest()
