"""Bundles with every kind of damage: is each refused before inference, and how quickly?

    python experiments/corrupted_bundles.py [--seed 0] [--out FILE.json]

Two whole bundles are damaged, the shipped default policy and a recurrent one with random weights and a stand-in for an
ONNX graph: bits and blocks, and, with all hashes right again, weights, shapes, headers, keys, versions and numbers;
pickles in every place, which would leave a mark if anything unpickled them; strangers in the folder. The table has
the processor's milliseconds from the call to the refusal, and the longest on the clock, which other programs lengthen.
Exit code 1 when a bundle was accepted, another error than a refusal came up, a message named no file or was
unprintable, or a mark was left.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import io
import json
import pickle
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from rich.console import Console
from rich.table import Table

from trimtab.errors import BundleError, MismatchError
from trimtab.policies.bundle import load_bundle, save_bundle
from trimtab.policies.lstm import LSTMLayer
from trimtab.policies.manifest import MANIFEST, ONNX, WEIGHTS, seal
from trimtab.policies.registry import DEFAULT_BUNDLE

Files = dict[str, bytes]
Case = tuple[str, Files]  # the kind of damage, and what is in the folder
EACH = 24  # cases of each random kind, for each file or bundle


class Payload:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def originals(folder: Path) -> list[Files]:
    """The files of the two whole bundles; ``folder`` is for work."""
    shipped = load_bundle(DEFAULT_BUNDLE)
    rng, units, width = np.random.default_rng(0), 32, len(shipped.signals)
    arrays = (rng.normal(0, 0.3, shape) for shape in ((4 * units, width), (4 * units, units), (4 * units,)))
    head = (rng.normal(0, 0.5, (len(shipped.levers), units)), np.zeros(len(shipped.levers)))
    recurrent = replace(shipped, name="recurrent", lstm=[LSTMLayer(*arrays)], layers=[head])
    graph = rng.bytes(3000)
    folders = [save_bundle(shipped, folder / "shipped"), save_bundle(recurrent, folder / "recurrent", onnx=graph)]
    return [{entry.name: entry.read_bytes() for entry in one.iterdir()} for one in folders]


def resealed(files: Files, content: dict[str, Any], **changed: bytes) -> Files:
    """The bundle with another manifest, or other files, and every hash right."""
    files = {**files, **changed}
    if "files" in content and isinstance(content["files"], dict):
        content["files"] |= {name: hashlib.sha256(files[name]).hexdigest() for name in files if name != MANIFEST}
    return {**files, MANIFEST: seal(content)}


def sealed_text(text: str) -> bytes:
    """A manifest that is not canonical, with the hash that its canonical form would have."""
    content = json.loads(text)
    right = json.loads(seal(content))["sha256"]
    return text.replace(content["sha256"], right).encode()


def bytes_damaged(files: Files, rng: np.random.Generator, each: int) -> Iterator[Case]:
    """What disks, networks and editors do."""
    for name in files:
        whole = files[name]
        for _ in range(each):
            start, other = (int(at) for at in rng.integers(0, len(whole) - 40, 2))
            changed = bytearray(whole)
            changed[start] ^= 1 << int(rng.integers(8))
            yield "a bit", {**files, name: bytes(changed)}
            yield "truncated", {**files, name: whole[:start]}
            block = bytearray(whole)
            block[start : start + 32], block[other : other + 32] = whole[other : other + 32], whole[start : start + 32]
            zeroed = whole[:start] + bytes(32) + whole[start + 32 :]
            for kind, content in (("swapped blocks", bytes(block)), ("a zeroed block", zeroed)):
                if content != whole:
                    yield kind, {**files, name: content}
            yield "inserted bytes", {**files, name: whole[:start] + rng.bytes(4) + whole[start:]}
    for name in files:
        yield "a missing file", {other: content for other, content in files.items() if other != name}


def weights_damaged(files: Files, rng: np.random.Generator, each: int) -> Iterator[Case]:
    """Other weights, with every hash right."""
    tensors = safetensors.numpy.load(files[WEIGHTS])
    names = sorted(tensors)

    def saved(changed: dict[str, np.ndarray]) -> Files:
        contiguous = {name: np.ascontiguousarray(array) for name, array in changed.items()}
        return resealed(files, json.loads(files[MANIFEST]), **{WEIGHTS: safetensors.numpy.save(contiguous)})

    for turn in range(each):
        name = names[turn % len(names)]
        array = tensors[name]
        for kind, value in (("NaN", np.nan), ("infinity", np.inf), ("-infinity", -np.inf)):
            poked = array.copy()
            poked.flat[rng.integers(array.size)] = value
            yield f"{kind} among the weights", saved({**tensors, name: poked})
        yield "other weights", saved({**tensors, name: rng.normal(0, 2, array.shape).astype(np.float32)})
        yield "huge weights", saved({**tensors, name: np.full_like(array, 3e38)})
        for shape in (array.reshape(-1, 1), array[:-1], np.concatenate([array, array]), array[None]):
            yield "another shape", saved({**tensors, name: shape})
        for dtype in (np.float64, np.float16, np.int32):
            yield "another dtype", saved({**tensors, name: array.astype(dtype)})
        yield "a tensor less", saved({other: tensors[other] for other in names if other != name})
        yield "a tensor more", saved({**tensors, f"{name}.{turn}": array})
        yield "a tensor renamed", saved({other.replace(name, name + "_"): tensors[other] for other in names})


def headers_damaged(files: Files, rng: np.random.Generator) -> Iterator[Case]:
    """A header of the weights that is not what the library writes, with every hash right."""
    whole = files[WEIGHTS]
    end = 8 + int.from_bytes(whole[:8], "little")
    text, data = whole[8:end].decode(), whole[end:]
    names = [name for name in json.loads(text) if name != "__metadata__"]

    def under(header: str, length: int | None = None, data: bytes = data) -> Files:
        raw = header.encode()
        weights = (len(raw) if length is None else length).to_bytes(8, "little") + raw + data
        return resealed(files, json.loads(files[MANIFEST]), **{WEIGHTS: weights})

    for length in (0, 1, 7, len(text) - 1, len(text) + 1, len(whole) - 8, len(whole), 2**31, 2**62, 2**64 - 1):
        yield "a header's length", under(text, length)
    for size in (70_000, 1_000_000, 10_000_000):
        yield "an oversize header", under(text + " " * size)
    for name in names:
        repeated = text.replace("{", f'{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}},', 1)
        yield "a key twice in a header", under(repeated)
        entry = json.loads(text)[name]
        first, last = entry["data_offsets"]
        changes = ({"shape": [-1]}, {"shape": [2**63, 2]}, {"shape": "64"}, {"shape": [float(entry["shape"][0])]},
                   {"dtype": "F64"}, {"dtype": None}, {"data_offsets": [last, first]}, {"data_offsets": [first]},
                   {"data_offsets": [first + 4, last + 4]}, {"data_offsets": [2**70, 2**70 + last - first]},
                   {"data_offsets": [first, last, last]}, {"device": "cpu"})  # fmt: skip
        for change in changes:
            header = {**json.loads(text), name: {**entry, **change}}
            yield "an entry of a header", under(json.dumps(header, separators=(",", ":")))
    for header in ("[" * 60_000, '{"a":' * 10_000, "[]", "null", "{}", "", text[:-9], json.dumps(json.loads(text)),
                   text.replace("[0,", "[0e0,"), text.replace("[0,", "[-0,"), text.replace("F32", "\\u004632"),
                   text.replace("{", '{"__metadata__":{"code":"import os"},', 1), "\ufeff" + text):  # fmt: skip
        yield "JSON of a header", under(header)
    for size in (1, 3, 4, 4096):
        yield "bytes after the tensors", under(text, data=data + rng.bytes(size))
        yield "data cut short", under(text, data=data[:-size])


def paths(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in the manifest, but of long rows of numbers only the first."""
    if place:
        yield place
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        if not isinstance(content, list) or key == 0:
            yield from paths(value, (*place, key))


