"""`zlora generate`: the texts are transformers' and PEFT's own, on any ranks; files, pipes, and a conversation on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from pipeline.cli import app
from pipeline.job.errors import JobError
from pipeline.job.spec import Decoding
from pipeline.tasks.prompts import read_prompts
from tests.bases import make_gpt2, make_llama
from tests.training import train_here, write_job

ROOT = Path(__file__).parents[2]
PROMPTS = ["Blue Spice", "The Eagle near the riverside cafe", "pub", "x" * 60, "Italian city"]
ROOM = 20


@pytest.fixture(scope="module")
def run(gpt2_base, ranks1, tmp_path_factory):
    """A run whose delta changes what the base says."""
    folder = tmp_path_factory.mktemp("generation")
    ranks1.run(train_here, str(write_job(folder, gpt2_base)), str(folder / "run"), ("train.learning_rate=0.03", "train.steps=12"))
    return folder / "run"


def answers_on_ranks(ranks, base, delta=None, separator=None, prompts=PROMPTS, too_long="refuse", **settings) -> list[str] | str:
    """The texts, or the words of a refusal."""
    from pipeline.generate.generator import Source, open_generator
    from pipeline.job.files import memory_config
    from pipeline.screen import Screen
    from pipeline.tasks.prompts import read_prompts

    deltas = delta if isinstance(delta, dict) else {None: delta} if delta else {}
    source = Source(str(base), None, deltas, separator, None, memory_config("zero3.json"))
    decoding = Decoding(**{"max_new_tokens": ROOM, **settings})
    try:
        generator = open_generator(source, decoding, too_long, ranks, Screen(io.StringIO(), shown=False))
        with generator.ready() as ready:
            return ready.answers(read_prompts(prompts, None))
    except JobError as error:
        return str(error)


def answers(pool, *arguments, **settings):
    """The same on every rank."""
    first, *others = pool.run(partial(answers_on_ranks, **settings), *arguments)
    assert all(other == first for other in others)
    return first


def references(base: Path, delta: Path | None, separator: str, **settings) -> list[str]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if delta:
        model = PeftModel.from_pretrained(model, str(delta))
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt + separator, return_tensors="pt")
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=ROOM, pad_token_id=0, do_sample=False, **settings)
        texts.append(tokenizer.decode(found[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("settings", [{}, {"beams": 3, "gather": "each_pass"}], ids=str)
def test_texts_are_transformers_own_with_and_without_a_delta(gpt2_base, run, ranks1, ranks2, settings):
    wanted = {"num_beams": settings.get("beams", 1)}
    plain, adapted = references(gpt2_base, None, "", **wanted), references(gpt2_base, run / "delta", " ->", **wanted)
    assert plain != adapted
    for pool in (ranks1, ranks2):
        # The run folder stands for its delta, which knows its separator.
        for delta, expected in ((None, plain), (run, adapted), (run / "delta", adapted)):
            assert answers(pool, gpt2_base, delta, **settings) == expected
    assert answers(ranks1, gpt2_base, run, "", **settings) == references(gpt2_base, run / "delta", "", **wanted) != adapted


def generate(*arguments, cwd: Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", "generate", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120, env=environment(), check=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": tempfile.gettempdir()}


def test_a_prompt_file_is_answered_line_by_line_and_nothing_is_left(gpt2_base, run, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    rows = [{"id": number, "prompt": prompt, "prediction": "old"} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = ("--base", gpt2_base, "--delta", run, "--max-new-tokens", ROOM, "--ranks", "2")
    done = generate(*options, "--prompt-file", "in.jsonl", "--out", "out.jsonl", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["prompts"], answer["out"], answer["answers"], answer["deltas"][0]["separator"]) == (5, "out.jsonl", None, " ->")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = references(gpt2_base, run / "delta", " ->")
    assert written == [{**row, "prediction": text} for row, text in zip(rows, expected, strict=True)]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in.jsonl", "out.jsonl", "tmp"]
    # A pipe is a conversation: a line for a line. Draws are those of the file, too.
    drawn = (*options, "--temperature", "1.3", "--seed", "7")
    (tmp_path / "in.txt").write_text("\n".join(PROMPTS))
    whole = generate(*drawn, "--prompt-file", "in.txt", cwd=tmp_path)
    piped = generate(*drawn, cwd=tmp_path, stdin="\n".join(PROMPTS))
    assert (whole.returncode, whole.stdout.count("\n")) == (0, 5)
    assert (piped.returncode, piped.stdout) == (0, whole.stdout)
    assert {json.loads(line)["prediction"] for line in whole.stdout.splitlines()}.isdisjoint(expected[:3])


def test_a_delta_of_another_base_or_of_several_kinds_of_prompts_is_refused(run, gpt2_base, ranks2, tmp_path):
    assert "delta: was trained on a base with digest " in answers(ranks2, make_gpt2(tmp_path / "other", seed=5), run)
    old = shutil.copytree(run / "delta", tmp_path / "old")
    fields = json.loads((old / "manifest.json").read_text())
    assert (fields.pop("separator"), fields.pop("dtype")) == (" ->", "fp32")
    (old / "manifest.json").write_text(json.dumps(fields))
    assert "old: what ends a prompt is not known" in answers(ranks2, gpt2_base, old)
    assert answers(ranks2, gpt2_base, old, " ->") == answers(ranks2, gpt2_base, run)
    assert "absent: no manifest.json here" in answers(ranks2, gpt2_base, tmp_path / "absent")


def test_a_prompt_without_room_for_an_answer_is_named_or_cut(gpt2_base, ranks2, tmp_path):
    prompts = ["a", "y" * 20 + "x" * 120]
    assert "--prompt 2: 140 tokens with the separator, " in answers(ranks2, gpt2_base, prompts=prompts)
    # Room for the answer of 20 tokens is made.
    cut = answers(ranks2, gpt2_base, prompts=prompts, too_long="truncate")
    assert cut == answers(ranks2, gpt2_base, prompts=["a", "x" * 108])


def test_a_refusal_is_one_line_and_touches_nothing(gpt2_base, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for arguments, part in (
        (("--prompt", "a", "--out", "taken"), "taken: already there"),
        (("--prompt", "a", "--prompt-file", "f"), "--prompt and --prompt-file f are both given"),
        (("--prompt-file", "f"), "--prompt-file f: there is no such file"),
        (("--json",), "--json: belongs to --prompt"),
        (("--prompt", "a", "--beams", "0"), "--beams 0: input should be greater than 0"),
        (("--prompt", "a", "--beams", "2", "--temperature", "1"), "beams and temperature are both given"),
        (("--prompt", "a", "--memory", "f"), 'there is no file "f" in ds_configs/'),
    ):
        done = generate("--base", gpt2_base, *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        assert part in done.stderr
    piped = generate("--base", gpt2_base, cwd=tmp_path, stdin="a\n\nb\n")
    assert (piped.returncode, piped.stdout.count("\n")) == (2, 1)
    assert piped.stderr.endswith(
        "error: (standard input):2: an empty line. Remove it; an empty prompt is {} in a .jsonl file.\n".format('{"prompt": ""}')
    )
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


BAD_FILES = {
    "empty.txt": (b"", "empty.txt: holds no prompt"),
    "empty.jsonl": (b"\n", "empty.jsonl: holds no prompt"),
    "blank.txt": (b"a\n\nb\n", "blank.txt:2: an empty line"),
    "latin.txt": (b"a\n\xff\n", "latin.txt:2: not UTF-8 text"),
    "text.jsonl": (b'{"prompt": "a"}\n{"prompt": 3}\n', 'text.jsonl:2: "prompt" is missing or not text'),
    "broken.jsonl": (b'{"prompt": "a"}\n{"prompt"\n', "broken.jsonl:2: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_line_is_named(name, tmp_path):
    content, part = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError) as caught:
        read_prompts([], tmp_path / name)
    assert part in str(caught.value)


def test_options_are_the_keys_of_the_job():
    fields, schema = Decoding.model_fields, Decoding.model_json_schema()["properties"]
    options = {option.name: option for option in get_command(app).commands["generate"].params}
    for name, field in fields.items():
        option = options.pop(name)
        assert option.opts == [f"--{name.replace('_', '-')}"]
        assert (option.default or ()) == (field.default or ()), name
        meaning = " ".join(schema[name]["description"].split())
        assert meaning.startswith(option.help.rstrip(".")), f"{option.help!r} is not how the job says it: {meaning!r}"
    assert {"base", "delta", "prompt", "prompt_file", "out", "separator", "too_long", "ranks", "memory"} <= set(options)


class Terminal:
    """`zlora generate` with a terminal of its own: what is typed, and what is shown."""

    def __init__(self, *arguments, cwd: Path) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(
                sys.executable, [sys.executable, "-m", "pipeline", "generate", *map(str, arguments)], {**environment(), "TERM": "dumb"}
            )
        self._shown = ""

    def give_up_line(self) -> None:
        """Ctrl-C; again if it came before the program was reading, as a person would."""
        for seconds in (10, 60):
            self.type("\x03")
            try:
                self.until("\n> ", seconds)
                return
            except AssertionError:
                if seconds == 60:
                    raise

    def until(self, text: str, seconds: float = 60) -> str:
        """What has been shown up to `text` since the last call."""
        deadline = time.monotonic() + seconds
        while text not in self._shown:
            assert time.monotonic() < deadline, self._shown
            if select.select([self._terminal], [], [], 0.2)[0]:
                try:
                    self._shown += os.read(self._terminal, 1 << 16).decode().replace("\r", "")
                except OSError:
                    raise AssertionError(f"it ended: {self._shown}") from None
        before, _, self._shown = self._shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def ended(self) -> int:
        """The exit code, once it is there."""
        for _ in range(200):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self._terminal)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self._shown}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_conversation_on_a_terminal(gpt2_base, run, ranks, tmp_path):
    expected = references(gpt2_base, run / "delta", " ->")
    talk = Terminal("--base", gpt2_base, "--delta", run, "--max-new-tokens", ROOM, "--ranks", ranks, cwd=tmp_path)
    assert "Ctrl-D ends" in talk.until("\n> ")
    for prompt, text in zip(PROMPTS[:2], expected, strict=False):
        talk.type(f"{prompt}\n")
        assert [line.rstrip() for line in talk.until("\n> ").split("\n", 1)][1:] == [plain(text).rstrip()]
    talk.type("\n")
    talk.until("> ")
    # Too long is refused, and the conversation goes on.
    talk.type("y" * 150 + "\n")
    assert "(standard input):3: 15" in talk.until("\n> ")
    # A line that is given up; then the one before is brought back by arrow up.
    talk.type("Fren")
    talk.until("Fren")
    talk.give_up_line()
    talk.type("pub\n")
    assert plain(expected[2]).rstrip() in talk.until("\n> ")
    talk.type("\x04")
    assert talk.ended() == 0
    assert list(tmp_path.iterdir()) == []


def plain(text: str) -> str:
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


@pytest.mark.parametrize("options", [("--ranks", "1"), ("--ranks", "2", "--gather", "each_pass")], ids=str)
def test_ctrl_c_ends_an_answer_and_nothing_else(options, tmp_path):
    # The end token is never the likeliest: without Ctrl-C it would go on for minutes.
    base = make_llama(tmp_path / "base", max_position_embeddings=100_000)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.nn.init.zeros_(model.lm_head.weight[0])
    model.save_pretrained(base, max_shard_size="40KB")
    talk = Terminal("--base", base, "--max-new-tokens", "90000", *options, cwd=tmp_path)
    talk.until("\n> ")
    for _ in range(2):
        talk.type("Blue Spice\n")
        talk.until("Blue Spice\n")
        time.sleep(1.0)
        talk.type("\x03")
        assert len(talk.until(" [interrupted]", 10)) > 3
        talk.until("\n> ")
    talk.type("\x04")
    assert talk.ended() == 0


def test_a_rank_that_dies_ends_the_conversation(gpt2_base, tmp_path):
    talk = Terminal("--base", gpt2_base, "--ranks", "2", cwd=tmp_path)
    talk.until("\n> ")
    children = subprocess.run(["pgrep", "-P", str(talk.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    talk.type("Blue Spice\n")
    talk.until("rank 1 was ended by SIGKILL", 20)
    assert talk.ended() == 76
