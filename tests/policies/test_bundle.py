"""Bundles: exact round trips, every kind of damage refused by name, nothing ever overwritten by accident."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import re
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policies.made_up import PROVENANCE, SIGNALS, learned
from tests.policies.obligations import play, same

from trimtab.errors import BundleError, MismatchError, OutputExistsError, UserError
from trimtab.inner_training.levers import LEVERS
from trimtab.policies import bundle_files
from trimtab.policies.bundle import describe, load_bundle, save_bundle, save_policy
from trimtab.policies.manifest import MANIFEST, MOST_PARAMETERS, ONNX, READERS, WEIGHTS, parse, seal
from trimtab.policies.registry import DEFAULT_BUNDLE, load_policy
from trimtab.policies.strict_json import MOST_DEPTH, MOST_ENTRIES, canonical
from trimtab.policies.tensors import MOST_HEADER

REFUSED = (BundleError, MismatchError)
Files = dict[str, bytes]
Content = dict[str, Any]


def files_of(path: Path) -> Files:
    return {entry.name: entry.read_bytes() for entry in path.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The files of a valid bundle; tests change copies of them."""
    return files_of(save_bundle(learned(), tmp_path_factory.mktemp("whole") / "bundle"))


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def resealed(files: Files, change: Callable[[Content], object] | None = None, weights: bytes | None = None) -> Files:
    """The bundle with a changed manifest or weights, and all hashes right again."""
    content = json.loads(files[MANIFEST])
    weights = files[WEIGHTS] if weights is None else weights
    content["files"][WEIGHTS] = hashlib.sha256(weights).hexdigest()
    if change is not None:
        change(content)
    return {MANIFEST: seal(content), WEIGHTS: weights}


# --- round trips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [(), (8,), (64, 64)], ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("action_kind", ["box", "multi-discrete"])
def test_round_trip(tmp_path: Path, action_kind: str, activation: str, hidden: tuple[int, ...]) -> None:
    policy = learned(action_kind, activation, hidden)
    save_policy(policy, tmp_path / "new" / "bundle")
    loaded = load_bundle(tmp_path / "new" / "bundle")
    seen = np.random.default_rng(1).uniform(-1, 1, (500, len(SIGNALS))).astype(np.float32)
    np.testing.assert_array_equal(loaded.outputs(seen), policy.outputs(seen))
    np.testing.assert_array_equal(loaded.act(seen, {})[0], policy.act(seen, {})[0])
    np.testing.assert_array_equal([loaded.obs_low, loaded.obs_high], [policy.obs_low, policy.obs_high])
    for name in ("name", "signals", "levers", "decide_every", "results", "limits", "provenance", "sizes"):
        assert getattr(loaded, name) == getattr(policy, name)
    assert list(loaded.levers) == list(policy.levers)
    save_policy(loaded, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "new" / "bundle")


@pytest.mark.parametrize("units", [(5,), (6, 4)], ids=str)
@pytest.mark.parametrize("action_kind", ["box", "multi-discrete"])
def test_round_trip_of_a_recurrent_policy(tmp_path: Path, action_kind: str, units: tuple[int, ...]) -> None:
    policy = learned(action_kind, lstm=units)
    folder = save_bundle(policy, tmp_path / "bundle")
    loaded = load_bundle(folder)
    seen = np.random.default_rng(1).uniform(-1, 1, (50, 3, len(SIGNALS))).astype(np.float32)
    (actions, last), (again, same_last) = play(policy, seen), play(loaded, seen)
    np.testing.assert_array_equal(actions, again)
    assert same(last, same_last)
    assert (loaded.sizes, [layer.units for layer in loaded.lstm]) == (policy.sizes, list(units))
    content = json.loads((folder / MANIFEST).read_bytes())
    assert content["format_version"] == 2
    assert content["network"]["lstm"] == list(units)
    names = [f"{part}_{number}" for number in range(len(units)) for part in ("hidden", "cell")]
    assert content["recurrent_state"] == {name: [units[int(name[-1])]] for name in names}
    assert len(np.unique(content["golden"]["actions"])) > 2
    golden, state = play(policy, np.array(content["golden"]["observations"], dtype=np.float32)[:, None])
    np.testing.assert_array_equal(np.array(content["golden"]["actions"], dtype=np.float32), golden[:, 0])
    assert content["golden"]["state"] == {name: value[0].tolist() for name, value in state.items()}
    assert files_of(save_bundle(loaded, tmp_path / "again")) == files_of(folder)


def test_the_shipped_policy_of_version_1_is_written_again_byte_for_byte(tmp_path: Path) -> None:
    shipped = load_bundle(DEFAULT_BUNDLE)
    assert shipped.lstm == ()
    assert files_of(save_bundle(shipped, tmp_path / "b")) == files_of(DEFAULT_BUNDLE)
    assert json.loads((DEFAULT_BUNDLE / MANIFEST).read_bytes())["format_version"] == 1


