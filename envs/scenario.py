"""Scenarios: task families, levers, signals, guard and reward; everything that defines an environment, as one value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from trimtab.envs.config import explain, read_yaml
from trimtab.envs.parts import DisturbanceEntry, FamilyShare, GuardSettings, Missing, Name, Number, Part, Whole
from trimtab.envs.rewards import default_weights
from trimtab.envs.structure_part import StructureSettings
from trimtab.errors import ConfigError, UserError, unknown
from trimtab.inner_training.disturbances import DisturbanceSettings
from trimtab.inner_training.edits import EDITS, nudged
from trimtab.inner_training.levers import LEVERS
from trimtab.inner_training.signals import SIGNALS, all_signals, lever_signals
from trimtab.inner_training.tasks.local_files import family_name, names_a_file

DEFAULT_LEVERS = ("lr", "momentum", "weight_decay", "grad_clip")


def default_signals(levers: Iterable[str]) -> tuple[str, ...]:
    """Names of the signals that a scenario with these levers observes unless it names its own.

    Those of the group ``scale`` are left out: they hardly vary among the runs of one architecture, so a policy that
    learned with them would meet values out of its range on any other, and a live run does not know its batch size.
    So are those whose row says ``default=False``, but for those of the group ``structure`` where a lever edits it.

    >>> default_signals(["lr"])[-3:]
    ('lr_position', 'lr_moved', 'lr_available')
    """
    levers = tuple(levers)
    edited = any(name in EDITS for name in levers)
    left_out = {
        name
        for name, signal in SIGNALS.items()
        if signal.group == "scale" or not (signal.default or (edited and signal.group == "structure"))
    }
    return tuple(name for name in known_signals(levers) if name not in left_out)


def known_signals(levers: Iterable[str]) -> tuple[str, ...]:
    """Names of every signal that concerns a run with these levers."""
    return (*SIGNALS, *(signal.name for name in nudged(levers) for signal in lever_signals(LEVERS[name])))


class Scenario(Part):
    """Everything that defines an environment.

    Attributes:
        id: lower-case words joined by hyphens.
        doc: one line for tables.
        families: task families with their shares of the runs; a plain name has share 1.
        levers: names of the levers that a policy may move, in the order of the action.
        signals: names of the signals, in the order of the observation; see ``default_signals``.
        interval: optimizer steps per decision.
        val_examples: validation examples evaluated at each decision, at most.
        missing: what a policy does without in some episodes.
        guard: settings of the guard.
        reward: weight of each term, >= 0; terms that are not named keep their default weight.
        structure: how structural levers edit; None where there are none, else the defaults unless it is given.
        disturbances: the faults that may befall every run; see docs/disturbances.md.
        deadline: time that a run may take beyond its budget, as a share of it, in units of a usual step; an episode
            whose clock passes it is over. None is none.
        action: ``"box"``, moves in [-1, 1], or ``"multi-discrete"``, {down, hold, up} as {0, 1, 2}.

    Raises:
        pydantic.ValidationError: when a value is out of its bounds; ``Scenario.of`` and ``load_scenario`` raise
            ``ConfigError`` instead.
    """

    id: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=64)
    doc: str = Field(default="", max_length=500)
    families: tuple[FamilyShare, ...] = Field(min_length=1, max_length=32)
    levers: tuple[Name, ...] = Field(default=DEFAULT_LEVERS, min_length=1, max_length=64)
    signals: tuple[Name, ...] = Field(default=(), min_length=1, max_length=1000)
    interval: Whole = Field(default=10, ge=1, le=1000)
    val_examples: Whole = Field(default=128, ge=64, le=100_000)
    missing: Missing = Missing()
    guard: GuardSettings = GuardSettings()
    structure: StructureSettings | None = None
    reward: dict[str, Annotated[Number, Field(ge=0, le=1000)]] = Field(default_factory=default_weights)
    disturbances: tuple[DisturbanceEntry, ...] = Field(default=(), max_length=64)
    deadline: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=0, le=1000)] | None = None
    action: Literal["box", "multi-discrete"] = "box"

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if isinstance(data.get("families"), list | tuple):
            data["families"] = [{"name": one} if isinstance(one, str) else one for one in data["families"]]
        if "signals" not in data:
            levers = data.get("levers", DEFAULT_LEVERS)
            given = levers if isinstance(levers, list | tuple) else ()
            known = [one for one in given if isinstance(one, str) and (one in LEVERS or one in EDITS)]
            data["signals"] = default_signals(known)
        if data.get("structure") is None and _edited(data):
            data["structure"] = StructureSettings()
        if isinstance(data.get("reward"), Mapping):
            data["reward"] = {**default_weights(), **data["reward"]}
        return data

    @field_validator("levers")
    @classmethod
    def _known_levers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _names("lever", names, (*LEVERS, *EDITS))

    @field_validator("signals")
    @classmethod
    def _known_signals(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return _names("signal", names, all_signals())

    @field_validator("families")
    @classmethod
    def _distinct_families(cls, families: tuple[FamilyShare, ...]) -> tuple[FamilyShare, ...]:
        _names("task family", [one.name for one in families], [one.name for one in families])
        seen: dict[str, str] = {}
        for one in families:
            form, _, path = one.name.partition(":")
            known = family_name(form, Path(path)) if names_a_file(one.name) else one.name
            if known in seen:
                raise ValueError(
                    f"{seen[known]!r} and {one.name!r} are both the family {known!r}; rename one of the files"
                )
            seen[known] = one.name
        return families

    @field_validator("reward")
    @classmethod
    def _known_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        _names("reward term", list(weights), default_weights())
        if not any(weights.values()):
            raise ConfigError(f"every weight is 0; give a positive weight to one of: {', '.join(weights)}")
        return weights

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.structure is not None and not any(name in EDITS for name in self.levers):
            raise ConfigError(
                f"structure: no lever among levers edits it; add one of {', '.join(EDITS)}, or leave structure out"
            )
        concerning = known_signals(self.levers)
        for name in self.signals:
            if name not in concerning:
                raise ConfigError(
                    f"signals: {name!r} tells about a lever that is not among levers; "
                    f"add its lever, or leave the signal out; allowed: {', '.join(concerning)}"
                )
        return self

    @property
    def disturbance_settings(self) -> tuple[DisturbanceSettings, ...]:
        """The disturbances as a population takes them."""
        return tuple(one.settings() for one in self.disturbances)

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str = "scenario") -> Scenario:
        """Validates values, with errors of one sentence.

        Args:
            values: keys and values as in a YAML file; ``extends`` names a scenario of the catalogue to start from.
            source: where the values came from, for the message.

        Raises:
            ConfigError: when they do not validate; the message names key, value and what is allowed.
        """
        try:
            return cls.model_validate(_extended(values))
        except ValidationError as error:
            raise explain(error, cls, source) from error
        except UserError as error:
            raise ConfigError(f"{source}: {error}") from error

    def replace(self, **changes: Any) -> Scenario:
        """The same scenario with some fields changed, validated again.

        >>> from trimtab.envs.catalogue import SCENARIOS
        >>> SCENARIOS["digits-mlp"].replace(interval=20).interval
        20
        """
        return Scenario.of({**self.model_dump(), **changes}, f"scenario {self.id!r}")

    def to_yaml(self) -> str:
        """YAML text that ``load_scenario`` reads back as an equal scenario."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        return text


