"""The manifest of a bundle: ``policy.json``, read strictly and written in one canonical form.

Version 1 is of feed-forward networks, version 2 of those with an LSTM; a bundle is written in the lowest version that
can say what it holds, and every version is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from trimtab.errors import BundleError, UserError
from trimtab.policies.defects import Refuse, at_once, refuse_all
from trimtab.policies.lstm import state_names
from trimtab.policies.strict_json import (
    MOST_ENTRIES,
    canonical,
    fields_with_half_characters,
    read_object,
    short,
)

MANIFEST, WEIGHTS, ONNX = "policy.json", "weights.safetensors", "policy.onnx"
GOLDEN = 8  # decisions that are replayed at load
MOST_PARAMETERS = (
    1 << 20
)  # of a network, 4 MiB; a policy must decide in microseconds, and a refusal take few milliseconds

Name = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Width = Annotated[int, Field(ge=1, le=MOST_PARAMETERS)]
Row = Annotated[list[float], Field(max_length=MOST_ENTRIES), FailFast()]
Rows = Annotated[list[Row], Field(min_length=GOLDEN, max_length=GOLDEN)]


class _Strict(BaseModel):
    """No unknown keys, no coercion, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LeverEntry(_Strict):
    """One lever, with what gave its moves their meaning in training (``LeverLimits``)."""

    name: Name
    kind: Literal["moves"]
    low: Positive
    high: Positive
    rate: Positive


class Normalisation(_Strict):
    """``VecNormalize``: clip((observation - mean) / sqrt(var + eps), -clip, clip); one entry per signal."""

    mean: Row
    var: Annotated[list[Annotated[float, Field(ge=0)]], Field(max_length=MOST_ENTRIES), FailFast()]
    clip: Positive
    eps: Positive


class Network(_Strict):
    """Widths from input to output, and the activation between layers."""

    activation: Literal["tanh", "relu"]
    sizes: Annotated[list[Width], Field(min_length=2, max_length=32)]


class RecurrentNetwork(Network):
    """Before these layers, which read the last one's hidden state, LSTM layers of so many units."""

    lstm: Annotated[list[Width], Field(min_length=1, max_length=4)]


class Ranges(_Strict):
    """Range of each signal in training."""

    low: Row
    high: Row


class Golden(_Strict):
    """Observations (8, signals) of eight runs and the actions (8, levers) that they must give."""

    observations: Rows
    actions: Rows


class GoldenSequence(Golden):
    """Eight successive observations of one run, the actions that they must give, and the state after the last one."""

    state: dict[str, Row]


class Provenance(_Strict):
    """How the policy was trained; everything is optional, so that a hand-made policy can be saved.

    Attributes:
        scenario: id of the scenario.
        families: task families of the training tasks.
        algorithm: learning algorithm.
        timesteps: environment steps.
        seed: of the training.
        command: that repeats it.
        versions: package to version.
        settings: of the algorithm and of the scenario, name to value.
    """

    scenario: str = ""
    families: list[str] = []
    algorithm: str = ""
    timesteps: Annotated[int, Field(ge=0)] | None = None
    seed: int | None = None
    command: str = ""
    versions: dict[str, str] = {}
    settings: dict[str, bool | int | float | str | None] = {}