def test_what_is_written(whole: Files) -> None:
    assert set(whole) == {MANIFEST, WEIGHTS}
    content = json.loads(whole[MANIFEST])
    sha256 = content.pop("sha256")
    assert sha256 == hashlib.sha256(canonical(content)).hexdigest()
    assert content["files"] == {WEIGHTS: hashlib.sha256(whole[WEIGHTS]).hexdigest()}
    assert content["format_version"] == 1
    assert content["signals"] == list(SIGNALS)
    assert content["levers"][0] == {"name": "lr", "kind": "moves", "low": 1e-4, "high": 1e4, "rate": LEVERS["lr"].rate}
    assert content["recurrent_state"] == []
    assert content["provenance"] == PROVENANCE
    assert np.array(content["golden"]["observations"]).shape == (8, 7)
    assert np.array(content["golden"]["actions"]).shape == (8, 2)
    assert len(np.unique(content["golden"]["actions"])) > 4


def test_load_policy_takes_a_path(tmp_path: Path, whole: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "bundle", whole)
    assert load_policy(folder).name == load_policy(str(folder)).name == "made-up"
    monkeypatch.chdir(tmp_path)
    assert load_policy("bundle").name == "made-up"
    monkeypatch.setattr("trimtab.policies.registry.DEFAULT_BUNDLE", folder)
    assert load_policy("default").name == "made-up"
    with pytest.raises(UserError, match="takes no options"):
        load_policy("default", floor=1)


def test_extremes_survive(tmp_path: Path) -> None:
    tiny = np.full(7, 5e-324)
    policy = learned(obs_mean=tiny, obs_var=np.full(7, 1 / 3), name='snow: "\u2744"\n', provenance={}, results={})
    loaded = load_bundle(save_bundle(policy, tmp_path / "b"))
    assert loaded.name == policy.name
    np.testing.assert_array_equal(loaded.obs_mean, tiny)
    np.testing.assert_array_equal(loaded.obs_var, policy.obs_var)


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "bundles.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_]+)` \| ([0-9, ]+) \|", text, re.MULTILINE)
    wanted = {name for reader in READERS.values() for name in reader.model_fields}
    assert {name for name, _ in rows} == wanted
    assert len(rows) == len(wanted)
    for name, versions in rows:
        held = [str(version) for version, reader in READERS.items() if name in reader.model_fields]
        assert versions == ", ".join(held), name
    for figure in (bundle_files.CAPS[MANIFEST], MOST_PARAMETERS, MOST_ENTRIES, MOST_HEADER):
        assert f"{figure:,}" in text
    assert "4 MiB of weights, 5 MiB of graph" in text
    assert [bundle_files.CAPS[name] >> 20 for name in (WEIGHTS, ONNX)] == [4, 5]
    assert f"{MOST_DEPTH} levels" in text


