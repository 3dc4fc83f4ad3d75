"""`zlora verify`: every flipped byte is noticed and laid to its file and tensor; the commands as a person calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.deltas.merge import merge
from pipeline.deltas.verify import verify
from pipeline.job.errors import JobError
from pipeline.weights.index import read_header
from tests.deltas.conftest import weights


@pytest.fixture(scope="module")
def whole(llama_base, deltas, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "merged"
    merge(llama_base, deltas["qv"], folder)
    return folder


@pytest.fixture
def merged(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "merged")
    return tmp_path / "merged"


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def refused(folder: Path) -> str:
    with pytest.raises(JobError) as caught:
        verify(folder)
    return str(caught.value)


def test_a_whole_folder_is_found_whole_and_every_byte_is_read(merged):
    seen = []
    found = verify(merged, seen.append)
    assert found["files"] == len(weights(merged))
    assert found["bytes"] == sum(seen) == sum(map(len, weights(merged).values()))


def test_the_tensor_that_holds_the_flipped_byte_is_named(merged):
    for file in sorted(merged.glob("*.safetensors")):
        for entry in read_header(file):
            for place in (entry.start, entry.start + entry.bytes - 1):
                flip(file, place)
                assert refused(merged).startswith(f'{file}: tensor "{entry.name}" is not what was written')
                flip(file, place)
        flip(file, 20)
        assert refused(merged).startswith(f"{file}: its header is not what was written")
        flip(file, 20)
    assert verify(merged)


def test_what_is_cut_longer_missing_or_edited_is_named(merged):
    file = sorted(merged.glob("*.safetensors"))[1]
    data = file.read_bytes()
    with safe_open(file, "pt") as library:
        names = library.keys()
    file.write_bytes(data[:-3])
    assert f"It ends early, at byte {len(data) - 3:,}" in refused(merged)
    assert any(name in refused(merged) for name in names)
    file.write_bytes(data + b"x")
    assert "though its tensors are as written" in refused(merged)
    file.unlink()
    assert refused(merged).startswith(f"{file}: is missing")
    file.write_bytes(data)
    (merged / "config.json").write_text((merged / "config.json").read_text() + " ")
    assert refused(merged).startswith(f"{merged / 'config.json'}: was changed since the merge")


def test_deltas_states_and_runs_are_verified(deltas, tmp_path):
    from pipeline.weights.state import Progress, Record, State, write_state

    run = tmp_path / "run"
    shutil.copytree(deltas["qv"], run / "delta")
    record = Record(
        progress=Progress(step=3),
        total_steps=9,
        learning_rate=0.1,
        seed=1,
        ranks=1,
        job={},
        job_digest="",
        base_digest=None,
        base_config="",
        data=(),
    )
    state = write_state(run / "state", State(record, {"weight/x": torch.ones(9)}), keep=2)
    assert verify(run)["kinds"] == ["delta", "state"]
    assert verify(run / "delta")["kinds"] == ["delta"]
    assert verify(state)["kinds"] == ["state"]
    flip(state / "tensors.safetensors", -1)
    assert refused(run).startswith(f"{state / 'tensors.safetensors'}: its sha256 is not the one in SHA256SUMS")
    flip(run / "delta" / "adapter_model.safetensors", -1)
    assert "its sha256 is not the manifest's" in refused(run)
    (tmp_path / "empty").mkdir()
    assert "there is nothing to verify it by" in refused(tmp_path / "empty")


def called(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception:
        raise done.exception
    return done.stdout


def test_the_commands(llama_base, deltas, merged, tmp_path):
    out = tmp_path / "out"
    shown = called(
        "merge", llama_base, f"{deltas['qv']}:0.5", f"{deltas['mlp']}:0.5", "--out", out, "--dtype", "bf16", "--prompt", "Blue Spice"
    )
    assert "differ by" in shown
    assert "are too small a change for the dtype" in shown
    assert json.loads(called("verify", out, "--json"))["kinds"] == ["merged"]
    assert "as written" in called("verify", out)
    assert "is now" in called("switch", merged, deltas["mlp"], "--base", llama_base)
    merge(llama_base, deltas["mlp"], tmp_path / "fresh")
    assert weights(merged) == weights(tmp_path / "fresh")
    assert json.loads(called("unmerge", merged, "--base", llama_base, "--json"))["certificate"]["deltas"] == []
    assert weights(merged) == weights(llama_base)
    for words, message in (
        (("switch", merged, "--roll-back"), "nothing to take back"),
        (("switch", merged, deltas["qv"], "--roll-back"), "Leave DELTA and --base out"),
        (("switch", merged), "needs DELTA and --base"),
        (("verify", tmp_path), "nothing to verify it by"),
    ):
        with pytest.raises(JobError, match=message):
            called(*words)
