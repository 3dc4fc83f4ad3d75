"""Gathers in 8 bits: the arithmetic, training beside a base that was rounded beforehand, and the bytes that come."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.model.int8 import GROUP, Int8
from tests.bases import make_llama
from tests.training import Trained, trained, write_job

RANKS = 2
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 200}}
"""Norms stay gathered, matrices do not; the tables are never gathered."""


def rounded(matrix: torch.Tensor, ranks: int = RANKS) -> torch.Tensor:
    """Each group of 128 of each rank's run to one of 255 values, in NumPy and float64."""
    flat = matrix.flatten().double().numpy()
    run = -(-flat.size // ranks)
    out = np.empty_like(flat)
    for first in (start for rank in range(ranks) for start in range(rank * run, min((rank + 1) * run, flat.size), 128)):
        last = min(first + 128, flat.size, (first // run + 1) * run)
        scale = np.abs(flat[first:last]).max() / 127
        out[first:last] = np.round(flat[first:last] / scale) * scale if scale else 0
    return torch.from_numpy(out).reshape(matrix.shape)


@pytest.mark.parametrize("shape", [(32, 64), (7, 13), (3, 300), (1, 5), (129, 2)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_arrives_is_the_matrix_rounded_by_groups(shape, ranks, dtype):
    torch.manual_seed(0)
    whole = torch.randn(shape).to(dtype)
    run = -(-whole.numel() // ranks)
    padded = torch.zeros(run * ranks, dtype=dtype)
    padded[: whole.numel()] = whole.flatten()
    of_ranks = [Int8(ranks).quantize(shard) for shard in padded.split(run)]
    sent, scales = (torch.cat(parts) for parts in zip(*of_ranks, strict=True))
    assert (sent.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert (sent.numel(), scales.numel()) == (run * ranks, -(-run // GROUP) * ranks)
    found = Int8(ranks).dequantize(sent[: whole.numel()].view(shape), scales, dtype)
    assert (found.dtype, found.shape) == (dtype, whole.shape)
    most = whole.abs().max().float()
    assert (found.float() - whole.float()).abs().max() <= most * (1 / 254 + torch.finfo(dtype).eps)
    # A value half way between two may go to either.
    close = torch.isclose(found.float(), rounded(whole, ranks).to(dtype).float(), rtol=2**-7, atol=0)
    assert close.float().mean() > 0.99


def test_zeros_and_the_smallest_numbers_stay_what_they_are():
    for value in (0.0, 1e-30, -1e-30):
        shard = torch.full((200,), value)
        torch.testing.assert_close(Int8(1).dequantize(*Int8(1).quantize(shard), torch.float32), shard, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> tuple[Path, Path]:
    """A Llama, and the same with every matrix that is gathered rounded already."""
    folder = tmp_path_factory.mktemp("bases")
    exact = make_llama(folder / "exact")
    shutil.copytree(exact, folder / "rounded")
    for file in (folder / "rounded").glob("*.safetensors"):
        tensors = load_file(file)
        layers = {name: rounded(tensor).float() for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2}
        save_file(tensors | layers, file, metadata={"format": "pt"})
    return exact, folder / "rounded"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "memory.json"
    file.write_text(json.dumps(SHARDED))
    return file


@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_training_is_that_on_a_base_rounded_beforehand(recomputed, bases, config, ranks2, tmp_path):
    asked = [f"memory.config={config}", f"memory.gradient_checkpointing={recomputed}"]
    runs: dict[str, Trained] = {}
    for name, base, more in (("exact", bases[0], ()), ("rounded", bases[1], ()), ("int8", bases[0], ("memory.int8_gathers=true",))):
        (tmp_path / name).mkdir()
        runs[name] = trained(ranks2, write_job(tmp_path / name, base), tmp_path / name / "run", *asked, *more)
    assert runs["int8"].losses == pytest.approx(runs["rounded"].losses, rel=1e-5)
    for name, tensor in runs["rounded"].tensors.items():
        np.testing.assert_allclose(runs["int8"].tensors[name], tensor, rtol=1e-2, atol=1e-5)
    # And it is another training than that of the exact base, by little.
    apart = [abs(a - b) / b for a, b in zip(runs["int8"].losses, runs["exact"].losses, strict=True)]
    assert 1e-5 < max(apart) < 0.02


def received(ranks, job: str, overrides: tuple[str, ...]) -> dict:
    """Bytes of what DeepSpeed's all-gathers of one step make whole, and what the plan says of them."""
    from deepspeed.runtime.zero import partition_parameters as partitions

    from pipeline.plan.memory import memory
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.tasks.batch import collate
    from pipeline.train.step import Stepper

    asked = read_job(Path(job), overrides)
    session = open_session(asked, ranks, Screen(io.StringIO(), shown=False))
    stepper = Stepper(session.engine, session.root, session.delta, asked.train, ranks, fp16=False)
    data = session.training_set().sequences
    batches = [collate([data[i] for i in range(4)], [0, 1, 2, 3], True, ranks.device)] * 2
    counted, real = [], partitions._dist_allgather_fn

    def gather(source, target, group=None):
        counted.append((str(target.dtype), target.numel() * target.element_size()))
        return real(source, target, group)

    partitions._dist_allgather_fn = gather
    try:
        for number in range(3):
            counted.clear()
            stepper(number, batches, 100, 0.01)
    finally:
        partitions._dist_allgather_fn = real
        session.engine.release()
    found = memory(session.setting).gathered
    planned = found.bytes_in_step(2, session.setting.element_bytes, asked.memory.int8_gathers)
    return {"bytes": sum(size for _, size in counted), "dtypes": sorted({dtype for dtype, _ in counted}), "planned": planned}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_as_many_bytes_come_as_the_plan_says(dtype, config, ranks2, tmp_path):
    """Matrices whose runs are whole groups."""
    job = write_job(tmp_path, make_llama(tmp_path / "base", hidden_size=64, intermediate_size=128))
    asked = (f"memory.config={config}", f"base.dtype={dtype}")
    found = [ranks2.run(received, str(job), (*asked, f"memory.int8_gathers={whether}")) for whether in ("false", "true")]
    for plain, int8 in zip(*found, strict=True):
        assert plain["bytes"] == plain["planned"]
        assert int8["bytes"] == int8["planned"]
        assert int8["dtypes"] == ["torch.float32", "torch.int8"]
        assert int8["bytes"] / plain["bytes"] == pytest.approx((1 + 4 / 128) / {"fp32": 4, "bf16": 2}[dtype], rel=1e-6)


def test_what_cannot_come_so_is_refused(gpt2_base, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    file = tmp_path / "memory.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_allgather_sequential": False}}))
    with pytest.raises(JobError, match=r"memory.json: .*stage3_allgather_sequential = false: memory.int8_gathers"):
        read_job(job, (f"memory.config={file}", "memory.int8_gathers=true"))
    read_job(job, (f"memory.config={file}",))
    text = job.read_text()
    job.write_text(text[: text.index("[[methods]]")] + '[[methods]]\nkind = "full"\n\n' + text[text.index("[task]") :])
    for memory in ("zero3.json", "auto"):
        with pytest.raises(JobError, match=r'memory\.int8_gathers: "full" trains the base'):
            read_job(job, (f"memory.config={memory}", "memory.int8_gathers=true"))