def test_onnx_is_kept_and_checked(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b", onnx=b"graph")
    assert (folder / ONNX).read_bytes() == b"graph"
    load_bundle(folder)
    (folder / ONNX).write_bytes(b"other")
    with pytest.raises(BundleError, match="policy.onnx: its SHA-256"):
        load_bundle(folder)
    (folder / ONNX).unlink()
    with pytest.raises(BundleError, match="no file .*policy.onnx"):
        load_bundle(folder)


def test_describe(tmp_path: Path, whole: Files) -> None:
    text = describe(write(tmp_path / "b", whole))
    for part in ("made-up", "7-16-16-2, tanh, 434 parameters, box", "10 optimizer steps", "digits-mlp", "40,000", "ppo",
                 "trimtab train digits-mlp --seed 3", "torch 2.8.0", "final_loss", "-0.45", "momentum", "loss_level",
                 hashlib.sha256(whole[WEIGHTS]).hexdigest()):  # fmt: skip
        assert part in text
    assert not re.search(r" $", text, re.MULTILINE)
    assert "state of a run" not in text
    recurrent = describe(save_bundle(learned(lstm=(6, 5)), tmp_path / "recurrent"))
    parameters = learned(lstm=(6, 5)).parameters
    for part in (f"7, LSTM 6-5, then 5-16-16-2, tanh, {parameters} parameters, box", "format version              2",
                 "hidden_0 (6,), cell_0 (6,), hidden_1 (5,), cell_1 (5,)"):  # fmt: skip
        assert part in recurrent
    held = sum(tensor.size for tensor in safetensors.numpy.load_file(tmp_path / "recurrent" / WEIGHTS).values())
    assert parameters == held


# --- damage to the bytes ----------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([MANIFEST, WEIGHTS]), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte(
    whole: Files, tmp_path_factory: pytest.TempPathFactory, name: str, where: float, flip: int
) -> None:
    content = bytearray(whole[name])
    content[int(where * len(content))] ^= flip
    folder = write(tmp_path_factory.mktemp("flip"), {**whole, name: bytes(content)})
    with pytest.raises(BundleError, match=re.escape(name)):
        load_bundle(folder)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from([MANIFEST, WEIGHTS]), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file(whole: Files, tmp_path_factory: pytest.TempPathFactory, name: str, share: float) -> None:
    cut = whole[name][: int(share * len(whole[name]))]
    folder = write(tmp_path_factory.mktemp("cut"), {**whole, name: cut})
    with pytest.raises(BundleError, match=re.escape(name)):
        load_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_an_added_byte(tmp_path: Path, whole: Files, name: str) -> None:
    with pytest.raises(BundleError, match=re.escape(name)):
        load_bundle(write(tmp_path, {**whole, name: whole[name] + b"\n"}))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_missing_file(tmp_path: Path, whole: Files, name: str) -> None:
    write(tmp_path, whole)
    (tmp_path / name).unlink()
    with pytest.raises(BundleError, match=f"no file .*{re.escape(name)}"):
        load_bundle(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(BundleError, match=f"no file .*{re.escape(name)}"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_a_file_above_its_cap(tmp_path: Path, whole: Files, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_files.CAPS[MANIFEST] == 256 * 2**10
    assert bundle_files.CAPS[WEIGHTS] == 4 * 2**20 + 64 * 2**10
    monkeypatch.setitem(bundle_files.CAPS, name, len(whole[name]))
    load_bundle(write(tmp_path / "a", whole))
    monkeypatch.setitem(bundle_files.CAPS, name, len(whole[name]) - 1)
    with pytest.raises(BundleError, match=f"{re.escape(name)}: larger than"):
        load_bundle(tmp_path / "a")
    with pytest.raises(BundleError, match=f"{re.escape(name)} would have"):
        save_bundle(learned(), tmp_path / "b")
    assert not (tmp_path / "b").exists()


RAW: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "not strict JSON"),
    "not JSON": (lambda text: "format_version: 1", "not strict JSON"),
    "a list": (lambda text: f"[{text}]", "holds a list, not a JSON object"),
    "a string": (lambda text: '"policy"', "holds a str, not"),
    "null": (lambda text: "null", "holds a NoneType, not"),
    "a key twice": (lambda text: '{"name":"other",' + text[1:], "the key 'name' is there twice"),
    "a nested key twice": (lambda text: text.replace('"clip":10.0', '"clip":10.0,"clip":5.0'), "the key 'clip' is there"),
    "NaN": (lambda text: text.replace('"clip":10.0', '"clip":NaN'), "NaN is not allowed"),
    "Infinity": (lambda text: text.replace('"clip":10.0', '"clip":Infinity'), "Infinity is not allowed"),
    "-Infinity": (lambda text: text.replace('"clip":10.0', '"clip":-Infinity'), "-Infinity is not allowed"),
    "an overflow": (lambda text: text.replace('"clip":10.0', '"clip":1e999'), "not strict JSON"),
    "a huge whole number": (lambda text: text.replace('"clip":10.0', '"clip":' + "9" * 5000), "not strict JSON"),
    "deep nesting": (lambda text: "[" * 100_000, "not strict JSON"),
    "a byte order mark": (lambda text: "\ufeff" + text, "not strict JSON"),
    "raw non-ASCII": (lambda text: text.replace("made-up", "made-\u00fcp"), "not strict JSON"),
    "a comment": (lambda text: text + "// by hand", "not strict JSON"),
    "a trailing comma": (lambda text: text[:-1] + ",}", "not strict JSON"),
    "two objects": (lambda text: text + text, "not strict JSON"),
    "single quotes": (lambda text: text.replace('"', "'"), "not strict JSON"),
    "spaces": (lambda text: text.replace(":", ": "), "not in canonical form"),
    "a newline at the end": (lambda text: text + "\n", "not in canonical form"),
    "indentation": (lambda text: json.dumps(json.loads(text), indent=2, sort_keys=True), "not in canonical form"),
    "another order": (lambda text: json.dumps(dict(reversed(json.loads(text).items())), separators=(",", ":")),
                      "not in canonical form"),
    "another spelling of a number": (lambda text: text.replace('"clip":10.0', '"clip":10.00'), "not in canonical form"),
    "an escape": (lambda text: text.replace("made-up", "made\\u002dup"), "not in canonical form"),
    "another name": (lambda text: text.replace("made-up", "made-it"), "sha256 does not agree"),
    "another hash": (lambda text: re.sub('"sha256":"[0-9a-f]{4}', '"sha256":"0000', text), "sha256 does not agree"),
    "upper-case hash": (lambda text: re.sub('"sha256":"[0-9a-f]{64}', lambda m: m[0][:10] + m[0][10:].upper(), text),
                        "sha256: String should match"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_damage_to_the_text(tmp_path: Path, whole: Files, case: str) -> None:
    change, words = RAW[case]
    text = whole[MANIFEST].decode()
    changed = change(text).encode()
    assert changed != whole[MANIFEST]
    with pytest.raises(BundleError, match=f"policy.json: .*{words}"):
        load_bundle(write(tmp_path, {**whole, MANIFEST: changed}))


# --- damage to the meaning, with every hash right ---------------------------------------------------------------


def put(path: str, value: Any) -> Callable[[Content], object]:
    """Sets one field, such as ``network.sizes.0``."""

    def change(content: Content) -> None:
        *parents, last = path.split(".")
        node: Any = content
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[int(last) if isinstance(node, list) else last] = copy.deepcopy(value)

    return change


def drop(path: str) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        *parents, last = path.split(".")
        node: Any = content
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        del node[int(last) if isinstance(node, list) else last]

    return change


TOP = ("format_version", "name", "signals", "normalisation", "levers", "decide_every", "action_kind", "network",
       "recurrent_state", "training_ranges", "provenance", "results", "golden", "files")  # fmt: skip
INNER = ("normalisation.mean", "normalisation.var", "normalisation.clip", "normalisation.eps", "levers.0.name",
         "levers.0.kind", "levers.0.low", "levers.0.high", "levers.0.rate", "network.activation", "network.sizes",
         "training_ranges.low", "training_ranges.high", "golden.observations", "golden.actions")  # fmt: skip

MEANING: list[tuple[str, Callable[[Content], object], str]] = [
    *((f"no {path}", drop(path), re.escape(path)) for path in TOP),
    *((f"no {path}", drop(path), f"{re.escape(path)}: Field required") for path in INNER),
    *((f"null {path}", put(path, None), re.escape(path)) for path in (*TOP, *INNER)),
    ("unknown key", put("extra", 1), "extra: Extra inputs are not permitted"),
    ("unknown inner key", put("network.dropout", 0.1), "network.dropout: Extra inputs"),
    ("unknown key of a lever", put("levers.1.step", 1), "levers.1.step: Extra inputs"),
    ("unknown key of the provenance", put("provenance.who", "me"), "provenance.who: Extra inputs"),
    ("future version", put("format_version", 3), "format_version is 3; this version of trimtab reads 1 and 2; export"),
    ("recurrent version", put("format_version", 2), "network.lstm: Field required"),
    ("version as a float", put("format_version", 1.0), "format_version is 1.0"),
    ("version as a list", put("format_version", [[1] * 900] * 9), "format_version is .{20,300}; this version"),
    ("older version", put("format_version", 0), "format_version is 0"),
    ("version as text", put("format_version", "1"), "format_version is '1'"),
    ("version as a bit", put("format_version", True), "format_version is True"),
    ("empty name", put("name", ""), "name: String should have at least 1"),
    ("no signals", put("signals", []), "signals: List should have at least 1"),
    ("signal twice", put("signals.1", "progress"), "signals"),
    ("unknown signal", put("signals.3", "loss_levle"), "unknown signal 'loss_levle'; did you mean 'loss_level'"),
    ("signal as number", put("signals.0", 3), "signals.0: Input should be a valid string"),
    ("unknown lever", put("levers.0.name", "rl"), "unknown lever 'rl'; did you mean 'lr'"),
    ("lever twice", put("levers.0.name", "momentum"), "levers"),
    ("targets", put("levers.0.kind", "targets"), "levers.0.kind: Input should be 'moves'"),
    ("another lower bound", put("levers.0.low", 0.5), "the low of 'lr' was 0.5 in training and is 0.0001 here"),
    ("another upper bound", put("levers.0.high", 2.0), "the high of 'lr' was 2"),
    ("another rate", put("levers.1.rate", 9.0), "the rate of 'momentum' was 9"),
    ("negative rate", put("levers.1.rate", -1.0), "levers.1.rate: Input should be greater than 0"),
    ("decide_every 0", put("decide_every", 0), "decide_every: Input should be greater"),
    ("decide_every 1.5", put("decide_every", 1.5), "decide_every: Input should be a valid integer"),
    ("decide_every text", put("decide_every", "10"), "decide_every: Input should be a valid integer"),
    ("unknown action kind", put("action_kind", "discrete"), "action_kind: Input should be 'box'"),
    ("other action kind", put("action_kind", "multi-discrete"), r"network.sizes \(last\): there are 2, there must be 6"),
    ("unknown activation", put("network.activation", "gelu"), "network.activation: Input should be 'tanh' or 'relu'"),
    ("other activation", put("network.activation", "relu"), "golden: the replayed actions are off"),
    ("one size", put("network.sizes", [7]), "network.sizes: List should have at least 2"),
    ("too many parameters", put("network.sizes.1", 10**6), "network: .* parameters; at most 1048576 are allowed"),
    ("a huge size", put("network.sizes.1", 10**300), "network.sizes.1: Input should be less than or equal"),
    ("too many layers", put("network.sizes", [7, *[4] * 40, 2]), "network.sizes: List should have at most 32"),
    ("first size", put("network.sizes.0", 8), r"network.sizes \(first\): there are 8, there must be 7"),
    ("inner size", put("network.sizes.1", 17), r"layers.0.bias is 'F32' of shape \[16\]; it must be 'F32' of shape \[17\]"),
    ("zero size", put("network.sizes.1", 0), "network.sizes.1: Input should be greater"),
    ("a layer more", put("network.sizes", [7, 16, 16, 16, 2]), "tensor 'layers.3.bias' is missing"),
    ("a layer less", put("network.sizes", [7, 16, 2]), "tensor 'layers.2.bias' is unknown"),
    ("recurrent", put("recurrent_state", [[64]]), "recurrent_state: List should have at most 0"),
    ("a state by name", put("recurrent_state", {"hidden_0": [64]}), "recurrent_state: Input should be a valid list"),
    ("an LSTM", put("network.lstm", [16]), "network.lstm: Extra inputs"),
    ("a huge decide_every", put("decide_every", 10**300), "decide_every: Input should be less than"),
    ("many signals", put("signals", ["x"] * 1025), "a list has 1025 entries; at most 1024"),
    ("many results", put("results", {str(i): 1.0 for i in range(1025)}), "an object has 1025 keys; at most 1024"),
    ("an overflowing variance", lambda content: content["normalisation"].update(var=[1.7e308] * 7, eps=1.7e308),
     "normalisation: overflow"),
    ("short mean", put("normalisation.mean", [0.0] * 6), "normalisation.mean: there are 6, there must be 7"),
    ("short variance", put("normalisation.var", [1.0] * 6), "normalisation.var: there are 6, there must be 7"),
    ("negative variance", put("normalisation.var.2", -1.0), "normalisation.var.2: Input should be greater"),
    ("other mean", put("normalisation.mean.2", 3.0), "golden: the replayed actions are off"),
    ("no clip", put("normalisation.clip", 0.0), "normalisation.clip: Input should be greater than 0"),
    ("text in a mean", put("normalisation.mean.0", "0.1"), "normalisation.mean.0: Input should be a valid number"),
    ("short range", put("training_ranges.low", [0.0]), "training_ranges.low: there are 1, there must be 7"),
    ("crossed range", put("training_ranges.low", [9.0] * 7), "training_ranges: low must be at most high"),
    ("seven golden", drop("golden.observations.0"), "golden.observations: List should have at least 8"),
    ("short golden", put("golden.observations.5", [0.0]), "golden.observations.5: there are 1, there must be 7"),
    ("long golden", put("golden.actions.7", [0.0] * 3), "golden.actions.7: there are 3, there must be 2"),
    ("another golden action", put("golden.actions.3.1", 0.777), "golden: the replayed actions are off by"),
    ("another golden observation", put("golden.observations.3.1", 0.9), "golden: the replayed actions are off by"),
    ("half a character in a key", put("results", {"\ud800": 1.0}), r"the key '\\ud800' is no text"),
    ("half a character in a name", put("name", "\ud800"), "name: Input should be a valid string"),
    ("half a character in a new key", put("\ud800", 1), r"the key '\\ud800' is no text"),
    ("result as a list", put("results.loss", [1.0]), "results.loss"),
    ("timesteps as text", put("provenance.timesteps", "40000"), "provenance.timesteps"),
    ("setting as a list", put("provenance.settings.x", [1]), "provenance.settings.x"),
    ("no weights", put("files", {}), r"files \(weights.safetensors\)"),
    ("another file", put("files.model.pkl", "0" * 64), "files"),
    ("a path", lambda content: content["files"].update({"../secret": "0" * 64}), "files"),
    ("another hash", put("files", {WEIGHTS: "0" * 64}), "weights.safetensors: its SHA-256 is not that of files"),
    ("a hash that is none", put("files", {WEIGHTS: "0"}), "files.weights.safetensors: String should match"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [row[1:] for row in MEANING], ids=[row[0] for row in MEANING])
def test_damage_to_the_meaning(tmp_path: Path, whole: Files, change: Callable[[Content], Any], words: str) -> None:
    def forgiving(content: Content) -> None:
        try:
            change(content)
        except KeyError:  # ``files.model.pkl`` has a dot in its last part
            content["files"]["model.pkl"] = "0" * 64

    with pytest.raises(REFUSED, match=words):
        load_bundle(write(tmp_path, resealed(whole, forgiving)))


RECURRENT: list[tuple[str, Callable[[Content], object], str]] = [
    ("version 1", put("format_version", 1), "network.lstm: Extra inputs"),
    ("no LSTM", drop("network.lstm"), "network.lstm: Field required"),
    ("no units", put("network.lstm", []), "network.lstm: List should have at least 1"),
    ("five layers", put("network.lstm", [6] * 5), "network.lstm: List should have at most 4"),
    ("zero units", put("network.lstm", [0]), "network.lstm.0: Input should be greater"),
    ("a unit more", put("network.lstm", [7]), r"network.sizes \(first\): there are 6, there must be 7"),
    ("too many units", put("network.lstm.0", 2000), "network: .* parameters; at most"),
    ("a list of states", put("recurrent_state", [[6], [6]]), "recurrent_state: Input should be a valid dict"),
    ("no state", put("recurrent_state", {}), "recurrent_state: it is {}, it must be {'cell_0': .6., 'hidden_0': .6.}"),
    ("another state", put("recurrent_state.cell_0", [7]), "recurrent_state: it is {'cell_0': .7."),
    ("one more state", put("recurrent_state.cell_1", [6]), "recurrent_state: it is .*cell_1"),
    ("no golden state", drop("golden.state"), "golden.state: Field required"),
    ("a golden state less", drop("golden.state.cell_0"), "golden.state: it is of shape"),
    ("a short golden state", drop("golden.state.cell_0.0"), "golden.state: it is of shape {'cell_0': .5."),
    ("another golden state", put("golden.state.cell_0.0", 3.0), "golden: the replayed state cell_0 are off"),
    ("another golden order", lambda content: content["golden"]["observations"].reverse(), "golden: the replayed actions"),
]  # fmt: skip


def test_damage_to_a_recurrent_bundle(tmp_path: Path) -> None:
    good = files_of(save_bundle(learned(lstm=(6,)), tmp_path / "good"))
    assert resealed(good) == good
    for number, (name, change, words) in enumerate(RECURRENT):
        with pytest.raises(BundleError, match=words):
            load_bundle(write(tmp_path / str(number), resealed(good, change)))
            pytest.fail(name)
    tensors = safetensors.numpy.load(good[WEIGHTS])
    gates = tensors["lstm.0.input_weight"]
    for number, (name, value, words) in enumerate([
        ("lstm.0.input_weight", np.roll(gates, 6, axis=0), "golden: the replayed actions are off"),  # another gate order
        ("lstm.0.input_weight", gates[:-1], r"lstm.0.input_weight is 'F32' of shape \[23, 7\]"),
        ("lstm.0.state_weight", tensors["lstm.0.state_weight"][:, :-1], "lstm.0.state_weight is 'F32' of shape"),
        ("lstm.0.bias", poked(np.nan)(tensors["lstm.0.bias"]), "lstm.0.bias holds a number that is not finite"),
    ]):  # fmt: skip
        weights = safetensors.numpy.save({**tensors, name: np.ascontiguousarray(value)})
        with pytest.raises(BundleError, match=words):
            load_bundle(write(tmp_path / f"w{number}", resealed(good, weights=weights)))


# --- damage to the folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "model.pkl", ".hidden", "policy.json.bak", "\x1b[31m", "folder"])
def test_a_foreign_file(tmp_path: Path, whole: Files, name: str) -> None:
    folder = write(tmp_path / "b", whole)
    (folder / name).mkdir() if name == "folder" else (folder / name).touch()
    with pytest.raises(BundleError, match=r"b: it holds '[^\x1b]*', which is no file of a bundle; remove it"):
        load_bundle(folder)


def test_a_graph_that_the_manifest_does_not_name(tmp_path: Path, whole: Files) -> None:
    folder = write(tmp_path / "b", {**whole, ONNX: b"graph"})
    with pytest.raises(BundleError, match="policy.onnx: it is not among files of policy.json"):
        load_bundle(folder)
    (folder / ONNX).unlink()
    (folder / ONNX).symlink_to("nowhere")
    with pytest.raises(BundleError, match="policy.onnx: it is not among files of policy.json"):
        load_bundle(folder)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, ONNX])
@pytest.mark.parametrize("kind", ["outside", "inside", "dangling", "loop", "pipe", "socket", "folder"])
def test_a_file_that_is_none(tmp_path: Path, name: str, kind: str) -> None:
    """Links and special files: /dev/zero would never end, and a pipe would block."""
    folder = save_bundle(learned(), tmp_path / "b", onnx=b"graph")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    (tmp_path / "elsewhere").write_bytes(content)
    others = [other for other in (MANIFEST, WEIGHTS, ONNX) if other != name]
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        made: dict[str, Callable[[], object]] = {
            "outside": lambda: (folder / name).symlink_to(tmp_path / "elsewhere"),
            "inside": lambda: (folder / name).symlink_to(others[0]),
            "dangling": lambda: (folder / name).symlink_to("nowhere"),
            "loop": lambda: (folder / name).symlink_to(name),
            "pipe": lambda: os.mkfifo(folder / name),
            "socket": lambda: listener.bind(str(folder / name)),
            "folder": lambda: (folder / name).mkdir(),
        }
        made[kind]()
        linked = kind in ("outside", "inside", "dangling", "loop")
        words = ": a symbolic link" if linked else "'?: what is there is not a regular file"
        with pytest.raises(BundleError, match=re.escape(name) + words):
            load_bundle(folder)


def test_a_linked_folder_will_do(tmp_path: Path, whole: Files) -> None:
    write(tmp_path / "b", whole)
    (tmp_path / "link").symlink_to("b")
    assert load_bundle(tmp_path / "link").name == "made-up"


def test_no_folder_at_all(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere", tmp_path / "file", tmp_path / ("n" * 300), Path("a\0b")):
        with pytest.raises(BundleError, match="policy.json"):
            load_bundle(path)


# --- the meaning again ------------------------------------------------------------------------------------------


def test_resealing_alone_is_harmless(tmp_path: Path, whole: Files) -> None:
    """The tests above fail for the reason that they name, and not for a wrong hash."""
    assert resealed(whole) == whole
    load_bundle(write(tmp_path, resealed(whole, put("name", "renamed"))))


class Payload:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


def with_header(change: Callable[[Content], object]) -> Callable[[dict[str, np.ndarray]], bytes]:
    """The same data under a changed header."""

    def damage(tensors: dict[str, np.ndarray]) -> bytes:
        saved = safetensors.numpy.save(tensors)
        end = 8 + int.from_bytes(saved[:8], "little")
        header = json.loads(saved[8:end])
        return with_text(change(header) or json.dumps(header, separators=(",", ":")), saved[end:])

    return damage


def with_text(header: Any, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + data


def entry(name: str, **changes: Any) -> Callable[[dict[str, np.ndarray]], bytes]:
    """One tensor's entry in the header, changed; None drops a key."""

    def change(header: Content) -> None:
        header[name] = {key: value for key, value in {**header[name], **changes}.items() if value is not None}

    return with_header(change)


def swapped_ranges(header: Content) -> None:
    """Two tensors of equal size trade their bytes: the header stays valid."""
    first, second = header["layers.0.bias"], header["layers.1.bias"]
    first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]


def zipped(tensors: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Payload()))
    return buffer.getvalue()


def torch_saved(tensors: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(tensor.copy()) for name, tensor in tensors.items()}, buffer)
    return buffer.getvalue()


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], bytes]:
    return lambda tensors: safetensors.numpy.save({**tensors, name: np.ascontiguousarray(change(tensors[name]))})


def renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], bytes]:
    return lambda tensors: safetensors.numpy.save({new if name == old else name: t for name, t in tensors.items()})


def poked(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.copy()
        tensor.flat[-1] = value
        return tensor

    return change


def swapped(tensors: dict[str, np.ndarray]) -> bytes:
    first, second = tensors["layers.0.bias"], tensors["layers.1.bias"]
    return safetensors.numpy.save({**tensors, "layers.0.bias": second, "layers.1.bias": first})


NOT = "weights.safetensors: not a safetensors file"
WEIGHT_DAMAGE: dict[str, tuple[Callable[[dict[str, np.ndarray]], bytes], str]] = {
    "pickle": (lambda tensors: pickle.dumps(Payload()), NOT),
    "zip with a pickle": (zipped, NOT),
    "torch.save": (torch_saved, NOT),
    "empty": (lambda tensors: b"", NOT),
    "seven bytes": (lambda tensors: bytes(7), "7 bytes, fewer than the 8 of a length"),
    "header longer than the file": (lambda tensors: (100).to_bytes(8, "little") + b"{}", "header of 100 bytes; at most 2"),
    "oversize header": (lambda tensors: (70_000).to_bytes(8, "little") + b" " * 80_000, "at most 65536 can be here"),
    "huge header": (lambda tensors: (2**62).to_bytes(8, "little") + b"{}", NOT),
    "header that is no JSON": (lambda tensors: (4).to_bytes(8, "little") + b"abcd", NOT),
    "cut": (lambda tensors: safetensors.numpy.save(tensors)[:-4], "the tensors have 1736 bytes; the file holds 1732"),
    "longer": (lambda tensors: safetensors.numpy.save(tensors) + bytes(4), "have 1736 bytes; the file holds 1740"),
    "metadata": (lambda tensors: safetensors.numpy.save(tensors, {"format": "pt"}), "tensor '__metadata__' is unknown"),
    "a key twice": (with_header(lambda header: '{"layers.0.bias":{},' + json.dumps(header)[1:]), "is there twice"),
    "an inner key twice": (with_header(lambda h: json.dumps(h).replace('"dtype"', '"dtype": "F32", "dtype"')),
                           "the key 'dtype' is there twice"),
    "spaces in the header": (with_header(lambda header: json.dumps(header)), "its header: not in canonical form"),
    "another number in the header": (
        with_header(lambda header: json.dumps(header, separators=(",", ":")).replace("[0,", "[-0,")), "not in canonical"),
    "a header that is a list": (with_header(lambda header: json.dumps([header])), "it holds a list, not a JSON object"),
    "a nested header": (with_header(lambda header: "[" * 50_000), "its header: not strict JSON"),
    "an entry that is no object": (with_header(lambda header: header.update({"layers.0.bias": [1]})),
                                   "layers.0.bias is described by"),
    "an entry with more": (entry("layers.0.bias", device="cpu"), "layers.0.bias is described by .*device"),
    "an entry without a shape": (entry("layers.0.bias", shape=None), "layers.0.bias is described by"),
    "a shape of fractions": (entry("layers.0.bias", shape=[16.0]), r"layers.0.bias is 'F32' of shape \[16.0\]"),
    "a negative shape": (entry("layers.0.weight", shape=[-16, -7]), r"layers.0.weight is 'F32' of shape \[-16, -7\]"),
    "a shape that overflows": (entry("layers.0.weight", shape=[2**62, 16]), "layers.0.weight is 'F32' of shape"),
    "an unknown dtype": (entry("layers.0.weight", dtype="BF16"), "layers.0.weight is 'BF16'"),
    "a dtype that is a list": (entry("layers.0.weight", dtype=["F32"]), "layers.0.weight is "),
    "one offset": (entry("layers.0.bias", data_offsets=[0]), r"layers.0.bias has data_offsets \[0\]"),
    "offsets as text": (entry("layers.0.bias", data_offsets=["0", "64"]), "layers.0.bias has data_offsets"),
    "offsets backwards": (entry("layers.0.bias", data_offsets=[64, 0]), "layers.0.bias has data_offsets"),
    "offsets of a bit": (entry("layers.0.bias", data_offsets=[False, 64]), "layers.0.bias has data_offsets"),
    "offsets far outside": (entry("layers.0.bias", data_offsets=[2**70, 2**70 + 64]), "leaves bytes before it"),
    "overlapping ranges": (entry("layers.1.bias", data_offsets=[0, 64]), "data_offsets of .* overlaps the tensor before"),
    "swapped ranges": (with_header(swapped_ranges), "golden: the replayed actions are off"),
    "NaN": (changed("layers.0.weight", poked(np.nan)), "layers.0.weight holds a number that is not finite"),
    "infinity": (changed("layers.2.bias", poked(np.inf)), "layers.2.bias holds a number that is not finite"),
    "-infinity": (changed("layers.1.bias", poked(-np.inf)), "layers.1.bias holds a number that is not finite"),
    "float64": (changed("layers.1.weight", lambda t: t.astype(np.float64)), "layers.1.weight is 'F64'"),
    "float16": (changed("layers.1.bias", lambda t: t.astype(np.float16)), "layers.1.bias is 'F16'"),
    "int32": (changed("layers.1.bias", lambda t: t.astype(np.int32)), "layers.1.bias is 'I32'"),
    "transposed": (changed("layers.0.weight", lambda t: t.T), r"layers.0.weight is 'F32' of shape \[7, 16\]"),
    "flat": (changed("layers.0.weight", lambda t: t.ravel()), r"layers.0.weight is 'F32' of shape \[112\]"),
    "a row less": (changed("layers.2.weight", lambda t: t[:1]), r"layers.2.weight is 'F32' of shape \[1, 16\]"),
    "scalar": (changed("layers.2.bias", lambda t: t[0]), r"layers.2.bias is 'F32' of shape \[1\]"),
    "renamed": (renamed("layers.2.bias", "layers.2.offset"), "tensor 'layers.2.bias' is missing"),
    "missing": (lambda tensors: safetensors.numpy.save({n: t for n, t in tensors.items() if n != "layers.1.weight"}),
                "tensor 'layers.1.weight' is missing"),
    "one more": (lambda tensors: safetensors.numpy.save({**tensors, "log_std": np.zeros(2, np.float32)}),
                 "tensor 'log_std' is unknown"),
    "none": (lambda tensors: safetensors.numpy.save({}), "tensor 'layers.0.bias' is missing"),
    "swapped": (swapped, "golden: the replayed actions are off"),
    "one weight": (changed("layers.1.weight", poked(2.0)), "golden: the replayed actions are off"),
    "another seed": (changed("layers.0.weight", lambda t: t[::-1]), "golden: the replayed actions are off"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHT_DAMAGE)
def test_damage_to_the_weights(tmp_path: Path, whole: Files, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    damage, words = WEIGHT_DAMAGE[case]
    weights = damage(safetensors.numpy.load(whole[WEIGHTS]))
    with pytest.raises(BundleError, match=words):
        load_bundle(write(tmp_path / "b", resealed(whole, weights=weights)))
    assert not (tmp_path / "executed").exists()


def test_a_pickle_as_manifest(tmp_path: Path, whole: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="policy.json: not strict JSON"):
        load_bundle(write(tmp_path / "b", {**whole, MANIFEST: pickle.dumps(Payload())}))
    assert not (tmp_path / "executed").exists()


def test_files_of_another_bundle(tmp_path: Path, whole: Files) -> None:
    other = files_of(save_bundle(learned("box", "relu", (16, 16), obs_clip=5.0), tmp_path / "other"))
    assert other[WEIGHTS] == whole[WEIGHTS]
    deeper = files_of(save_bundle(learned(hidden=(16,)), tmp_path / "deeper"))
    with pytest.raises(BundleError, match="its SHA-256"):
        load_bundle(write(tmp_path / "mixed", {**whole, WEIGHTS: deeper[WEIGHTS]}))


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_parse_never_raises_anything_else(raw: bytes) -> None:
    with pytest.raises(BundleError):
        parse(raw, MANIFEST)


# --- saving -----------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b")
    before = files_of(folder)
    with pytest.raises(OutputExistsError, match="holds a bundle already; give a new folder"):
        save_bundle(learned(name="other"), folder)
    with pytest.raises(OutputExistsError, match="holds a bundle already"):
        save_policy(learned(name="other"), folder)
    assert files_of(folder) == before


def test_overwrite_replaces_a_bundle_and_nothing_else(tmp_path: Path) -> None:
    folder = save_bundle(learned(), tmp_path / "b", onnx=b"old")
    save_bundle(learned(name="other"), folder, overwrite=True)
    assert load_bundle(folder).name == "other"
    assert set(files_of(folder)) == {MANIFEST, WEIGHTS}
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ONNX).write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path, words in [("b", "holds 'notes.txt' and is not"), ("half", "holds 'policy.onnx'"), ("file", "is a file")]:
        for overwrite in (False, True):
            with pytest.raises(OutputExistsError, match=words):
                save_bundle(learned(), tmp_path / path, overwrite=overwrite)
    assert (folder / "notes.txt").read_text() == (tmp_path / "half" / ONNX).read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["b", "file", "half"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    save_bundle(learned(), tmp_path / "b")
    load_bundle(tmp_path / "b")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    folder = tmp_path / "b"
    if existing:
        save_bundle(learned(), folder)
    before = files_of(folder) if existing else {}
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target.name == "b" and not self.name.endswith(".old"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        save_bundle(learned(name="other"), folder, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == (["b"] if existing else [])
    assert (files_of(folder) if existing else {}) == before


def test_rules_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'cosine' is not a learned policy; a rule is not saved, load it by its name"):
        save_policy(load_policy("cosine"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"provenance": {"who": "me"}}, "policy 'made-up': provenance.who: Extra inputs"),
        ({"provenance": {"timesteps": "many"}}, "provenance.timesteps"),
        ({"results": {"loss": float("nan")}}, "results.loss"),
        ({"decide_every": 2.5}, "decide_every"),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, changes: Content, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        save_bundle(replace(learned(), **changes), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
