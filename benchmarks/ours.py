"""`zlora` as users run it, with somebody who takes down each step; and what the other ways need to do the same: examples in order, first A.

    python benchmarks/ours.py OUT train JOB --ranks 2 ...

Each rank writes OUT/rank<N>.json (see `tally.py`); the first also OUT/given.json (the examples of each step: index, tokens, where the
learnt part begins) and OUT/a.safetensors (A of each adapted module), before its first step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline.cluster.launch
from pipeline.cli import main

HERE = Path(__file__).parent
OUT = "ZLORA_BENCHMARK_OUT"


def launcher() -> None:
    os.environ[OUT] = sys.argv.pop(1)
    # A rank is this file again, not the program itself.
    pipeline.cluster.launch.PROGRAM = f"import sys; sys.path.insert(0, {str(HERE)!r}); import ours; ours.rank()"
    main()


def rank() -> None:
    from tally import Tally

    import pipeline.rank

    out = Path(os.environ[OUT])
    tally = Tally(out / f"rank{os.environ['RANK']}.json")
    as_rank = pipeline.rank.as_rank

    def counted(run: Path, body: Callable[..., Any], **options: Any) -> None:
        def watched(ranks: Any, screen: Any) -> Any:
            _watch(tally, out)
            return body(ranks, screen)

        as_rank(run, watched, **options)

    pipeline.rank.as_rank = counted
    main()


def _watch(tally: Any, out: Path) -> None:
    """Puts the tally at the places where training writes down what it did."""
    import pipeline.run

    class Watched(pipeline.run.Writer):
        def __init__(self, session: Any, run: Path, course: Any, *others: Any) -> None:
            super().__init__(session, run, course, *others)
            if session.ranks.first:
                _give(session, course, out)
            tally.base(session.root)

        def took(self, taken: Any) -> None:
            super().took(taken)
            tally.took(taken.values["loss"])

        def conclude(self, step: int) -> Any:
            result = super().conclude(step)
            tally.write()
            return result

    pipeline.run.Writer = Watched


def _give(session: Any, course: Any, out: Path) -> None:
    from safetensors.torch import save_file

    from pipeline.methods.lora import to_peft

    if (out / "given.json").exists():
        return
    values = session.delta.tensors()
    adapted = {one.module: to_peft(one, values).a.detach().contiguous() for one in session.delta.adapted}
    save_file(adapted, out / "a.safetensors")
    steps = []
    for step in range(course.steps):
        sequences = {index: course.data[index] for index in course.examples(step)}
        steps.append([{"index": i, "tokens": list(s.tokens), "learnt_from": s.spans[0][0]} for i, s in sequences.items()])
    (out / "given.json").write_text(json.dumps(steps), encoding="utf-8")


if __name__ == "__main__":
    launcher()