def manifests_damaged(files: Files) -> Iterator[Case]:
    """Fields that are missing, of another type, or beyond their limits, with every hash right."""
    free = ("provenance", "results", "name", "training_ranges")  # where many values are as good as the right one
    for place in paths(json.loads(files[MANIFEST])):
        if place[0] == "sha256" or (place[0] in free and len(place) > 1):
            continue
        for kind, value in (("no field", ...), ("null", None), ("a text", "1e3"), ("a list", [[]]), ("an object", {}),
                            ("a huge number", 10**400), ("a negative number", -3), ("a bit", True)):  # fmt: skip
            if place[0] in free and kind in ("a text", "an object"):
                continue
            content = json.loads(files[MANIFEST])
            holder = content
            for key in place[:-1]:
                holder = holder[key]
            if value is ...:
                del holder[place[-1]]
            elif holder[place[-1]] == value:
                continue
            else:
                holder[place[-1]] = copy.deepcopy(value)
            if "files" in place:
                yield f"{kind} in files", {**files, MANIFEST: seal(content)}
            else:
                yield f"{kind} in place of a field", resealed(files, content)
    for version in (0, 3, 4, 99, 2**64, -1, 1.0, "1", True, None, [1], {"major": 1}):
        yield "another version", resealed(files, {**json.loads(files[MANIFEST]), "format_version": version})
    for name in ("loss_levle", "os.system", "../lr", "\u202elr", "\ud800"):
        for field, entry in (("signals", name), ("levers", {"name": name})):
            content = json.loads(files[MANIFEST])
            content[field][0] = {**content[field][0], **entry} if isinstance(entry, dict) else entry
            yield "an unknown name", resealed(files, content)
    for key in ("low", "high", "rate"):
        content = json.loads(files[MANIFEST])
        content["levers"][0][key] *= 1 + 1e-9
        yield "other limits of a lever", resealed(files, content)
    for row in range(8):
        content = json.loads(files[MANIFEST])
        content["golden"]["actions"][row][-1] = 0.5 - content["golden"]["actions"][row][-1] / 3
        yield "another golden vector", resealed(files, content)


