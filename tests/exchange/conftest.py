"""The deltas and bases of tests/deltas."""

from __future__ import annotations

from tests.deltas.conftest import deltas, roberta_shaped

__all__ = ["deltas", "roberta_shaped"]