def _edited(data: Mapping[str, Any]) -> bool:
    levers = data.get("levers")
    return isinstance(levers, list | tuple) and any(name in levers for name in EDITS)


def _names(kind: str, names: Iterable[str], allowed: Iterable[str]) -> tuple[str, ...]:
    """The names as they are; an unknown or a repeated one is refused."""
    names, allowed = tuple(names), tuple(allowed)
    for place, name in enumerate(names):
        if name not in allowed:
            raise unknown(kind, name, allowed)
        if name in names[:place]:
            raise ConfigError(f"{kind} {name!r} is given twice; name each one once")
    return names


def _extended(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Puts values on top of those of the scenario that ``extends`` names; only id and doc are not inherited."""
    if "extends" not in values:
        return values
    from trimtab.envs.catalogue import SCENARIOS

    if not isinstance(values["extends"], str) or values["extends"] not in SCENARIOS:
        raise unknown("scenario to extend", values["extends"], SCENARIOS)
    inherited = SCENARIOS[values["extends"]].model_dump(mode="json", exclude={"id", "doc"})
    if "levers" in values:
        del inherited["signals"]  # they follow the levers, unless they are given too
        if not _edited(values):
            del inherited["structure"]
    merged = dict(inherited)
    for key, value in values.items():
        nested = isinstance(value, Mapping) and isinstance(inherited.get(key), Mapping)
        merged[key] = {**inherited[key], **value} if nested else value
    del merged["extends"]
    return merged


def load_scenario(source: str | Path | Scenario) -> Scenario:
    """Finds a scenario.

    Args:
        source: an id of the catalogue, the path of a ``.yaml`` or ``.yml`` file, or a scenario, which is returned.

    Raises:
        UserError: when the id is unknown, or the file is missing or does not validate.

    >>> load_scenario("digits-mlp").interval
    10
    """
    if isinstance(source, Scenario):
        return source
    if not isinstance(source, str | Path):
        raise ConfigError(f"a scenario is given by its id or the path of a YAML file, not as {type(source).__name__}")
    if isinstance(source, Path) or source.endswith((".yaml", ".yml")):
        path = Path(source)
        return Scenario.of(read_yaml(path), str(path))
    from trimtab.envs.catalogue import SCENARIOS

    if source not in SCENARIOS:
        raise unknown("scenario", source, [*SCENARIOS, "FILE.yaml"])
    return SCENARIOS[source]
