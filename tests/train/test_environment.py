"""`environment.json` says what a run ran on, and nothing secret; what libraries print is in the rank's log however it ends."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from pipeline.train import environment as module
from pipeline.train.environment import chosen_variables, environment

ROOT = Path(__file__).parents[2]


def on_rank(ranks) -> dict:
    os.environ["HF_TOKEN"] = "hf_abcdefghijklmnop"
    return environment(ranks)


def test_it_names_every_rank_s_host_and_device_once(ranks2):
    first, second = ranks2.run(on_rank)
    assert first["hosts"] == second["hosts"]
    (host,) = first["hosts"]
    assert host["host"] == first["host"] == platform.node()
    assert [device["rank"] for device in host["devices"]] == [0, 1]
    assert all(device["threads"] == 1 for device in host["devices"])
    assert host["cores"] == os.cpu_count()
    assert host["memory_bytes"] > 1 << 30
    assert first["packages"]["torch"] == torch.__version__
    assert (first["cuda"], first["nccl"], first["ranks"]) == (torch.version.cuda, None, 2)
    assert first["variables"]["OMP_NUM_THREADS"] == "1"
    assert "hf_" not in json.dumps(first)


def test_hosts_are_told_apart():
    ranks = [{"host": name, "device": {"rank": rank}, "machine": {"cores": 8}} for rank, name in enumerate(("a", "a", "b"))]
    assert module._hosts(ranks) == [
        {"host": "a", "cores": 8, "devices": [{"rank": 0}, {"rank": 1}]},
        {"host": "b", "cores": 8, "devices": [{"rank": 2}]},
    ]


def test_only_named_variables_and_no_secrets():
    kept = {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_JOB_ID": "7", "HF_HOME": "/hub"}
    others = {
        "HF_TOKEN": "hf_abcdefghijklmnop", "WANDB_API_KEY": "x", "HOME": "/root", "SLURM_JOB_USER": "me", "NCCL_MY_TOKEN": "x",
        "NCCL_CONF_FILE": "https://me:word@host/nccl", "MALLOC_CONF": "hf_abcdefghijklmnop",
    }  # fmt: skip
    assert chosen_variables({**others, **kept}) == kept


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
        subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, env={**os.environ, **who})

    monkeypatch.setattr(module, "__file__", str(tmp_path / "pipeline" / "train" / "environment.py"))
    assert module._commit() == (None, None), "no checkout"
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    (tmp_path / "untracked").write_text("1")
    commit, dirty = module._commit()
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "file").write_text("2")
    assert module._commit() == (commit, True)


def test_what_a_library_prints_is_in_the_log_of_a_rank_that_is_ended(tmp_path):
    body = (
        "import ctypes, os, pathlib; from pipeline.screen import take_terminal\n"
        f"take_terminal(pathlib.Path({str(tmp_path)!r}), 3)\n"
        "ctypes.CDLL(None).puts(b'NCCL WARN of a kind'); os._exit(1)"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, check=False, env=variables)
    assert done.stdout == "", done.stderr
    assert (tmp_path / "rank3.txt").read_text() == "NCCL WARN of a kind\n"
