"""The main job on CUDA devices: the same losses as on CPU ranks, and every dtype the device has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import write_job

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


def losses(folder: Path, run: str, *arguments: str, gpus: bool = True) -> list[float]:
    # conftest chooses the CPU for this process's DeepSpeed; the ranks choose for themselves.
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | {"PYTHONPATH": str(ROOT)}
    if not gpus:
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pipeline", "train", "job.toml", "--run", run, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    rows = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["loss"] for row in rows if '"loss"' in row and '"split"' not in row]


@pytest.fixture(scope="module", params=["gpt2_base", "llama_base"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("gpu")
    write_job(place, request.getfixturevalue(request.param))
    return place


@pytest.fixture(scope="module")
def on_cpu(folder):
    return losses(folder, "cpu", "--ranks", "2", gpus=False)


@pytest.mark.parametrize("extra", [(), ("--set", "train.packing=false"), ("--set", "memory.gradient_checkpointing=true")])
def test_fp32_gives_the_losses_of_cpu_ranks(extra, folder, on_cpu, tmp_path):
    assert losses(folder, str(tmp_path / "run"), *extra) == pytest.approx(on_cpu, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_follows(dtype, folder, on_cpu, tmp_path):
    if dtype == "bf16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this device has no bf16")
    assert losses(folder, str(tmp_path / "run"), "--set", f'base.dtype="{dtype}"') == pytest.approx(on_cpu, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_run_that_was_ended_goes_on_to_rounding(dtype, folder, tmp_path):
    # Atomic additions on a GPU differ from run to run: bit by bit is promised for CPU ranks.
    settings = ("--set", f'base.dtype="{dtype}"', "--set", "methods.0.dropout=0.1", "--set", 'train.schedule="constant"')
    whole = losses(folder, str(tmp_path / "whole"), *settings)
    losses(folder, str(tmp_path / "run"), *settings, "--set", "train.steps=2")
    assert losses(folder, str(tmp_path / "run"), *settings) == pytest.approx(whole, rel=1e-3 if dtype == "fp32" else 0.02)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_latency_is_the_gpu_s(dtype, gpt2_base, tmp_path):
    words = ("--batch", "1,2", "--sequence", "16", "--rounds", "5", "--dtype", dtype, "--json")
    command = [sys.executable, "-m", "pipeline", "latency", str(gpt2_base), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["device"] == torch.cuda.get_device_name()
    assert report["certificate"]["merged_and_lora"] < report["certificate"]["merged_and_base"]
    assert all(time["median_ms"] > 0 for row in report["rows"] for time in row["times"].values())
