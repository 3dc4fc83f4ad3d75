"""What a person sees is what is there: brackets in data and paths are text, not markup."""

from __future__ import annotations

import io
import json

from pipeline.screen import Screen, json_text


def test_brackets_are_shown_as_they_are():
    stream = io.StringIO()
    screen = Screen(stream)
    screen.table("run [x/b]", [("prompt", "[INST] hi [/INST]"), ("delta", "runs/a [red]/delta")])
    screen.print("[/b] plain [x]")
    with screen.training(2) as bar:
        bar.update(1, 0.5, 100.0)
        bar.update(2, 0.25, 100.0)
    shown = stream.getvalue()
    for text in ("run [x/b]", "[INST] hi [/INST]", "runs/a [red]/delta", "[/b] plain [x]", "step 2/2 · loss 0.2500 · 100 tokens/s"):
        assert text in shown


def test_json_has_neither_infinity_nor_nan():
    row = {"metrics": {"loss": float("inf"), "rmse": 2.0}, "rows": [float("nan"), 1, None, "é"]}

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads(json_text(row), parse_constant=refuse)
    assert read == {"metrics": {"loss": None, "rmse": 2.0}, "rows": [None, 1, None, "é"]}
