"""What files say of a run, as frozen values: what all such records share, and the data that was trained on. No torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataFile(Row):
    """What was trained on from one file, after tokenisation and cutting."""

    file: str
    examples: int
    sha256: str
    """Of token ids and what is learnt of them, in order."""