def texts_damaged(files: Files) -> Iterator[Case]:
    """A manifest that says the same in another way, or that is a trap for a parser."""
    text = files[MANIFEST].decode()
    content = json.loads(text)
    clip, every = '"clip":' + json.dumps(content["normalisation"]["clip"]), f'"decide_every":{content["decide_every"]}'
    for key in content:
        repeated = "{" + json.dumps(key) + ":" + json.dumps(content[key]) + "," + text[1:]
        yield "a key twice", {**files, MANIFEST: repeated.encode()}
    for old, new in ((clip, clip + "0"), (clip, '"clip":1e1'), (every, every + ".0"),
                     (every, every + "e0"), (":", ": "), (",", ", "), ("lr", "\\u006cr")):  # fmt: skip
        yield "another spelling", {**files, MANIFEST: sealed_text(text.replace(old, new))}
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "0x10", "010", "+1", ".5", "1_000", "9" * 5000):
        yield "a number that is none", {**files, MANIFEST: text.replace(clip, f'"clip":{value}').encode()}
    size = 200_000
    for bomb in ("[" * size, '{"a":' * (size // 5), "[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900,
                 "[" + "0," * (size // 2) + "0]", "[" + "{}," * (size // 3) + "{}]", '"' + "\\u0041" * (size // 6) + '"',
                 "{" + ",".join(f'"{i}":0' for i in range(size // 10)) + "}", "[" * 7 + "0," * 9000 + "0" + "]" * 7):  # fmt: skip
        yield "a bomb", {**files, MANIFEST: bomb.encode()}
        yield "a bomb in a field", {**files, MANIFEST: text.replace(every, f'"decide_every":{bomb}').encode()}
    for big in ([0.0] * 1500, [[0.5] * 700] * 8, [["", ""] * 500] * 8, [{}] * 1000, {str(i): 1.0 for i in range(900)}):
        for field in ("signals", "levers", "golden", "results", "files"):
            yield "an outgrown field", resealed(files, {**content, field: big, "decide_every": 0})
    for padding in (b"\n", b" ", b"\x00", b"\xef\xbb\xbf", b"//", b" " * (1 << 20)):
        yield "padding", {**files, MANIFEST: files[MANIFEST] + padding}
        yield "padding", {**files, MANIFEST: padding + files[MANIFEST]}


def strangers(files: Files, rng: np.random.Generator, mark: Path) -> Iterator[Case]:
    """Pickles in every place, archives, and files that do not belong there."""
    payload = Payload(mark)
    archive, saved, arrays = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("data.pkl", pickle.dumps(payload))
    torch.save({"payload": payload}, saved)
    np.savez(arrays, np.array([payload], dtype=object))
    pickles = [*(pickle.dumps(payload, protocol) for protocol in range(6)), archive.getvalue(), saved.getvalue(),
               arrays.getvalue(), b"#!/bin/sh\ntouch " + str(mark).encode(), b"!!python/object/apply:os.system [ls]"]  # fmt: skip
    for content in pickles:
        for name in files:
            yield "a pickle in disguise", {**files, name: content}
        for name in set(files) - {MANIFEST}:
            manifest = json.loads(files[MANIFEST])
            if name == WEIGHTS:  # a graph is opaque: nothing here runs it
                yield "a pickle with a right hash", resealed(files, manifest, **{name: content})
                header = (8).to_bytes(8, "little") + b"{}      "
                yield "a pickle with a right hash", resealed(files, manifest, **{name: header + content})
        for name in ("model.pkl", "__init__.py", "policy.json.bak", "weights.bin", ".hidden", "conftest.py"):
            yield "a file too many", {**files, name: content}
    if ONNX not in files:
        yield "a graph that is not listed", {**files, ONNX: rng.bytes(100)}


def corpus(work: Path, seed: int = 0, each: int = EACH) -> Iterator[Case]:
    """All damaged bundles; ``work / "mark"`` appears if anything in them is run."""
    rng = np.random.default_rng(seed)
    first, second = originals(work)
    for files in (first, second):
        yield from bytes_damaged(files, rng, each)
        yield from weights_damaged(files, rng, each)
        yield from headers_damaged(files, rng)
        yield from manifests_damaged(files)
        yield from texts_damaged(files)
        yield from strangers(files, rng, work / "mark")
    for mine, other in ((first, second), (second, first)):
        yield "weights of another bundle", {**mine, WEIGHTS: other[WEIGHTS]}
        yield "weights of another bundle", resealed(mine, json.loads(mine[MANIFEST]), **{WEIGHTS: other[WEIGHTS]})
        yield "a manifest of another bundle", {**mine, MANIFEST: other[MANIFEST]}


@dataclass(frozen=True)
class Outcome:
    """What became of a case: ``fault`` is empty when it was refused as it should be; milliseconds of both clocks."""

    kind: str
    fault: str
    processor: float
    wall: float


def attempt(kind: str, files: Files, folder: Path) -> Outcome:
    """Loads one damaged bundle."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    begun, worked = time.perf_counter(), time.process_time()
    try:
        load_bundle(folder)
        fault = "accepted"
    except (BundleError, MismatchError) as error:
        words = str(error)
        named = str(folder) in words and any(name in words for name in (*files, MANIFEST, WEIGHTS))
        fault = "" if named and words.isprintable() and len(words) < 2000 else f"unclear: {words[:200]!r}"
    except Exception as error:  # noqa: BLE001  # anything else is what this looks for
        fault = f"{type(error).__name__}: {error}"
    return Outcome(kind, fault, 1e3 * (time.process_time() - worked), 1e3 * (time.perf_counter() - begun))


def play(work: Path, seed: int = 0, each: int = EACH) -> list[Outcome]:
    """Loads every case."""
    cases = enumerate(corpus(work, seed, each))
    outcomes = [attempt(kind, files, work / str(number)) for number, (kind, files) in cases]
    if (work / "mark").exists():
        outcomes.append(Outcome("the mark", "something was run", 0.0, 0.0))
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    gc.freeze()  # a collection of everything that torch imports takes longer than any refusal
    with tempfile.TemporaryDirectory() as work:
        outcomes = play(Path(work), args.seed)
    table = Table("damage", "cases", "refused", "median", "largest", "largest on the clock, ms", box=None)
    rows = []
    for kind in [*dict.fromkeys(outcome.kind for outcome in outcomes), "all"]:
        chosen = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        times, refused = [outcome.processor for outcome in chosen], sum(not outcome.fault for outcome in chosen)
        wall = max(outcome.wall for outcome in chosen)
        rows.append([kind, len(chosen), refused, statistics.median(times), max(times), wall])
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in rows[-1]))
    console = Console()
    console.print(table)
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults[:40]:
        console.print(f"{outcome.kind}: {outcome.fault}", markup=False)
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
