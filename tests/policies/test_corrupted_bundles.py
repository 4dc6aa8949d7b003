"""More than a thousand damaged bundles, and a fuzzer: each is refused by name, quickly, and nothing in them is run."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tests.policies.made_up import learned

from trimtab.errors import BundleError
from trimtab.policies.bundle import load_bundle, save_bundle
from trimtab.policies.bundle_files import CAPS
from trimtab.policies.manifest import MANIFEST, READERS, parse, seal
from trimtab.policies.strict_json import canonical
from trimtab.policies.tensors import read_tensors


def load() -> ModuleType:
    path = Path(__file__).parents[2] / "experiments" / "corrupted_bundles.py"
    spec = importlib.util.spec_from_file_location("trimtab_corrupted_bundles", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where pickles and dataclasses look their module up
    spec.loader.exec_module(module)
    return module


corrupted = load()


def test_damaged_bundles_are_refused(tmp_path: Path) -> None:
    outcomes = corrupted.play(tmp_path, each=10)
    assert [outcome for outcome in outcomes if outcome.fault] == []
    assert len(outcomes) > 1500
    assert len({outcome.kind for outcome in outcomes}) > 40
    assert statistics.median(outcome.wall for outcome in outcomes) < 100
    assert not (tmp_path / "mark").exists()


def test_the_marks_and_the_whole_bundles_are_good(tmp_path: Path) -> None:
    """What the test above looks for would be seen: the payload leaves its mark, and without damage they load."""
    pickle.loads(pickle.dumps(corrupted.Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()
    for number, files in enumerate(corrupted.originals(tmp_path)):
        assert corrupted.attempt("whole", files, tmp_path / str(number)).fault == "accepted"
        again = corrupted.resealed(files, json.loads(files[MANIFEST]))
        assert again == files


# --- the fuzzer -------------------------------------------------------------------------------------------------

VALID: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module", autouse=True)
def valid(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, lstm in (("feed-forward", ()), ("recurrent", (6,))):
        folder = save_bundle(learned(lstm=lstm), tmp_path_factory.mktemp(name) / "b")
        VALID[name] = json.loads((folder / MANIFEST).read_bytes())


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from(["\ud800", "\x00", ""]),
    st.integers(min_value=10**18, max_value=10**400), st.sampled_from([10**4299, -(2**63), 5e-324, -0.0, 1e308]),
)  # fmt: skip
TREES = st.recursive(
    ODD,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=6), inner, max_size=6),
    max_leaves=30,
)


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) inside some JSON content."""
    if not isinstance(content, (dict, list)):
        return []
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    return [(content, key) for key in keys] + [place for key in keys for place in places(content[key])]


def mutate(draw: Any, content: dict[str, Any]) -> None:
    """Changes one place: another value, one moved here from elsewhere, nothing, a key more, or an entry repeated."""
    spots = places(content)
    holder, key = spots[draw(st.integers(0, len(spots) - 1))]
    what = draw(st.sampled_from(["value", "moved", "dropped", "key", "repeated"]))
    if what == "value":
        holder[key] = draw(TREES)
    elif what == "moved":
        other, place = spots[draw(st.integers(0, len(spots) - 1))]
        holder[key] = copy.deepcopy(other[place])
    elif what == "dropped":
        del holder[key]
    elif what == "key" and isinstance(holder, dict):
        holder[draw(st.text(max_size=9) | st.just("\udfff"))] = draw(TREES)
    elif isinstance(holder, list):
        holder[key:key] = [holder[key]] * draw(st.sampled_from([1, 2, 1100]))


def written(content: dict[str, Any], right: bool) -> bytes:
    """As a manifest, with its hash right again where that is possible."""
    try:
        return seal(content) if right else canonical(content)
    except (ValueError, RecursionError):
        return json.dumps(content).encode()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_manifests(data: st.DataObject) -> None:
    """A manifest with some fields changed and its hash right again is read, or refused by ``BundleError``."""
    content = copy.deepcopy(VALID[data.draw(st.sampled_from(["feed-forward", "recurrent"]))])
    for _ in range(data.draw(st.integers(1, 4))):
        mutate(data.draw, content)
    raw = written(content, data.draw(st.booleans()))
    assume(len(raw) <= CAPS[MANIFEST])  # more is not read
    begun = time.process_time()
    try:
        assert parse(raw, MANIFEST).format_version in READERS
    except BundleError as error:
        assert str(error).startswith(MANIFEST)
        assert len(str(error)) < 2000
    assert time.process_time() - begun < 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mangled_bytes(data: st.DataObject) -> None:
    """Raw bytes, by themselves and spliced into a manifest."""
    raw = data.draw(
        st.binary(max_size=400)
        | st.text(st.sampled_from('{}[]",:0123456789.eE+-tfnul \\'), max_size=400).map(str.encode)
    )
    if data.draw(st.booleans()):
        whole = canonical(VALID[data.draw(st.sampled_from(["feed-forward", "recurrent"]))])
        at, until = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
        if raw == whole[at:until]:
            return
        raw = whole[:at] + raw + whole[until:]
    with pytest.raises(BundleError):
        parse(raw, MANIFEST)


HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]),
    st.fixed_dictionaries({}, optional={
        "dtype": st.sampled_from(["F32", "F64", "BOOL"]) | ODD,
        "shape": st.lists(st.integers(-2, 2**65) | ODD, max_size=3) | ODD,
        "data_offsets": st.lists(st.integers(-4, 20) | ODD, max_size=3) | ODD,
    }) | TREES,
    max_size=3,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(HEADERS, st.integers(0, 30), st.none() | st.integers(0, 2**64 - 1), st.binary(max_size=30))
def test_mangled_tensors(header: dict[str, Any], size: int, length: int | None, raw: bytes) -> None:
    """Headers of any shape over data of any size, and raw bytes."""
    try:
        text = json.dumps(header, separators=(",", ":")).encode()
    except ValueError:  # a whole number of more digits than Python prints
        text = raw
    whole = (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)
    for content in (whole, raw):
        try:
            arrays = read_tensors(content, {"a": (2,), "b": (1, 2)}, "weights")
            assert {name: array.shape for name, array in arrays.items()} == {"a": (2,), "b": (1, 2)}
        except BundleError as error:
            assert str(error).startswith("weights: ")


def test_the_largest_network_that_is_allowed(tmp_path: Path) -> None:
    """It loads; one parameter more is refused when it is saved."""
    units = 1_048_576 // 10 - 1  # seven signals, two levers and a bias for each unit
    folder = save_bundle(learned(hidden=(units,)), tmp_path / "b")
    assert load_bundle(folder).sizes == [7, units, 2]
    with pytest.raises(BundleError, match="network: 1048582 parameters; at most 1048576 are allowed"):
        save_bundle(learned(hidden=(units + 2,)), tmp_path / "c")
