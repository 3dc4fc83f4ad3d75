"""Where shards are changes nothing but memory and traffic: in groups of ranks, in files that are mapped, as each shipped file has it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.job.errors import JobError
from pipeline.job.files import shipped
from pipeline.weights.mapped import mapped
from tests.bases import make_llama
from tests.evaluate.test_generate import PROMPTS, generate_on_ranks, transformers_texts
from tests.training import Trained, train_here, trained, write_job

LEAN = {"stage3_prefetch_bucket_size": 3000, "stage3_max_live_parameters": 9000, "stage3_max_reuse_distance": 0}
PAIRS = {"zero_hpz_partition_size": 2}
SHIPPED = sorted(path.name for path in shipped("ds_configs").glob("*.json"))


@pytest.fixture(scope="module")
def job(tmp_path_factory, gpt2_base):
    return write_job(tmp_path_factory.mktemp("shards"), gpt2_base)


@pytest.fixture(scope="module")
def plain(job, ranks4) -> Trained:
    return trained(ranks4, job, job.parent / "plain")


def memory(folder: Path, **section) -> str:
    file = folder / "memory.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **section}}))
    return f"memory.config={file}"


def on_disk(folder: Path) -> dict:
    return {"offload_param": {"device": "nvme", "nvme_path": str(folder)}}


def same(one: Trained, other: Trained) -> bool:
    return one.losses == other.losses and all(np.array_equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


@pytest.mark.parametrize("also", [{}, LEAN], ids=["default", "lean"])
def test_groups_of_ranks_train_bit_for_bit_as_all_together(also, job, plain, ranks4, tmp_path):
    assert same(trained(ranks4, job, tmp_path / "run", memory(tmp_path, **PAIRS, **also)), plain)


def test_groups_that_share_tables_train_as_all_together_to_rounding(job, plain, ranks4, tmp_path):
    """The softmax is put together from as many parts as ranks share the head's table."""
    found = trained(ranks4, job, tmp_path / "run", memory(tmp_path, **PAIRS, stage3_param_persistence_threshold=0))
    assert found.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, tensor in plain.tensors.items():
        np.testing.assert_allclose(found.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def test_groups_recompute_and_score_as_all_together(job, ranks4, tmp_path):
    asked = ("memory.gradient_checkpointing=true", f"task.valid={job.parent / 'train.jsonl'}", "evaluate.max_new_tokens=8")
    together = trained(ranks4, job, tmp_path / "all", *asked)
    for gather in ("once", "each_pass"):
        groups = trained(ranks4, job, tmp_path / gather, *asked, f"evaluate.gather={gather}", memory(tmp_path, **PAIRS))
        assert same(groups, together)
        scores, expected = (json.loads((tmp_path / run / "result.json").read_text()) for run in (gather, "all"))
        assert scores["valid"] == expected["valid"]
        assert scores["valid"]["loss"] > 0


def held(ranks, job: str, *overrides: str) -> dict:
    from torch import distributed

    from pipeline.job.read import read_job
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen

    session = open_session(read_job(Path(job), overrides), ranks, Screen(open(os.devnull, "w"), shown=False))  # noqa: PTH123, SIM115
    parameters = list(session.base.model.parameters())
    return {
        "groups": {tuple(distributed.get_process_group_ranks(p.ds_process_group)) for p in parameters},
        "bytes": sum(p.ds_tensor.numel() * 4 for p in parameters),
        "shards": [p.ds_tensor.clone().numpy() for p in parameters],
        "read": session.base.bytes_read,
    }


def test_a_group_holds_the_base_once_and_every_group_the_same(job, ranks4, tmp_path):
    first, second, third, fourth = ranks4.run(held, str(job), memory(tmp_path, **PAIRS))
    assert [rank["groups"] for rank in (first, second, third, fourth)] == [{(0, 1)}, {(0, 1)}, {(2, 3)}, {(2, 3)}]
    quarter = ranks4.run(held, str(job))[0]
    assert quarter["groups"] == {(0, 1, 2, 3)}
    # Every tensor here is of a length that four divides.
    assert first["bytes"] == second["bytes"] == 2 * quarter["bytes"]
    assert first["read"] + second["read"] == 4 * quarter["read"]
    for one, other in ((first, third), (second, fourth)):
        assert all(np.array_equal(a, b) for a, b in zip(one["shards"], other["shards"], strict=True))


@pytest.mark.parametrize(("pool", "also"), [("ranks1", {}), ("ranks4", {}), ("ranks4", PAIRS)], ids=["one", "all", "groups"])
def test_generation_from_groups_and_files_is_transformers_own(pool, also, gpt2_base, job, tmp_path, request):
    expected = transformers_texts(gpt2_base, do_sample=False)
    config = memory(tmp_path, **also, **on_disk(tmp_path)).removeprefix("memory.config=")
    mine = tmp_path / "job.toml"
    mine.write_text(f'{job.read_text()}[memory]\nconfig = "{config}"\n')
    for gather in ("once", "each_pass"):
        answers = request.getfixturevalue(pool).run(generate_on_ranks, str(mine), PROMPTS, {"gather": gather})
        assert all(answer == expected for answer in answers)


def refusal(ranks, job: str, run: str, *overrides: str) -> str:
    try:
        return train_here(ranks, job, run, overrides)
    except JobError as error:
        return str(error)


@pytest.mark.parametrize("count", [3, 8])
def test_groups_that_do_not_divide_the_ranks_are_refused(count, job, ranks4, tmp_path):
    said = ranks4.run(refusal, str(job), str(tmp_path / "run"), memory(tmp_path, zero_hpz_partition_size=count))
    assert len(set(said)) == 1
    assert re.search(f"zero_hpz_partition_size = {count}: .*divide 4 ranks. Use one of 1, 2, 4", said[0])


# On disk.


def test_shards_on_disk_train_bit_for_bit_and_leave_nothing_behind(job, plain, ranks4, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    assert same(trained(ranks4, job, tmp_path / "run", memory(tmp_path, **on_disk(disk))), plain)
    assert same(trained(ranks4, job, tmp_path / "groups", memory(tmp_path, **on_disk(disk), **PAIRS)), plain)
    assert list(disk.iterdir()) == []


def test_what_is_trained_of_the_base_is_written_to_disk(job, ranks4, tmp_path):
    full = tmp_path / "full.toml"
    full.write_text(re.sub(r'kind = "lora"\n.*?\n\[task\]', 'kind = "full"\n[task]', job.read_text(), flags=re.DOTALL))
    lower = "train.learning_rate=1e-4"
    assert same(
        trained(ranks4, full, tmp_path / "disk", lower, memory(tmp_path, **on_disk(tmp_path))),
        trained(ranks4, full, tmp_path / "run", lower),
    )


def anonymous_growth(ranks, folder: str, zero: dict) -> tuple[int, int, int]:
    """Anonymous memory that a load takes; this rank's bytes of the base; those of them that are in files, and written back."""
    import ctypes
    import gc

    from pipeline.job.zero import complete
    from pipeline.model.config import read_config
    from pipeline.model.load import load_base
    from pipeline.model.zero3 import shard_bytes

    def anonymous() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    before = anonymous()
    base = load_base(Path(folder), read_config(Path(folder)), torch.float32, ranks.device, complete({"zero_optimization": zero}))
    grown = anonymous() - before
    clean, in_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            in_file = "/zlora-" in line
        elif in_file:
            key, value = line.split()[:2]
            clean += {"Size:": 1, "Shared_Dirty:": -1, "Private_Dirty:": -1}.get(key, 0) * (int(value) if value.isdigit() else 0)
    return grown, shard_bytes(base.model), clean * 1024


def test_shards_on_disk_take_no_anonymous_memory(ranks2, tmp_path):
    folder = str(make_llama(tmp_path / "base", hidden_size=512, intermediate_size=2048, num_hidden_layers=4))
    ranks2.run(anonymous_growth, folder, {"stage": 3, **on_disk(tmp_path)})
    for grown, shard, clean in ranks2.run(anonymous_growth, folder, {"stage": 3, **on_disk(tmp_path)}):
        assert 30e6 < shard <= clean
        assert grown < shard / 4
    for grown, shard, clean in ranks2.run(anonymous_growth, folder, {"stage": 3}):
        assert clean == 0
        assert grown > shard * 0.9


def test_a_folder_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_THIS_JOB", str(tmp_path))
    tensor = torch.arange(5000, dtype=torch.bfloat16)
    assert torch.equal(mapped(tensor, "$OF_THIS_JOB"), tensor)
    assert mapped(torch.empty(0), "/nowhere").numel() == 0


@pytest.mark.parametrize("place", ["missing", "file", "full"])
def test_a_folder_that_cannot_hold_shards_is_refused(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    if place == "full":
        (tmp_path / "full").mkdir()

        def fsync(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(JobError, match=f'nvme_path = ".*/{place}": cannot keep .*: (No|Not) .*Name a folder'):
        mapped(torch.ones(3), str(tmp_path / place))
    assert place != "full" or not list((tmp_path / "full").iterdir())


# As shipped.


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_trains_the_same(name, job, ranks4, plain, tmp_path):
    if name == "zero3_node.json":
        assert "partition_size = 8" in ranks4.run(refusal, str(job), str(tmp_path / "run"), f"memory.config={name}")[0]
        return
    run = trained(ranks4, job, tmp_path / "run", f"memory.config={name}", f"memory.nvme_path={tmp_path}")
    assert run.losses == pytest.approx(plain.losses, rel=1e-5)
    assert name == "zero0.json" or same(run, plain)


def test_a_base_that_is_trained_whole_is_rewritten_on_disk(job, ranks2, tmp_path):
    full = tmp_path / "full.toml"
    text = job.read_text()
    full.write_text(f'{text[: text.index("[[methods]]")]}[[methods]]\nkind = "full"\n{text[text.index("[task]") :]}')
    there = trained(ranks2, full, tmp_path / "there", "memory.config=zero3.json")
    on_disk = trained(ranks2, full, tmp_path / "disk", "memory.config=zero3_nvme.json", f"memory.nvme_path={tmp_path}")
    assert on_disk.losses == there.losses
    assert same(on_disk, there)
