"""`zlora fetch` against a server that answers as the hub does: what is fetched, what is refused, and ranks without a network."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.job.errors import JobError
from pipeline.weights.index import open_checkpoint
from tests.hub_server import COMMIT, Hub, Repository, serving
from tests.training import write_job

ROOT = Path(__file__).parents[1]
BIN = b"\0" * 4_000_000
UNNEEDED = {
    "pytorch_model.bin": BIN,
    "consolidated.safetensors": BIN,
    "onnx/model.onnx": BIN,
    "README.md": b"# x\n",
    "model.fp16.safetensors": BIN,
}


@pytest.fixture
def place(tmp_path, llama_base):
    """A job in an empty folder, whose base is on the hub in several shards."""
    write_job(tmp_path, "tests/llama")
    (tmp_path / "data").mkdir()
    shutil.move(tmp_path / "train.jsonl", tmp_path / "data")
    (tmp_path / "job.toml").write_text((tmp_path / "job.toml").read_text().replace(str(tmp_path / "train.jsonl"), "data"))
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def repositories(llama_base):
    return {"tests/llama": Repository({**files_of(llama_base), **UNNEEDED})}


def zlora(place: Path, url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": url, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1", "HOME": str(place)}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=120, env={**inherited, **settings, **environment}, check=False
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def contents(hub: Hub) -> list[str]:
    """Files whose content was asked for."""
    return sorted(request[4:] for request in hub.requests if request.startswith("GET ") and "/api/" not in request)


def test_only_what_is_needed_is_fetched_and_ranks_run_without_a_network(place, repositories, llama_base):
    with serving(repositories) as hub:
        done = zlora(place, hub.url, "fetch", "job.toml", "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert contents(hub) == sorted(files_of(llama_base))
        base, (data,) = found["base"], found["data"]
        size = sum(map(len, files_of(llama_base).values()))
        assert base["path"].startswith(str(place / "hf"))
        assert (base["commit"], base["files"], base["bytes"], base["fetched_bytes"]) == (COMMIT, len(files_of(llama_base)), size, size)
        assert (data["path"], data["commit"], data["files"], data["fetched_bytes"]) == (str(place / "data"), None, 1, 0)
        # Again: nothing to do, and said so.
        done = zlora(place, hub.url, "fetch", "job.toml")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("already here") == 2
        assert COMMIT in done.stdout
        assert contents(hub) == sorted(files_of(llama_base))
        asked = len(hub.requests)
        arguments = ("generate", "--base", "tests/llama", "--prompt", "Blue", "--max-new-tokens", "3")
        for offline in ({"HF_HUB_OFFLINE": "1"}, {}):
            done = zlora(place, hub.url, *arguments, **offline)
            assert done.returncode == 0, done.stderr
        assert len(hub.requests) == asked, "what is here is not asked for"
    # The network is gone, and nobody has said so: a connection is refused, or nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url in (hub.url, f"http://127.0.0.1:{silent.getsockname()[1]}"):
            start = time.monotonic()
            done = zlora(place, url, "fetch", "job.toml")
            assert (done.returncode, done.stdout.count("already here")) == (0, 2), done.stderr
            assert time.monotonic() - start < 40


def test_an_interrupted_download_goes_on(place, repositories):
    files = repositories["tests/llama"].files
    shard = sorted(name for name in files if name.endswith(".safetensors") and name.startswith("model-"))[-1]
    with serving(repositories) as hub:
        command = [sys.executable, "-c", "import os; from pipeline.cli import main; main()", "fetch", "job.toml"]
        repositories["tests/llama"].cut = {shard: 10}
        # The client asks again for a while, so it is killed in the middle.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        settings = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1"}
        process = subprocess.Popen(command, cwd=place, env={**inherited, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while contents(hub).count(shard) < 2:
            time.sleep(0.05)
            assert process.poll() is None
        process.kill()
        process.wait()
        half = refused(zlora(place, hub.url, "generate", "--base", "tests/llama", "--prompt", "a", HF_HUB_OFFLINE="1"))
        assert "not, or not all of it, in the cache here" in half
        repositories["tests/llama"].cut = {}
        hub.requests.clear()
        done = zlora(place, hub.url, "fetch", "job.toml")
        assert done.returncode == 0, done.stderr
        assert shard in contents(hub)
        assert "config.json" not in contents(hub)
        assert "fetched now" in done.stdout
    (snapshot,) = (place / "hf" / "hub" / "models--tests--llama" / "snapshots").iterdir()
    assert open_checkpoint(snapshot).bytes > 0


def test_what_the_hub_refuses_is_one_line_with_its_repair_and_without_the_token(place, repositories):
    llama = repositories["tests/llama"]
    with serving(repositories) as hub:
        llama.gated = True
        gated = refused(zlora(place, hub.url, "fetch", "job.toml"))
        assert 'base "tests/llama": gated. Accept its licence on http://127.0.0.1' in gated
        assert "`hf auth login`, or set HF_TOKEN" in gated
        done = zlora(place, hub.url, "fetch", "job.toml", "--json", HF_TOKEN=hub.token)
        assert done.returncode == 0, done.stderr
        assert hub.token not in done.stdout + done.stderr
        shutil.rmtree(place / "hf")
        llama.gated, llama.private = False, True
        private = refused(zlora(place, hub.url, "fetch", "job.toml"))
        assert "neither a folder here nor a model on the hub" in private
        assert "if it is private, sign in" in private
        wrong = refused(zlora(place, hub.url, "fetch", "job.toml", HF_TOKEN="hf_wrongtoken"))
        assert "hf_wrongtoken" not in wrong
        missing = refused(zlora(place, hub.url, "fetch", "job.toml", "--set", "base.model=tests/nothing"))
        assert 'base "tests/nothing": neither' in missing
        llama.private = False
        assert 'has no revision "v9"' in refused(zlora(place, hub.url, "fetch", "job.toml", "--set", "base.revision=v9"))
        # Only a pickle: nothing of it is fetched.
        llama.files = {name: content for name, content in llama.files.items() if not name.endswith((".safetensors", ".index.json"))}
        hub.requests.clear()
        pickled = refused(zlora(place, hub.url, "fetch", "job.toml"))
        assert "has no model.safetensors on the hub, only pytorch_model.bin. Convert it" in pickled
        assert "pytorch_model.bin" not in contents(hub)
        offline = refused(zlora(place, hub.url, "fetch", "job.toml", "--set", "base.model=tests/other", HF_HUB_OFFLINE="1"))
        assert "the hub cannot be reached" in offline
    gone = refused(zlora(place, hub.url, "fetch", "job.toml", "--set", "base.model=tests/other"))
    assert "the hub cannot be reached" in gone
    written = [path for path in place.rglob("*") if path.is_file() and b"hf_secret" in path.read_bytes()]
    assert written == []


def parquet(rows: list[dict]) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


READ = """
import sys
from pipeline.job.task import E2E, WebNlg
from pipeline.tasks.hub import load
from pipeline.tasks.open import hub_copies
from tests.tasks.reading import read_examples
splits = ("train", "valid", "test")
print([read_examples(E2E(kind="e2e"), split)[0].completion for split in splits])
(copy,) = hub_copies(WebNlg(kind="webnlg"))
print([[row["split"] for row in load(copy.name, copy.revision, **copy.chosen(split))] for split in splits])
assert "torch" not in sys.modules
"""


def test_all_splits_of_the_hubs_data_are_fetched_and_read_without_a_network(place, llama_base):
    folder, converted = "webnlg_challenge_2017", "refs/convert/parquet"
    names = {"e2e": ("train", "validation", "test"), "webnlg": ("train", "dev", "test")}
    texts = [{"meaning_representation": "name[Blue Spice]", "human_reference": f"It is {split}."} for split in names["e2e"]]
    e2e = {f"default/{split}/0000.parquet": parquet([row]) for split, row in zip(names["e2e"], texts, strict=True)}
    web = {f"{which}/{split}/0000.parquet": parquet([{"split": split}]) for which in (folder, "other") for split in names["webnlg"]}
    repositories = {
        "datasets/tuetschek/e2e_nlg": Repository(e2e, revision=converted),
        "datasets/webnlg-challenge/web_nlg": Repository(web, revision=converted),
    }
    with serving(repositories) as hub:
        for kind in names:
            (place / "job.toml").write_text(f'[base]\nmodel = "{llama_base}"\n[[methods]]\nkind = "lora"\n[task]\nkind = "{kind}"\n')
            done = zlora(place, hub.url, "fetch", "job.toml", "--json")
            assert done.returncode == 0, done.stderr
            (data,) = json.loads(done.stdout)["data"]
            assert (data["files"], data["commit"]) == (3, COMMIT)
        assert contents(hub) == sorted([*e2e, *(name for name in web if folder in name)])
    environment = {**os.environ, "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", READ], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[' It is train.', ' It is validation.', ' It is test.']\n[['train'], ['dev'], ['test']]\n"


def test_a_disk_without_room_is_told_before_anything_is_fetched(monkeypatch, tmp_path):
    from pipeline.weights import hub

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1234))
    with pytest.raises(JobError) as caught:
        hub._refuse_full(tmp_path / "absent" / "hub", "tests/llama", "model", 5_000_000_000)
    assert "5,000,000,000 bytes to fetch, and 1,234 are free" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("403 for https://cdn/x?X-Amz-Signature=abc&y=1 (id)", "403 for https://cdn/x (id)"),
        ("http://me:pass@proxy:3128 failed", "http://proxy:3128 failed"),
        ("token hf_AbC123 is bad", "token hf_... is bad"),
    ],
)
def test_what_gives_access_is_not_shown(text, clean):
    from pipeline.weights.hub import _clean

    assert _clean(text) == clean
