"""Parts of a scenario, each validated on its own: families, what is missing, guard, disturbances."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StrictBool,
    field_validator,
    model_validator,
)

from trimtab.errors import unknown
from trimtab.inner_training.disturbances import DisturbanceSettings
from trimtab.inner_training.guard import GuardConfig
from trimtab.inner_training.guard_config import Place
from trimtab.inner_training.lever_bounds import Bounds, check_bounds
from trimtab.inner_training.tasks import FAMILIES
from trimtab.inner_training.tasks.local_files import FORMATS, names_a_file

Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Part(BaseModel):
    """Part of a scenario: checked, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FamilyShare(Part):
    """A task family and its share of the runs.

    Attributes:
        name: a name of ``FAMILIES``, or ``module:function`` or ``format:path`` for a family of the user's own.
        share: relative to the shares of the other families, > 0.
    """

    name: Annotated[str, Field(min_length=1, max_length=4096)]
    share: Number = Field(default=1.0, gt=0, le=1e6)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        function = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name)
        if not function and not names_a_file(name) and name not in FAMILIES:
            raise unknown("task family", name, [*FAMILIES, "module:function", *(f"{form}:PATH" for form in FORMATS)])
        return name


class Missing(Part):
    """What a policy does without in some episodes, because users do.

    Attributes:
        progress: chance that an episode's budget is unknown, in [0, 1].
        validation: chance that an episode has no validation set, in [0, 1].
        validation_every_max: a validation loss arrives every 1 to this many decisions, drawn for each episode.
        measurements: chance that no further measurement reaches the signals of an episode, in [0, 1].
    """

    progress: Number = Field(default=0.2, ge=0, le=1)
    validation: Number = Field(default=0.25, ge=0, le=1)
    validation_every_max: Whole = Field(default=4, ge=1, le=1000)
    measurements: Number = Field(default=0.2, ge=0, le=1)


class GuardSettings(Part):
    """The fields of ``GuardConfig``, validated."""

    bounds: Annotated[
        Bounds,
        BeforeValidator(check_bounds),
        PlainSerializer(lambda bounds: {name: list(pair) for name, pair in bounds}, when_used="json"),
    ] = ()
    rate_scale: Number = Field(default=1.0, gt=0, le=10)
    smoothing: Number = Field(default=GuardConfig.smoothing, ge=0, lt=1)
    dead_band: Number = Field(default=GuardConfig.dead_band, ge=0, lt=1)
    hysteresis: Number = Field(default=GuardConfig.hysteresis, ge=0, lt=1)
    rest: Whole = Field(default=GuardConfig.rest, ge=0, le=1000)
    damping: Number = Field(default=GuardConfig.damping, ge=0, le=1)
    joint: StrictBool = GuardConfig.joint
    aftermath: Whole = Field(default=GuardConfig.aftermath, ge=0, le=1000)
    trial: Whole | None = Field(default=GuardConfig.trial, ge=1, le=1000)
    trial_rise: Number = Field(default=GuardConfig.trial_rise, gt=0, le=100)
    range_margin: Number | None = Field(default=GuardConfig.range_margin, gt=0, le=2)
    range_share: Number = Field(default=GuardConfig.range_share, gt=0, le=1)
    abstentions: Whole | None = Field(default=GuardConfig.abstentions, ge=1, le=10**6)
    rollback: StrictBool = True
    snapshots: Place = GuardConfig.snapshots
    rollback_budget: Whole = Field(default=4, ge=0, le=1000)
    renewal: Whole | None = Field(default=GuardConfig.renewal, ge=1, le=10**9)
    backoff: Number = Field(default=0.3, gt=0, le=1)
    recovery: Number = Field(default=GuardConfig.recovery, ge=1, le=100)
    explosion: Number = Field(default=10.0, gt=1, le=1e6)
    setback: Number | None = Field(default=GuardConfig.setback, gt=0, le=100)
    patience: Whole = Field(default=GuardConfig.patience, ge=1, le=10**6)
    curvature_share: Number | None = Field(default=None, gt=0, le=1)
    decay_power: Number | None = Field(default=None, gt=0.5, le=1)
    decay_factor: Number = Field(default=10.0, gt=0, le=1e4)
    decay_after: Whole = Field(default=100, ge=1, le=10**9)

    def config(self) -> GuardConfig:
        """The same settings as the guard takes them."""
        return GuardConfig(**self.model_dump())


class DisturbanceEntry(Part):
    """The fields of ``DisturbanceSettings``, validated: one kind of fault, at a known time or at random.

    Attributes:
        kind: a name of ``DISTURBANCES``.
        at: a share of the budget below 1, or a whole number of steps from 1 on.
        rate: expected number per run, above 0.
        steps: how many steps it lasts; None draws from the kind's range.
        severity: in the kind's unit; None draws from the kind's range.
    """

    kind: Name
    at: Number | None = None
    rate: Number | None = None
    steps: Whole | None = None
    severity: Number | None = None

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.settings()
        return self

    def settings(self) -> DisturbanceSettings:
        """The same entry as a population takes it."""
        return DisturbanceSettings(**self.model_dump())
