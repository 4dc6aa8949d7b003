"""The manifest of a bundle: ``policy.json``, read strictly and written in one canonical form."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trimtab.errors import BundleError

FORMAT_VERSION = 1
MANIFEST, WEIGHTS, ONNX = "policy.json", "weights.safetensors", "policy.onnx"
GOLDEN = 8  # observations that are replayed at load

Name = Annotated[str, Field(min_length=1, max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(gt=0)]
Row = list[float]


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
    var: list[Annotated[float, Field(ge=0)]]
    clip: Positive
    eps: Positive


class Network(_Strict):
    """Widths from input to output, and the activation between layers."""

    activation: Literal["tanh", "relu"]
    sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=32)]


class Ranges(_Strict):
    """Range of each signal in training."""

    low: Row
    high: Row


class Golden(_Strict):
    """Observations (8, signals) and the actions (8, levers) that they must give."""

    observations: Annotated[list[Row], Field(min_length=GOLDEN, max_length=GOLDEN)]
    actions: Annotated[list[Row], Field(min_length=GOLDEN, max_length=GOLDEN)]


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


class Manifest(_Strict):
    """Everything in a bundle but the weights.

    Attributes:
        format_version: of this file; another one is refused.
        name: of the policy.
        signals: names in the order of the observation.
        normalisation, network, action_kind: how observations become actions.
        levers: in the order of the action.
        decide_every: optimizer steps between decisions.
        recurrent_state: shapes of the state per run; empty, for a feed-forward network.
        training_ranges: of each signal.
        provenance: how it was trained.
        results: held-out results.
        golden: replayed at load.
        files: SHA-256 of each other file of the bundle.
        sha256: of this manifest in canonical form, without this field.
    """

    format_version: Literal[1]
    name: Name
    signals: Annotated[list[Name], Field(min_length=1, max_length=4096)]
    normalisation: Normalisation
    levers: Annotated[list[LeverEntry], Field(min_length=1, max_length=4096)]
    decide_every: Annotated[int, Field(ge=1)]
    action_kind: Literal["box", "multi-discrete"]
    network: Network
    recurrent_state: Annotated[list[list[int]], Field(max_length=0)]
    training_ranges: Ranges
    provenance: Provenance
    results: dict[str, float | str]
    golden: Golden
    files: dict[Literal["weights.safetensors", "policy.onnx"], Sha256]
    sha256: Sha256

    @model_validator(mode="after")
    def _fits(self) -> Self:
        signals, levers = len(self.signals), len(self.levers)
        outputs = levers * (3 if self.action_kind == "multi-discrete" else 1)
        counts = {
            "signals (different names)": (len(set(self.signals)), signals),
            "levers (different names)": (len({lever.name for lever in self.levers}), levers),
            "normalisation.mean": (len(self.normalisation.mean), signals),
            "normalisation.var": (len(self.normalisation.var), signals),
            "network.sizes (first)": (self.network.sizes[0], signals),
            "network.sizes (last)": (self.network.sizes[-1], outputs),
            "training_ranges.low": (len(self.training_ranges.low), signals),
            "training_ranges.high": (len(self.training_ranges.high), signals),
            "files (weights.safetensors)": (int(WEIGHTS in self.files), 1),
            **{f"golden.observations.{i}": (len(row), signals) for i, row in enumerate(self.golden.observations)},
            **{f"golden.actions.{i}": (len(row), levers) for i, row in enumerate(self.golden.actions)},
        }
        for field, (count, wanted) in counts.items():
            if count != wanted:
                raise ValueError(f"{field}: there are {count}, there must be {wanted}")
        pairs = zip(self.training_ranges.low, self.training_ranges.high, strict=True)
        if any(low > high for low, high in pairs):
            raise ValueError("training_ranges: low must be at most high")
        return self


def canonical(content: Any) -> bytes:
    """The one way to write some JSON content: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def seal(content: dict[str, Any]) -> bytes:
    """Bytes of ``policy.json``: the content with its ``sha256``, in canonical form.

    >>> seal({"name": "a"})[:20]
    b'{"name":"a","sha256"'
    """
    bare = {key: value for key, value in content.items() if key != "sha256"}
    return canonical({**bare, "sha256": hashlib.sha256(canonical(bare)).hexdigest()})


def validate(content: Any, where: str) -> Manifest:
    """Checks every field; ``BundleError`` names the first one that is wrong."""
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{where}: {f'{field}: ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from error


def parse(raw: bytes, where: str) -> Manifest:
    """Reads ``policy.json`` strictly.

    Args:
        raw: the bytes of the file.
        where: its path, for messages.

    Raises:
        BundleError: for anything but one JSON object in canonical form, of this format version, with exactly the
            fields of ``Manifest``, each valid, whose hash agrees.
    """
    try:
        content = json.loads(raw.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse)
        written = canonical(content)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not strict JSON: {error}") from error
    if not isinstance(content, dict):
        raise BundleError(f"{where}: it holds a {type(content).__name__}, not a JSON object")
    version = content.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BundleError(
            f"{where}: format_version is {version!r}; this version of trimtab reads {FORMAT_VERSION}; "
            "export the policy again, or upgrade trimtab"
        )
    manifest = validate(content, where)
    if seal(content) != written:
        raise BundleError(f"{where}: sha256 does not agree with the content; the file was changed after it was saved")
    if written != raw:
        raise BundleError(f"{where}: not in canonical form; the file was changed after it was saved")
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {key!r} is there twice")
        content[key] = value
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not allowed; numbers are finite")