class _Manifest(_Strict):
    """What is in the manifest of every version; shapes must agree with one another."""

    format_version: int
    name: Name
    signals: Annotated[list[Name], Field(min_length=1, max_length=MOST_ENTRIES)]
    normalisation: Normalisation
    levers: Annotated[list[LeverEntry], Field(min_length=1, max_length=MOST_ENTRIES), FailFast()]
    decide_every: Annotated[int, Field(ge=1, le=10**9)]
    action_kind: Literal["box", "multi-discrete"]
    network: Network
    training_ranges: Ranges
    provenance: Provenance
    results: dict[str, float | str]
    golden: Golden
    files: dict[Literal["weights.safetensors", "policy.onnx"], Sha256]
    sha256: Sha256

    @property
    def lstm(self) -> list[int]:
        """Units of the LSTM layers; empty for a feed-forward network."""
        return self.network.lstm if isinstance(self.network, RecurrentNetwork) else []

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor of the weights."""
        shapes: dict[str, tuple[int, ...]] = {}
        for number, (width, units) in enumerate(pairwise([len(self.signals), *self.lstm])):
            shapes[f"lstm.{number}.input_weight"], shapes[f"lstm.{number}.bias"] = (4 * units, width), (4 * units,)
            shapes[f"lstm.{number}.state_weight"] = (4 * units, units)
        for number, (width, out) in enumerate(pairwise(self.network.sizes)):
            shapes[f"layers.{number}.weight"], shapes[f"layers.{number}.bias"] = (out, width), (out,)
        return shapes

    def states(self) -> dict[str, list[int]]:
        """Name and shape, per run, of each array of the recurrent state."""
        pairs = zip(self.lstm, state_names(len(self.lstm)), strict=True)
        return {name: [units] for units, names in pairs for name in names}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        signals, levers = len(self.signals), len(self.levers)
        counts = {
            "signals (different names)": (len(set(self.signals)), signals),
            "levers (different names)": (len({lever.name for lever in self.levers}), levers),
            "normalisation.mean": (len(self.normalisation.mean), signals),
            "normalisation.var": (len(self.normalisation.var), signals),
            "network.sizes (first)": (self.network.sizes[0], [signals, *self.lstm][-1]),
            "network.sizes (last)": (self.network.sizes[-1], levers * (3 if self.action_kind != "box" else 1)),
            "training_ranges.low": (len(self.training_ranges.low), signals),
            "training_ranges.high": (len(self.training_ranges.high), signals),
            "files (weights.safetensors)": (int(WEIGHTS in self.files), 1),
            **{f"golden.observations.{i}": (len(row), signals) for i, row in enumerate(self.golden.observations)},
            **{f"golden.actions.{i}": (len(row), levers) for i, row in enumerate(self.golden.actions)},
        }
        wrong = [
            f"{field}: there are {count}, there must be {wanted}"
            for field, (count, wanted) in counts.items()
            if count != wanted
        ]
        words = {"provenance": self.provenance.model_dump(), "results": self.results}
        wrong += [f"{field}: half a character; give whole ones" for field in fields_with_half_characters(words)]
        pairs = zip(self.training_ranges.low, self.training_ranges.high, strict=False)
        if any(low > high for low, high in pairs):
            wrong.append("training_ranges: low must be at most high")
        parameters = sum(prod(shape) for shape in self.tensors().values())
        if parameters > MOST_PARAMETERS:
            wrong.append(f"network: {parameters} parameters; at most {MOST_PARAMETERS} are allowed")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class Manifest(_Manifest):
    """Everything in a bundle but the weights; version 1, a feed-forward network.

    Attributes:
        format_version: of this file; an unknown one is refused.
        name: of the policy.
        signals: names in the order of the observation.
        normalisation, network, action_kind: how observations become actions.
        levers: in the order of the action.
        decide_every: optimizer steps between decisions.
        recurrent_state: empty.
        training_ranges: of each signal.
        provenance: how it was trained.
        results: held-out results.
        golden: replayed at load.
        files: SHA-256 of each other file of the bundle.
        sha256: of this manifest in canonical form, without this field.
    """

    format_version: Literal[1]
    recurrent_state: Annotated[list[list[int]], Field(max_length=0)]


class RecurrentManifest(_Manifest):
    """Version 2: the network begins with an LSTM, whose state the caller keeps.

    Attributes:
        network: with the units of the LSTM layers.
        recurrent_state: name to shape, per run, of each array of the state; zeros at the start of a run.
        golden: one run from its start, with its last state.
    """

    format_version: Literal[2]
    network: RecurrentNetwork
    recurrent_state: dict[str, list[int]]
    golden: GoldenSequence

    @model_validator(mode="after")
    def _has_its_state(self) -> Self:
        wanted = self.states()
        if self.recurrent_state != wanted:
            raise ValueError(f"recurrent_state: it is {short(self.recurrent_state)}, it must be {short(wanted)}")
        shapes = {name: [len(row)] for name, row in self.golden.state.items()}
        if shapes != wanted:
            raise ValueError(f"golden.state: it is of shape {short(shapes)}, it must be {short(wanted)}")
        return self


AnyManifest = Manifest | RecurrentManifest
READERS: Mapping[int, type[AnyManifest]] = {1: Manifest, 2: RecurrentManifest}


def seal(content: dict[str, Any]) -> bytes:
    """Bytes of ``policy.json``: the content with its ``sha256``, in canonical form.

    >>> seal({"name": "a"})[:20]
    b'{"name":"a","sha256"'
    """
    bare = {key: value for key, value in content.items() if key != "sha256"}
    return canonical({**bare, "sha256": hashlib.sha256(canonical(bare)).hexdigest()})


def validate(content: Mapping[str, Any], where: str, refuse: Refuse = at_once) -> AnyManifest:
    """Checks version and every field; ``BundleError`` names the first one that is wrong.

    Args:
        content: of the manifest.
        where: the path of the file, for messages.
        refuse: called with each wrong field but the last, which is raised.
    """
    version = content.get("format_version")
    if type(version) is not int or version not in READERS:
        raise BundleError(
            f"{where}: format_version is {short(version)}; this version of trimtab reads "
            f"{' and '.join(map(str, READERS))}; export the policy again, or upgrade trimtab"
        )
    try:
        return READERS[version].model_validate(content)
    except ValidationError as error:
        wrong: list[UserError] = []
        for one in error.errors(include_url=False, include_input=False, include_context=False):
            field = ".".join(str(part) for part in one["loc"])
            field = field.encode("unicode_escape").decode()  # a key may hold control characters
            what = one["msg"].removeprefix("Value error, ")
            wrong.append(BundleError(f"{where}: {f'{field[:200]}: ' if field else ''}{what}"))
        refuse_all(wrong, refuse)
        raise


def parse(raw: bytes, where: str, refuse: Refuse = at_once) -> AnyManifest:
    """Reads ``policy.json`` strictly.

    Args:
        raw: the bytes of the file.
        where: its path, for messages.
        refuse: called with each defect after which there is something left to check.

    Raises:
        BundleError: for anything but one JSON object in canonical form, of a format version that is known, with
            exactly the fields of its manifest, each valid, whose hash agrees.
    """
    content = read_object(raw, where)
    manifest = validate(content, where, refuse)
    written = canonical(content)
    if seal(content) != written:
        refuse(BundleError(f"{where}: sha256 does not agree with the content; the file was changed after it was saved"))
    if written != raw:
        refuse(BundleError(f"{where}: not in canonical form; the file was changed after it was saved"))
    return manifest
