"""`zlora generate --delta NAME=DIR ...`: each answer of a mixed batch is that delta's alone, in files, pipes and conversations."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.job.errors import JobError
from pipeline.job.spec import Decoding
from pipeline.tasks.named import named_deltas, used
from pipeline.tasks.prompts import read_prompts
from tests.bases import make_gpt2
from tests.generate.test_generate import ROOM, Terminal, answers, generate, plain
from tests.methods.test_mixed import make_delta

METHODS = {"lora": "lora", "wide": "wide", "bias": "bitfit", "prefix": "prefix_layer"}
PROMPTS = ["Blue Spice", "The Eagle near the riverside cafe", "pub", "x" * 60, "Italian city", "Blue Spice", "Blue Spice"]
SETTINGS = [{}, {"beams": 3, "gather": "each_pass", "batch_tokens": 400}, {"temperature": 1.2, "seed": 5}]
ASKING = ["lora", "wide", None, "bias", "prefix", "lora", None]


@pytest.fixture(scope="module")
def deltas(gpt2_base, tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("served")
    for number, (name, method) in enumerate(METHODS.items()):
        make_delta(gpt2_base, method, place / name, number)
    return {name: place / name for name in METHODS}


def texts_on_ranks(ranks, base: str, deltas: dict[str | None, Path], asking: list[str | None]) -> list[list[str]]:
    """Of each of the settings, from one resident base."""
    from pipeline.generate.generator import Source, open_generator
    from pipeline.job.files import memory_config
    from pipeline.screen import Screen

    source = Source(base, None, deltas, None, None, memory_config("zero3.json"))
    generator = open_generator(source, Decoding(), "refuse", ranks, Screen(io.StringIO(), shown=False))
    asked = [replace(one, delta=name) for one, name in zip(read_prompts(PROMPTS, None), asking, strict=True)]
    found = []
    for settings in SETTINGS:
        with replace(generator, decoding=Decoding(max_new_tokens=ROOM, **settings)).ready() as ready:
            found.append(ready.answers(asked))
    return found


@pytest.fixture(scope="module")
def alone(gpt2_base, deltas, ranks1) -> dict[str | None, list[list[str]]]:
    """The answers of each delta alone to all prompts."""
    nobody = [None] * len(PROMPTS)
    found = {name: ranks1.run(texts_on_ranks, str(gpt2_base), {None: folder}, nobody)[0] for name, folder in deltas.items()}
    return {None: ranks1.run(texts_on_ranks, str(gpt2_base), {}, nobody)[0], **found}


def test_each_answer_is_that_of_its_delta_alone(gpt2_base, deltas, alone, ranks1, ranks2):
    expected = [[alone[name][number][place] for place, name in enumerate(ASKING)] for number in range(len(SETTINGS))]
    for number in range(len(SETTINGS)):
        assert len({texts[number][1] for texts in alone.values()}) == len(alone), "the deltas are to say different things"
    for pool in (ranks1, ranks2):
        for found in pool.run(texts_on_ranks, str(gpt2_base), deltas, ASKING):
            assert found == expected


def test_a_prompt_file_chooses_by_name(gpt2_base, deltas, alone, tmp_path):
    rows = [{"prompt": prompt} for prompt in PROMPTS[:4]]
    for row, name in zip(rows, ("lora", None, "base"), strict=False):
        row["delta"] = name
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = (
        "--base",
        gpt2_base,
        *(f"--delta={name}={deltas[name]}" for name in ("lora", "wide")),
        "--max-new-tokens",
        ROOM,
        "--use=wide",
        "--ranks=2",
    )
    done = generate(*options, "--prompt-file", "in.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"schema_version", "base", "deltas", "dtype", "prompts", "seconds", "out", "answers"}
    assert told["schema_version"] == 2
    assert told["deltas"] == [
        {"name": None, "delta": None, "step": None, "separator": ""},
        {"name": "lora", "delta": str(deltas["lora"]), "step": 1, "separator": " ->"},
        {"name": "wide", "delta": str(deltas["wide"]), "step": 1, "separator": " ->"},
    ]
    names = ["lora", None, None, "wide"]
    assert told["answers"] == [
        {"prompt": prompt, "delta": name, "prediction": alone[name][0][place]}
        for place, (prompt, name) in enumerate(zip(PROMPTS, names, strict=False))
    ]
    # From a pipe, a line of its own changes the delta; a name that is not there ends it.
    piped = generate(*options, cwd=tmp_path, stdin=f"{PROMPTS[0]}\n/delta lora\n{PROMPTS[1]}\n/delta base\n{PROMPTS[2]}\n/delta tall\n")
    found = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [(row["delta"], row["prediction"]) for row in found] == [
        (name, alone[name][0][place]) for place, name in enumerate(("wide", "lora", None))
    ]
    assert piped.returncode == 2
    assert piped.stderr.endswith("error: (standard input):6: no delta 'tall' is served. There are base, lora, wide.\n")


def test_a_conversation_changes_its_delta(gpt2_base, deltas, alone, tmp_path):
    names = ("lora", "bias")
    options = ("--base", gpt2_base, *(f"--delta={name}={deltas[name]}" for name in names), "--max-new-tokens", ROOM)
    talk = Terminal(*options, cwd=tmp_path)
    assert "/delta NAME changes the delta: base, lora, bias." in talk.until("\n> ")
    for name in (None, *names):
        if name:
            talk.type(f"/delta {name}\n")
            assert f"delta: {name}" in talk.until("\n> ")
        talk.type(f"{PROMPTS[0]}\n")
        assert [line.rstrip() for line in talk.until("\n> ").split("\n", 1)][1:] == [plain(alone[name][0][0]).rstrip()]
    talk.type("/delta tall\n")
    assert "no delta 'tall' is served. There are base, lora, bias." in talk.until("\n> ")
    talk.type("\x04")
    assert talk.ended() == 0


def test_what_is_named_and_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    assert named_deltas([]) == {}
    assert named_deltas(["runs/my"]) == {None: Path("runs/my")}
    assert named_deltas(["runs/lr=0.1"]) == {None: Path("runs/lr=0.1")}
    assert named_deltas(["lr=0.1"]) == {None: Path("lr=0.1")}
    assert named_deltas(["a=runs/x=1", "b=y"]) == {"a": Path("runs/x=1"), "b": Path("y")}
    for given, part in (
        (["runs/my", "b=y"], "--delta runs/my: one of several needs a name"),
        (["a=x", "a=y"], '"a" is x already'),
        (["base=x"], '"base" means the base alone'),
    ):
        with pytest.raises(JobError, match=part):
            named_deltas(given)
    with pytest.raises(JobError, match="--use a: no delta has a name"):
        used("a", ())
    with pytest.raises(JobError, match=r"--use: no delta 'c' is served\. There are base, a, b"):
        used("c", ("a", "b"))
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y", "delta": 3}\n')
    with pytest.raises(JobError, match=r"in.jsonl:2: no delta 3 is served\. There are base, a, b"):
        read_prompts([], Path("in.jsonl"), ("a", "b"))
    # Without names the key is one of the others.
    assert read_prompts([], Path("in.jsonl"))[1].answered("z") == {"prompt": "y", "delta": 3, "prediction": "z"}


def test_a_delta_that_cannot_join_is_refused_before_any_work(gpt2_base, deltas, ranks2, tmp_path):
    make_delta(gpt2_base, "full_top", tmp_path / "top", 1)
    alone = answers(ranks2, gpt2_base, tmp_path / "top", prompts=["pub"])
    assert isinstance(alone, list)
    refused = answers(ranks2, gpt2_base, {"lora": deltas["lora"], "top": tmp_path / "top"})
    assert "top: transformer.h.2." in refused
    assert "Serve it alone" in refused
    other = make_gpt2(tmp_path / "other", seed=5)
    make_delta(other, "lora", tmp_path / "foreign", 1)
    assert "foreign: was trained on a base with digest " in answers(ranks2, gpt2_base, {"lora": deltas["lora"], "f": tmp_path / "foreign"})
    manifest = tmp_path / "bf16" / "manifest.json"
    make_delta(gpt2_base, "lora", tmp_path / "bf16", 1)
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"dtype": "bf16"}))
    told = answers(ranks2, gpt2_base, {"lora": deltas["lora"], "half": tmp_path / "bf16"})
    assert "(lora in fp32, half in bf16). Choose one for all with --dtype." in told
