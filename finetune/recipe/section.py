"""What all sections of a recipe are, and the kinds of numbers that several of them have."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

_LIMIT = 10_000_000  # steps, rows: beyond this a number is a slip of the finger

Positive = Annotated[int, Field(ge=1, le=_LIMIT)]
Count = Annotated[int, Field(ge=0, le=_LIMIT)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, strict (no text taken for a number, no bool for an int), and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
