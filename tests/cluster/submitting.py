"""Jobs that tests submit to a Slurm of their own, and how they are waited for."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.job.read import read_job
from pipeline.submit.job import Asked, submit

ROOT = Path(__file__).parents[2]
SLOW = Path(__file__).parent / "slow"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def settings_of(cluster, patch):
    """The environment and the user's settings in which jobs reach it."""
    for name, value in {**cluster.environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}.items():
        patch.setenv(name, value)
    patch.setenv("XDG_CONFIG_HOME", str(cluster.folder / "config"))
    if not cluster.isolated:
        settings = cluster.folder / "config" / "zlora" / "settings.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text('[cluster.environment]\nMASTER_ADDR = "127.0.0.1"\n')


def submitted(place, name, *overrides, nodes="", step_s=0.0, hold=False, **options):
    """Submits the job into the run folder of that name. Returns Slurm's id."""
    more = [*([f"--nodelist={nodes}"] if nodes else []), *(["--hold"] if hold else [])]
    pinned = [f"cluster.sbatch={json.dumps(more)}"] if more else []
    slow = [f'cluster.environment.PYTHONPATH="{SLOW}:{ROOT}"', f'cluster.environment.ZLORA_TEST_STEP_S="{step_s}"'] if step_s else []
    job = read_job(place / "job.toml", (*pinned, *slow, *overrides))
    return submit(job, Asked(place / "job.toml", place / name, ("zlora", "submit", "job.toml"), **options))["job"]


def ended(slurm, job, patience_s=600):
    """Waits for the job's end; returns its state."""
    deadline = time.monotonic() + patience_s
    while (state := slurm.state(job))["JobState"] not in ENDED:
        assert time.monotonic() < deadline, state
        time.sleep(0.2)
    return state["JobState"]


def wait_for(done, what, patience_s=600):
    deadline = time.monotonic() + patience_s
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def steps_taken(run):
    file = run / "metrics.jsonl"
    return sum('"grad_norm"' in line for line in file.read_text().splitlines()) if file.exists() else 0


def log(run):
    return "\n".join(file.read_text() for file in sorted((run / "slurm").glob("*.txt")))


def instead(place, words):
    """The setting for a batch script that runs something short in the place of the ranks."""
    file = place / f"{abs(hash(words))}.sbatch"
    ending = f"exec {{{{zlora}}}} batch {{{{run}}}} -- srun {words} {{{{command}}}}"
    file.write_text(f"#!/bin/bash\n{{{{sbatch}}}}\n{{{{environment}}}}\n{ending}\n")
    return f'cluster.template="{file}"'
