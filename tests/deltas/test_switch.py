"""Switching in place: every byte a fresh merge's, whatever came before, wherever it is killed; and back."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.deltas import pieces
from pipeline.deltas.merge import merge
from pipeline.deltas.switch import switch
from pipeline.deltas.undo import roll_back
from pipeline.deltas.verify import verify
from pipeline.job.errors import JobError
from pipeline.weights.hub import local_base
from pipeline.weights.index import open_checkpoint
from tests.bases import make_llama
from tests.deltas.conftest import make_delta, weights

KINDS = ["qv", "mlp", "norms", "labels", "tokens"]


def content(folder: Path) -> dict[str, object]:
    """Every byte of it; of the certificate all but paths."""
    certificate = json.loads((folder / "merge.json").read_text())
    for place in (certificate["base"], *certificate["deltas"]):
        del place["path"]
    return {**weights(folder), "merge.json": certificate}


@pytest.fixture(scope="module")
def fresh(llama_base, deltas, tmp_path_factory):
    """The content of a fresh merge of each delta, and of none."""
    place = tmp_path_factory.mktemp("fresh")
    for kind in KINDS:
        merge(llama_base, deltas[kind], place / kind)
    return {kind: content(place / kind) for kind in KINDS} | {"": weights(llama_base)}, place


def test_a_thousand_switches_leave_every_byte_equal_to_a_fresh_merge(memory):
    base = make_llama(memory / "base", num_hidden_layers=1)
    norms = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    kinds = [{}, {"targets": ("q_proj", "up_proj", "down_proj")}, {"targets": ("o_proj",), "replaced": norms}]
    deltas = [make_delta(base, memory / str(seed), seed, **kind) for seed, kind in enumerate(kinds)]
    fresh = []
    for number, delta in enumerate(deltas):
        merge(base, delta, memory / f"fresh{number}")
        fresh.append(content(memory / f"fresh{number}"))
    merged, rng = memory / "merged", random.Random(0)
    shutil.copytree(memory / "fresh0", merged)
    for _ in range(1000):
        number = rng.randrange(3)
        switch(merged, [(deltas[number], 1.0)], base, workers=1)
        assert content(merged) == fresh[number]
    assert {path.name for path in merged.iterdir()} == set(fresh[0])


@pytest.mark.parametrize("after", [*KINDS, ""])
@pytest.mark.parametrize("before", KINDS)
def test_any_form_of_delta_gives_way_to_any_other(before, after, llama_base, deltas, fresh, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(fresh[1] / before, merged)
    found = switch(merged, [(deltas[after], 1.0)] if after else [], llama_base)
    assert (content(merged) if after else weights(merged)) == fresh[0][after]
    assert verify(merged)["kinds"] == ["merged"]
    assert found.tensors
    if {before, after} <= {"qv", "mlp", "norms"}:
        assert found.bytes < sum(map(len, weights(merged).values()))


def test_what_a_switch_makes_answers_as_transformers_does(llama_base, deltas, fresh, tmp_path):
    merged = tmp_path / "merged"
    shutil.copytree(fresh[1] / "qv", merged)
    tokens = torch.arange(30)[None]
    switch(merged, [(deltas["labels"], 1.0)], llama_base)
    assert AutoModelForSequenceClassification.from_pretrained(merged)(tokens).logits.shape == (1, 3)
    switch(merged, [(deltas["tokens"], 1.0)], llama_base)
    assert AutoTokenizer.from_pretrained(merged)("<15>").input_ids == [324]
    assert AutoModelForCausalLM.from_pretrained(merged)(tokens).logits.shape[-1] == 325
    switch(merged, [], llama_base)
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(place)(tokens).logits for place in (merged, llama_base))
    assert torch.equal(ours, theirs)


def test_weights_and_dtype_stay_those_of_a_fresh_merge(llama_base, deltas, tmp_path):
    merge(llama_base, deltas["qv"], tmp_path / "merged", dtype="bf16")
    mixed = [(deltas["mlp"], 0.7), (deltas["norms"], -0.5)]
    switch(tmp_path / "merged", mixed, llama_base)
    merge(llama_base, mixed, tmp_path / "fresh", dtype="bf16")
    assert content(tmp_path / "merged") == content(tmp_path / "fresh")
    switch(tmp_path / "merged", [], llama_base)
    assert weights(tmp_path / "merged") == weights(llama_base)


class Killed(BaseException):
    """What no handler of ours catches, as SIGKILL."""


def killed_at(number: int, monkeypatch, work) -> bool:
    """Does `work` until the process would make its n-th call that changes a disk. Returns whether it came so far."""
    left = number

    def counted(real):
        def call(*arguments, **options):
            nonlocal left
            if left <= 0:
                raise Killed
            left -= 1
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        # In the middle of a tensor, too.
        patch.setattr(pieces, "byte_view", counted(pieces.byte_view))
        try:
            work()
        except Killed:
            return True
    return False


@pytest.mark.parametrize(("before", "after"), [("qv", "mlp"), ("tokens", "labels"), ("labels", "")])
def test_killed_anywhere_it_is_finished_or_taken_back(before, after, llama_base, deltas, fresh, tmp_path, monkeypatch):
    """Before each call in turn; and the finishing and the taking back are killed as well."""
    asked = [(deltas[after], 1.0)] if after else []
    wanted, middle, number = {"old": fresh[0][before], "new": fresh[0][after]}, 0, 0
    while True:
        merged = tmp_path / str(number)
        shutil.copytree(fresh[1] / before, merged)

        def go_on(merged=merged):
            switch(merged, asked, llama_base, workers=1)

        if not killed_at(number, monkeypatch, go_on):
            break
        if (merged / ".switch").exists():
            middle += 1
            for reader in (verify, open_checkpoint, lambda folder: local_base(str(folder), None)):
                with pytest.raises(JobError, match=r"in the middle of a switch.*--roll-back"):
                    reader(merged)
            other = tmp_path / f"{number}-back"
            shutil.copytree(merged, other)
            killed_at(number % 7, monkeypatch, lambda other=other: roll_back(other))
            if (other / ".switch" / "back").exists():
                with pytest.raises(JobError, match="is being rolled back"):
                    switch(other, asked, llama_base)
            if (other / ".switch").exists():
                roll_back(other)
            assert content(other) == wanted["old"], number
            with pytest.raises(JobError, match="in the middle of a switch to others"):
                switch(merged, [(deltas["norms"], 1.0)], llama_base)
        killed_at(number % 11, monkeypatch, go_on)
        go_on()
        found = content(merged) if after else weights(merged)
        assert found == wanted["new"], number
        assert not list(merged.glob(".switch*"))
        shutil.rmtree(merged)
        number += 1
    assert middle > 10


def test_a_switch_that_fails_midway_is_taken_back_by_itself(llama_base, deltas, tmp_path):
    merge(llama_base, deltas["qv"], tmp_path / "merged", dtype="fp16")
    before = content(tmp_path / "merged")
    large = make_delta(llama_base, tmp_path / "large", 7, ("down_proj",), scale=300.0)
    with pytest.raises(JobError, match=r"not finite after the merge in torch.float16"):
        switch(tmp_path / "merged", [(large, 1.0)], llama_base)
    assert content(tmp_path / "merged") == before
    assert not list((tmp_path / "merged").glob(".*"))


def test_nothing_outside_the_folder_is_changed(llama_base, deltas, fresh, tmp_path, monkeypatch):
    """Links into it, and a journal that names other places."""
    merged, outside = tmp_path / "merged", tmp_path / "outside"
    for link in (os.symlink, os.link):
        shutil.copytree(fresh[1] / "qv", merged)
        file = sorted(merged.glob("*.safetensors"))[1]
        file.replace(outside)
        link(outside, file)
        data = outside.read_bytes()
        with pytest.raises(JobError, match="is a link, and writing in its place would change what it is linked with"):
            switch(merged, [(deltas["mlp"], 1.0)], llama_base)
        assert outside.read_bytes() == data
        shutil.rmtree(merged)
    shutil.copytree(fresh[1] / "qv", merged)
    for number in range(20, 60):
        killed_at(number, monkeypatch, lambda: switch(merged, [(deltas["mlp"], 1.0)], llama_base, workers=1))
        if (merged / ".switch").exists():
            break
    file = merged / ".switch" / "journal.json"
    journal = json.loads(file.read_text())
    lies = {"comes": ["../outside"]}, {"gives_way": [str(outside)]}, {"overwritten": {"../outside": [[0, 4]]}}, {"rows": []}
    for lie in lies:
        file.write_text(json.dumps(journal | lie))
        for work in (lambda: roll_back(merged), lambda: switch(merged, [(deltas["mlp"], 1.0)], llama_base)):
            with pytest.raises(JobError, match=r"journal.json: cannot be read"):
                work()
    assert outside.read_bytes() == data
    file.write_text(json.dumps(journal))
    roll_back(merged)
    assert content(merged) == fresh[0]["qv"]


def test_what_is_not_what_was_merged_is_refused_before_a_byte_is_written(llama_base, deltas, fresh, tmp_path, copied):
    merged = tmp_path / "merged"
    shutil.copytree(fresh[1] / "qv", merged)
    before = content(merged)
    other = make_llama(tmp_path / "other", seed=9)
    with pytest.raises(JobError, match="Name the base that"):
        switch(merged, [(deltas["mlp"], 1.0)], other)
    with pytest.raises(JobError, match="Name the base that it was merged from"):
        switch(merged, [], other)
    with pytest.raises(JobError, match="no switch is unfinished here"):
        roll_back(merged)
    with pytest.raises(JobError, match=r"no merge.json here"):
        switch(copied, [(deltas["mlp"], 1.0)], llama_base)
    with pytest.raises(JobError, match="no such folder"):
        switch(tmp_path / "nowhere", [(deltas["mlp"], 1.0)], llama_base)
    assert content(merged) == before
    file = sorted(merged.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(JobError, match=r'tensor "\S+" is not what was written'):
        switch(merged, [(deltas["mlp"], 1.0)], llama_base)
    assert file.read_bytes() == data
