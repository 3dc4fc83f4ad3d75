"""`zlora submit` without a Slurm: whose settings count, what is refused before the queue, and that nothing is written or left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.record import Submitted, events
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml, read_job, with_settings
from pipeline.plan.hardware import GIB
from pipeline.planning.job import make_plan
from pipeline.submit import job as submitting
from pipeline.submit.job import Asked, submit
from pipeline.submit.sweep import submit_sweep
from pipeline.sweeping import runs_of
from tests.training import write_job

ROOT = Path(__file__).parents[2]
SBATCH = """#!/bin/sh
env > "{folder}/environment"; echo "$PWD" "$@" > "{folder}/asked"
[ -e "{folder}/refuse" ] && {{ echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1; }}
echo "77;cluster"
"""


@pytest.fixture
def place(gpt2_base, tmp_path, monkeypatch):
    """A folder with a job; settings of the user's; stand-ins for Slurm's commands."""
    write_job(tmp_path, gpt2_base)
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(folder=tmp_path)),
        ("scontrol", '#!/bin/sh\necho "JobId=77 JobState=RUNNING Reason=None"\n'),
    ):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config" / "zlora").mkdir(parents=True)
    return tmp_path


def settings(place, text):
    (place / "config" / "zlora" / "settings.toml").write_text(text)


def ask(place, *overrides, **options):
    job = place / "job.toml"
    return submit(read_job(job, overrides), Asked(job, place / "runs" / "job", ("zlora", "submit", "job.toml"), **options))


def lines(found):
    return [line.removeprefix("#SBATCH --") for line in found["text"].splitlines() if line.startswith("#SBATCH")]


def test_the_command_goes_before_the_job_the_job_before_the_settings(place):
    settings(
        place,
        '[cluster]\npartition = "mine"\naccount = "lab"\ngpus_per_node = 8\nsetup = ["a"]\nnodes = 2\n'
        '[cluster.environment]\nA = "1"\nB = "1"\n',
    )
    job = place / "job.toml"
    job.write_text(
        job.read_text()
        + '[cluster]\naccount = "other"\nranks_per_node = 3\nnodes = 1\nsetup = ["b", "c"]\n[cluster.environment]\nB = "2"\n'
    )
    cluster = with_settings(read_job(job, ("cluster.nodes=4",))).cluster
    assert (cluster.partition, cluster.account, cluster.nodes, cluster.setup) == ("mine", "other", 4, ("b", "c"))
    assert (cluster.gpus_per_node, cluster.ranks_per_node) == (None, 3)
    assert cluster.environment == {"A": "1", "B": "2"}
    assert with_settings(read_job(job, ("cluster.gpus_per_node=2",))).cluster.ranks_per_node is None
    assert job_digest(read_job(job)) == job_digest(read_job(job, ("cluster.nodes=9",)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[cluster]\npartitoin = "x"', 'cluster.partitoin: unknown key. Did you mean "partition"?'),
        ("[cluster]\nnodes = 0", "cluster.nodes = 0: input should be greater than"),
        ("cluster = 3", "cluster = 3: not a section"),
        ('[cluster.environment]\nWANDB_API_KEY = "x"', "WANDB_API_KEY in a batch script could be read by others"),
    ],
)
def test_a_mistake_in_the_settings_is_named_by_file_and_key(place, text, says):
    settings(place, text)
    with pytest.raises(JobError) as caught:
        ask(place)
    assert str(caught.value).startswith(str(place / "config" / "zlora" / "settings.toml"))
    assert says in str(caught.value)


def test_a_submission_leaves_a_script_a_frozen_job_and_a_line(place, monkeypatch):
    for name in ("RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_EXPORT", "MINE"):
        monkeypatch.setenv(name, "here")
    found = ask(place, "cluster.ranks_per_node=2", 'cluster.partition="cpu"', "train.steps=7", after="12")
    run = place / "runs" / "job"
    assert found["job"] == "77"
    assert (place / "asked").read_text() == f"{run}/slurm --parsable --dependency=afterok:12 --kill-on-invalid-dep=yes ./1.sbatch\n"
    told = dict(line.split("=", 1) for line in (place / "environment").read_text().splitlines() if "=" in line)
    assert told["MINE"] == told["SBATCH_ACCOUNT"] == "here"
    assert not {"RANK", "SLURM_JOB_ID", "SBATCH_PARTITION", "SBATCH_EXPORT"} & set(told)
    frozen = read_job(run / "slurm" / "1.toml")
    assert frozen.train.steps == 7
    assert job_digest(frozen) == job_digest(read_job(place / "job.toml", ("train.steps=7",)))
    assert 'config = "zero3.json"' in (run / "slurm" / "1.toml").read_text()
    (event,) = events(run)
    assert isinstance(event, Submitted)
    assert (event.job, event.script, event.nodes, event.ranks_per_node, event.after) == ("77", "slurm/1.sbatch", 1, 2, "12")
    assert event.job_digest in (run / event.script).read_text().splitlines()[2]
    with pytest.raises(JobError, match=r"job 77 works on it already \(RUNNING\)"):
        ask(place, "cluster.ranks_per_node=2")
    assert ask(place, "cluster.ranks_per_node=2", after="77")["script"].endswith("2.sbatch")


def test_what_slurm_refuses_leaves_nothing(place):
    (place / "refuse").touch()
    with pytest.raises(JobError, match=r"sbatch: Batch job submission failed: Invalid account. Correct"):
        ask(place, "cluster.ranks_per_node=2")
    assert not (place / "runs").exists()


def test_what_cannot_work_is_refused_before_the_queue(place, monkeypatch):
    def refused(*overrides, **options):
        with pytest.raises(JobError) as caught:
            ask(place, *overrides, **options)
        assert not (place / "asked").exists()
        return str(caught.value)

    assert "Give --gpus-per-node N, or cluster.ranks_per_node" in refused()
    assert "asked to save by SIGUSR1. Add it." in refused("cluster.ranks_per_node=1", 'train.stop_signals=["SIGTERM"]')
    for name in ("a%j", "a\\b"):
        with pytest.raises(JobError, match="Slurm does not take"):
            submit(read_job(place / "job.toml", ("cluster.ranks_per_node=1",)), Asked(place / "job.toml", place / name, ()))
    gpus = ("cluster.gpus_per_node=2", 'cluster.gpu="v100"')
    assert "--gpu v100: several of that name" in refused(*gpus)
    assert "v100-16g does not compute in bf16" in refused("cluster.gpus_per_node=2", 'cluster.gpu="v100-16g"', "base.dtype=bf16")
    monkeypatch.setattr("pipeline.plan.hardware.main_memory_bytes", lambda: GIB // 4)
    said = refused("cluster.ranks_per_node=2")
    assert "does not fit on 2 x cpu: " in said
    assert "of 0.1 GiB a rank. Use" in said
    assert said.endswith("--force submits it all the same.")
    forced = ask(place, "cluster.ranks_per_node=2", force=True)
    assert forced["job"] == "77"
    assert forced["plan"]["fits"] is False
    assert "does not fit" in forced["notes"][0]


def test_every_member_of_a_sweep_is_planned_and_those_alike_once(place, monkeypatch):
    job = place / "study.toml"
    text = '[cluster]\nranks_per_node = 1\n[sweep.grid]\n"train.micro_batch_tokens" = [1024, {}]\n"train.seed" = [1, 2]\n'

    def ask_for(tokens):
        job.write_text((place / "job.toml").read_text() + text.format(tokens))
        runs = runs_of(job, place / "runs" / "study")
        return submit_sweep(read_job(job), runs, Asked(job, place / "runs" / "study", (), dry_run=True))

    planned = []
    monkeypatch.setattr(submitting, "make_plan", lambda *words: planned.append(words) or make_plan(*words))
    monkeypatch.setattr("pipeline.plan.hardware.main_memory_bytes", lambda: 8 * GIB)
    assert len(ask_for(2048)["members"]) == 4
    assert [words[0].train.micro_batch_tokens for words in planned] == [1024, 2048]
    with pytest.raises(JobError, match=r"sweep \(micro_batch_tokens=16777216,seed=1\): .*study.toml: does not fit on 1 x cpu"):
        ask_for(1 << 24)
    assert not (place / "asked").exists()
    said = subprocess.run(
        [sys.executable, "-m", "pipeline", "plan", str(job), "--gpu", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert "study.toml has a [sweep], and this is of the job as it stands" in said.stderr


def test_a_login_node_needs_none_of_the_libraries_that_train(place):
    """Commands of the queue where torch and all that comes with it is not installed."""
    absent = place / "absent"
    absent.mkdir()
    (absent / "sitecustomize.py").write_text(
        "import sys\nfor name in ('torch', 'deepspeed', 'transformers', 'accelerate', 'datasets', 'safetensors', 'numpy', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
    )
    squeue = place / "bin" / "squeue"
    squeue.write_text('#!/bin/sh\necho "77|PENDING||4:00:00|Priority"\n')
    (place / "bin" / "scancel").write_text("#!/bin/sh\n")
    for name in ("squeue", "scancel"):
        (place / "bin" / name).chmod(0o755)
    (place / "study.toml").write_text((place / "job.toml").read_text() + '[sweep.grid]\n"train.seed" = [1, 2]\n')
    done = place / "done"
    done.mkdir()
    (done / "environment.json").write_text("{}")
    (done / "job.toml").write_text(job_toml(read_job(place / "job.toml")))
    ranks = ("--set", "cluster.ranks_per_node=1")

    def zlora(*words, code=0):
        environment = {**os.environ, "PYTHONPATH": f"{absent}:{ROOT}"}
        found = subprocess.run([sys.executable, "-m", "pipeline", *words], capture_output=True, text=True, env=environment, check=False)
        assert found.returncode == code, (words, found.stderr)
        return found.stdout + found.stderr

    assert (
        "halted; None in sys.modules"
        in subprocess.run(
            [sys.executable, "-c", "import torch"],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(absent)},
            check=False,
        ).stderr
    )
    assert "77" in zlora("submit", "job.toml", *ranks)
    assert "members  2" in zlora("submit", "study.toml", *ranks)
    assert "waits behind jobs of higher priority" in zlora("status")
    (place / "runs" / "job" / "slurm" / "77.txt").write_text("hello\n")
    assert zlora("logs", "runs/job") == "hello\n"
    assert "job 77 (train) cancelled" in zlora("cancel", "runs/job")
    assert "not counted: done: not begun" in zlora("compare", "done", "done")
    assert "# member seed=2" in zlora("check", "study.toml")
    assert "fits" in zlora("plan", "job.toml", "--gpu", "a100-80g")
    assert "has no [sweep]" in zlora("sweep", "job.toml", code=2)


def test_a_run_of_another_job_is_refused_now(place):
    run = place / "runs" / "job"
    run.mkdir(parents=True)
    (run / "environment.json").write_text("{}")
    (run / "job.toml").write_text(job_toml(read_job(place / "job.toml", ("train.learning_rate=0.5",))))
    with pytest.raises(JobError, match=r"holds a run of a job with another course: train.learning_rate"):
        ask(place, "cluster.ranks_per_node=1")
    assert ask(place, "cluster.ranks_per_node=1", accept_changes=True)["text"].rstrip().endswith("--accept-changes")
    assert ask(place, "cluster.ranks_per_node=1", fresh=True, after="77")["text"].rstrip().endswith("--fresh")


def test_a_gpu_that_is_not_known_is_said(place):
    found = ask(place, "cluster.gpus_per_node=2", dry_run=True)
    assert found["plan"] is None
    assert "not planned: which GPUs the nodes have is not known. Name them: --gpu a100-80g, or cluster.gpu" in found["notes"][0]
    assert ask(place, "cluster.gpus_per_node=2", 'cluster.gpu="a100-80g"', dry_run=True)["plan"]["fits"]


def test_the_command_shows_the_script_without_torch_and_writes_nothing(place):
    before = sorted(place.rglob("*"))
    script = "import sys; from pipeline.cli import main\ntry: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    words = [
        "submit",
        "job.toml",
        "--nodes",
        "3",
        "--gpus-per-node",
        "4",
        "--time",
        "1:00:00",
        "--partition",
        "gpu",
        "--account",
        "lab",
        "--gpu",
        "h100",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def call(*more):
        return subprocess.run([sys.executable, "-c", script, *words, *more], capture_output=True, text=True, env=environment, check=False)

    done = call("--dry-run")
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    found = json.loads(call("--dry-run", "--json").stdout)
    assert found["text"].splitlines()[3:] == done.stdout.splitlines()[3:]
    assert lines(found)[1:7] == ["nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=1:00:00", "partition=gpu", "account=lab"]
    assert (found["ranks"], found["job"], found["schema_version"]) == (12, None, 1)
    assert set(found) == {"schema_version", "job", "run", "script", "text", "nodes", "ranks", "after", "plan", "notes", "then"}
    assert sorted(place.rglob("*")) == before
    assert "error: --after x;y: not a Slurm job's id" in call("--after", "x;y").stderr
    shown = call().stdout
    assert "77" in shown
    assert "12 on 3 nodes" in shown


def test_without_slurm_it_says_where_to_go(place, monkeypatch):
    monkeypatch.setenv("PATH", str(place / "nowhere"))
    with pytest.raises(JobError, match=r"sbatch: there is no such program here. Run this where Slurm is"):
        ask(place, "cluster.ranks_per_node=1")
    assert not (place / "runs").exists()
