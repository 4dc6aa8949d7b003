"""The part of a scenario that says how structural levers edit."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from trimtab.envs.parts import Name, Number, Part, Whole
from trimtab.inner_training.edits import EditConfig


class StructureSettings(Part):
    """The fields of ``EditConfig``, validated."""

    criterion: Name = EditConfig.criterion
    reset_criterion: Name = EditConfig.reset_criterion
    growth: Name = EditConfig.growth
    newborn_state: Name = EditConfig.newborn_state
    scale: Number = Field(default=EditConfig.scale, ge=0, le=1000)
    normalisation: Name = EditConfig.normalisation
    scope: Name = EditConfig.scope
    batches: Whole = Field(default=EditConfig.batches, ge=1, le=1000)
    start: Number | None = Field(default=EditConfig.start, gt=0, le=1)
    least: Number = Field(default=EditConfig.least, ge=0, le=1)
    most_active: Number = Field(default=EditConfig.most_active, ge=0, le=1)
    most: Number = Field(default=EditConfig.most, gt=0, le=1)
    dead_band: Number = Field(default=EditConfig.dead_band, ge=0, lt=1)
    rest: Whole = Field(default=EditConfig.rest, ge=0, le=1000)
    budget: Whole = Field(default=EditConfig.budget, ge=0, le=1000)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.config()
        return self

    def config(self) -> EditConfig:
        """The same settings as runs take them."""
        return EditConfig(**self.model_dump())
