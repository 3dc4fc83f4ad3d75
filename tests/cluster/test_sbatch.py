"""The batch script's text: golden files, and names that would like to be more than names."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.cluster.sbatch import MEMBER, Array, Made, Raw, Task, queue_name, render
from pipeline.job.cluster import Cluster, time_s
from pipeline.job.errors import JobError
from pipeline.job.files import shipped

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = shipped("slurm") / "train.sbatch"
MADE = Made("1.2.3", ("zlora", "submit", "my job.toml"), "2026-01-02 03:04:05 +0000", Path("/home/me/my job.toml"), "0123abcd")
WORDS = ("train", "/home/me/runs/my/slurm/1.toml", "--run", "/home/me/runs/my")
TRAINING = Task("my_job", "/home/me/runs/my", WORDS, Path("/home/me"), ("/env/bin/zlora",))
SITE = {
    "partition": "gpu",
    "account": "lab-7",
    "time": "04:00:00",
    "setup": ["module purge", 'module load "cuda/12.6"'],
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "NOTE": "it's $HOME"},
    "sbatch": ["--qos=high", "--mem=0"],
}
CONTAINER = {"container": "/images/zlora.sqsh", "mounts": ["/data", "/home/me:/home/me"]}
SCRIPTS = {
    "cpu": {"ranks_per_node": 4, "cpus_per_rank": 2},
    "gpus": {"nodes": 4, "gpus_per_node": 8, "cpus_per_rank": 12, **SITE},
    "gres": {"nodes": 2, "gpus_per_node": 4, "sbatch": ["--gres=gpu:v100:4"], "warn_s": 300, "time": "2-00"},
    "pyxis": {"gpus_per_node": 8, **CONTAINER},
    "apptainer": {"gpus_per_node": 8, **CONTAINER, "container_runtime": "apptainer", "program": "/opt/zlora"},
}
HOSTILE = (
    *("a b", "it's", 'say "x"', "$(touch pwned)", "`touch pwned`", "x;touch pwned", "-rf", "--run", "ünïcödé 名前", "a\\b", "{{run}}"),
    *("%j", "#SBATCH --nodes=9", "*", "~", "a && touch pwned", "a|b", "<x>", "!x", "$HOME", "'; touch pwned; '", "\\'; touch pwned #"),
)
UNPRINTABLE = ("a\nb", "a\rb", "a\x00b", "a\x1bb", "a\u2028b", "a\udc80b", "a\x85b")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_the_golden_one(name):
    """To renew: remove the file, run this twice, and read what has become of it."""
    text = render(TEMPLATE.read_text(), "train.sbatch", Cluster(**SCRIPTS[name]), TRAINING, MADE)
    if not (file := GOLDEN / f"{name}.sbatch").exists():
        file.write_text(text)
        pytest.fail(f"{file} was missing and is written now: read it")
    assert text == file.read_text()
    assert subprocess.run(["bash", "-n", file], capture_output=True, text=True, check=False).stderr == ""


def test_there_is_a_golden_file_for_each():
    assert {file.stem for file in GOLDEN.glob("*.sbatch")} == set(SCRIPTS)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_a_name(name, tmp_path):
    """Everything a job can name, so named; run by bash, with an srun that runs what it is given."""
    home = tmp_path / name
    home.mkdir()
    tell = '#!/bin/bash\nprintf "%s\\0" "$PWD" "$NAMED" "$@" > '
    (tmp_path / "bin").mkdir()
    program = home / "zlora"
    program.write_text(f"{tell}{tmp_path}/told\n")
    program.chmod(0o755)
    cluster = Cluster(ranks_per_node=1, environment={"NAMED": name}, container=f"/{name}", mounts=(f"/{name}",), program=f"/{name}")
    training = Task(queue_name(name), str(home / "run"), ("train", str(home / "1.toml"), "--run", str(home / "run")), home, (str(program),))
    made = Made("1", ("zlora", name), "now", home / "job.toml", "0")
    text = render(TEMPLATE.read_text(), "t", cluster, training, made)
    (tmp_path / "script").write_text(text)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "HOME": "/nowhere"}
    done = subprocess.run(["bash", tmp_path / "script"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = (tmp_path / "told").read_text().split("\0")[:-1]
    assert told[:6] == [str(home), name, "batch", str(home / "run"), "--", "srun"]
    assert told[9:] == [
        *(f"--container-image=/{name}", f"--container-mounts=/{name}:/{name}"),
        *(f"/{name}", "train", str(home / "1.toml"), "--run", str(home / "run")),
    ]
    assert {path.name for path in tmp_path.rglob("pwned")} == set()
    options = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert len(options) == 8
    assert options[0] == f"#SBATCH --job-name={queue_name(name)}"


@pytest.mark.parametrize("name", UNPRINTABLE)
def test_what_ends_a_line_is_refused_or_shown(name):
    for key in ({"environment": {"A": name}}, {"setup": [name]}, {"container": name}, {"partition": name}, {"sbatch": [f"--qos={name}"]}):
        with pytest.raises(ValidationError):
            Cluster(ranks_per_node=1, **key)
    cluster, template = Cluster(ranks_per_node=1), "{{made}}{{sbatch}}{{run}}{{command}}"
    with pytest.raises(JobError, match="Rename it"):
        render(template, "t", cluster, replace(TRAINING, run=f"/{name}"), MADE)
    text = render(template, "t", cluster, TRAINING, replace(MADE, command=("zlora", name), job=Path(name)))
    assert [line[0] for line in text.splitlines()[:2]] == ["#", "#"]
    assert all(line.startswith("#SBATCH --") for line in text.splitlines()[2:9])


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"partition": "a b"}, "not a name of Slurm's"),
        ({"account": "-x"}, "not a name of Slurm's"),
        ({"partition": "a\n#SBATCH --nodes=9"}, "not a name of Slurm's"),
        ({"time": "soon"}, "not a time"),
        ({"time": "0"}, "no time at all"),
        ({"time": "1:30", "warn_s": 90}, "no step would be taken"),
        ({"sbatch": ["--qos=a b"]}, "not an option of sbatch"),
        ({"sbatch": ["-p gpu"]}, "not an option of sbatch"),
        ({"sbatch": ["--output=/etc/x"]}, "does not go here"),
        ({"sbatch": ["--sig=KILL"]}, "Use warn_s"),
        ({"sbatch": ["--no-req"]}, "zlora sets it"),
        ({"environment": {"HF_TOKEN": "x"}}, "HF_TOKEN in a batch script could be read by others. Export it in the shell"),
        ({"environment": {"AWS_SECRET_ACCESS_KEY": "x"}}, "hf auth login"),
        ({"environment": {"A B": "x"}}, "not a variable's name"),
        ({"environment": {"NOTE": "hf_abcdefghijklmnopqrstuvwxyz"}}, "a token in a batch script"),
        ({"setup": ["export HF_TOKEN=abc"]}, "HF_TOKEN in a batch script"),
        ({"setup": ["curl -H 'Bearer hf_abcdefghijklmnopqrstuvwxyz'"]}, "a token in a batch script"),
        ({"gpus_per_node": 2}, "both given"),
        ({"mounts": ["/data"]}, "no container"),
        ({"container": "-x"}, "would be taken for an option"),
        ({"container": "x", "mounts": ["/a,b"]}, "a comma divides mounts"),
    ],
)
def test_what_cannot_go_into_a_script_is_refused_by_name(keys, says):
    with pytest.raises(ValidationError) as caught:
        Cluster(ranks_per_node=1, **keys)
    assert says in str(caught.value)


def test_what_is_no_secret_passes():
    names = {"TOKENIZERS_PARALLELISM": "false", "NCCL_IB_HCA": "mlx5", "MONKEY": "1", "KEYBOARD": "1"}
    Cluster(ranks_per_node=1, environment=names, setup=["export HF_TOKEN=$(cat ~/.token)", 'export HF_TOKEN="$TOKEN"', "source ~/.tokens"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("2-12", 216000), ("1-00:30", 88200), ("1-01:01:01", 90061)]
)
def test_times_are_slurms(text, seconds):
    assert time_s(text) == seconds


def test_a_template_of_ones_own_has_zlora_s_placeholders():
    text = render("#!/bin/bash\n{{ sbatch }}\necho ${HOME} {{run}}\n{{command}}\n", "mine", Cluster(ranks_per_node=1), TRAINING, MADE)
    assert "echo ${HOME} /home/me/runs/my\n/env/bin/zlora train" in text
    with pytest.raises(JobError, match=r"mine: \{\{comand\}\} is not a placeholder. Use .*\{\{command\}\}"):
        render("{{sbatch}}{{run}}{{comand}}", "mine", Cluster(ranks_per_node=1), TRAINING, MADE)
    with pytest.raises(JobError, match=r"mine: \{\{command\}\} is missing"):
        render("{{sbatch}}{{run}}", "mine", Cluster(ranks_per_node=1), TRAINING, MADE)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_member_of_an_array_finds_its_own_run_folder(name, tmp_path):
    (tmp_path / "zlora").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/told\n')
    (tmp_path / "zlora").chmod(0o755)
    array = Array({0: Path("/runs/other"), 7: Path(f"/runs/{name}")}, 2)
    words = ("train", Raw(f"{MEMBER}/slurm/sweep-1.toml"), "--run", MEMBER)
    task = Task("study", MEMBER, words, tmp_path, (str(tmp_path / "zlora"),), array)
    text = render(TEMPLATE.read_text(), "t", Cluster(ranks_per_node=1), task, MADE)
    assert "#SBATCH --array=0,7%2\n" in text
    assert "#SBATCH --output=%A_%a.txt\n" in text
    (tmp_path / "script").write_text(text)
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "7", "HOME": "/nowhere"}
    done = subprocess.run(["bash", tmp_path / "script"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = (tmp_path / "told").read_text().split("\0")[:-1]
    assert told[:3] == ["batch", f"/runs/{name}", "--"]
    assert told[-4:] == ["train", f"/runs/{name}/slurm/sweep-1.toml", "--run", f"/runs/{name}"]
    assert not list(tmp_path.rglob("pwned"))
    with pytest.raises(JobError, match=r"\{\{environment\}\} is missing"):
        render("{{sbatch}} {{run}} {{command}}", "mine", Cluster(ranks_per_node=1), task, MADE)
