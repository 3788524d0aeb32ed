"""What tables of the device catalogue have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Positive", "Table", "Version"]

Positive = Annotated[int, Field(ge=1)]
Version = Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]


class Table(BaseModel):
    """A table of a target file: strict, and without keys that nobody knows."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    def facts(self) -> list[tuple[str, str]]:
        """Return what `dvexport targets NAME` shows of the table: a name and a text each."""
        return []
