"""Reading a job: defaults, resolved paths, every kind of mistake as one message, the resolved text and the digest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml, read_job
from tests.jobs import SHORT, write_job

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LONG = """
[base]
model = "base"
revision = "main"
dtype = "fp16"

[[methods]]
kind = "lora"
targets = ["q", "mlp_in", "attn.c_proj"]
rank = 4
alpha = 32.0
scaling = "sqrt_rank"
dropout = 0.25
init = "gaussian"

[task]
kind = "jsonl"
data = "train.jsonl"
valid = "train.jsonl"
test = "train.jsonl"
separator = " é\\n=> "
too_long = "truncate"

[train]
batch_examples = 20
micro_batch_tokens = 512
packing = false
max_tokens = 100
epochs = 2.5
learning_rate = 1e-3
schedule = "cosine"
warmup_ratio = 0.1
weight_decay = 0.01
adam_betas = [0.8, 0.95]
adam_eps = 1e-6
clip_norm = 0.0
label_smoothing = 0.1
dropout = 0.1
seed = 7
save_every_steps = 3

[evaluate]
split = "test"
at_start = true
every_steps = 5
max_prompts = 9
max_new_tokens = 11
batch_tokens = 2000
beams = 4
length_penalty = 0.8
early_stopping = true
no_repeat_ngram = 4
ngram_scope = "generated"
eos_tokens = [628]
seed = 5
gather = "once"

[memory]
config = "zero0.json"
gradient_checkpointing = true
"""


def refused(text: str) -> str:
    """What the user is told about a job with this text."""
    with pytest.raises(JobError) as caught:
        read_job(write_job(Path.cwd(), text))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_short_form_is_enough_and_takes_the_documented_defaults(tmp_path):
    job = read_job(write_job(tmp_path))
    assert (job.base.dtype, job.base.revision) == ("bf16", None)
    assert job.methods[0].targets == ("q", "v")
    assert (job.train.batch_examples, job.train.micro_batch_tokens, job.train.packing) == (8, 4096, True)
    assert (job.train.learning_rate, job.train.schedule, job.train.clip_norm) == (2e-4, "linear", 1.0)
    assert (job.train.dropout, job.train.label_smoothing, job.train.seed, job.train.save_every_steps) == (0.0, 0.0, 1, 500)
    assert (job.task.too_long, job.task.separator) == ("refuse", None)
    assert (job.evaluate.split, job.evaluate.max_new_tokens) == ("valid", 64)
    assert Path(job.memory.config).name == "zero3.json"
    assert not job.memory.gradient_checkpointing


def test_every_key_of_the_file_reaches_the_job(tmp_path):
    written = tomllib.loads(LONG)
    read = read_job(write_job(tmp_path, LONG)).model_dump(mode="json")
    for section in ("base", "task", "train", "evaluate", "memory"):
        for key, value in written[section].items():
            if key in ("model", "data", "valid", "test", "config"):
                assert Path(read[section][key]).name == value, f"{section}.{key}"
            else:
                assert read[section][key] == value, f"{section}.{key}"
    assert read["methods"] == [method | {"start": None} for method in written["methods"]]


def test_a_job_cannot_be_changed_after_reading(tmp_path):
    job = read_job(write_job(tmp_path))
    with pytest.raises(ValidationError):
        job.train.seed = 2


def test_whole_numbers_do_for_fractions(tmp_path):
    job = read_job(write_job(tmp_path, SHORT + "[train]\nepochs = 5\nclip_norm = 0\nadam_betas = [0, 0.9]\n"))
    assert job.train.epochs == 5.0
    assert job.train.adam_betas == (0.0, 0.9)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("base", "modle", "model"),
        ("methods[0]", "rnak", "rank"),
        ("task", "seperator", "separator"),
        ("train", "learning_rat", "learning_rate"),
        ("evaluate", "max_prompt", "max_prompts"),
        ("memory", "confg", "config"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_valid_name(section, key, nearest):
    heading = "[[methods]]\n" if section == "methods[0]" else f"[{section}]\n"
    text = SHORT.replace(heading, f"{heading}{key} = 1\n")
    message = refused(text if text != SHORT else f"{SHORT}{heading}{key} = 1\n")
    assert message.endswith(f'job.toml: {section}.{key}: unknown key. Did you mean "{nearest}"?')


def test_an_unknown_section_is_refused_with_the_nearest_valid_name():
    assert refused(f"{SHORT}[trian]\nsteps = 3\n").endswith('job.toml: trian: unknown key. Did you mean "train"?')


def test_an_unknown_key_that_resembles_nothing_is_answered_with_all_names():
    message = refused(f"{SHORT}[evaluate]\nzzzz = 1\n")
    for known in ("split", "at_start", "every_steps", "max_prompts", "max_new_tokens", "batch_tokens", "beams"):
        assert known in message


def test_a_key_of_another_task_is_not_suggested():
    message = refused(SHORT.replace('kind = "jsonl"', 'kind = "e2e"\nvalid = "train.jsonl"'))
    assert "task.valid: unknown key" in message
    assert 'mean "valid"' not in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "steps", '"20"'),
        ("train", "steps", "0"),
        ("train", "steps", "2.5"),
        ("train", "epochs", "true"),
        ("train", "epochs", "0.0"),
        ("train", "epochs", "inf"),
        ("train", "learning_rate", "-0.1"),
        ("train", "learning_rate", "nan"),
        ("train", "learning_rate", '"2e-4"'),
        ("train", "batch_examples", "0"),
        ("train", "micro_batch_tokens", "-1"),
        ("train", "max_tokens", "1"),
        ("train", "packing", '"no"'),
        ("train", "schedule", '"lineer"'),
        ("train", "warmup_steps", "-1"),
        ("train", "warmup_ratio", "1.5"),
        ("train", "clip_norm", "-1.0"),
        ("train", "label_smoothing", "1.0"),
        ("train", "seed", "-1"),
        ("train", "seed", "4294967296"),
        ("train", "adam_betas", "0.9"),
        ("evaluate", "split", '"dev"'),
        ("memory", "gradient_checkpointing", "1"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name_and_value(section, key, value):
    message = refused(f"{SHORT}[{section}]\n{key} = {value}\n")
    shown = {"inf": "Infinity", "nan": "NaN"}.get(value, value)
    assert f"job.toml: {section}.{key} = {shown}: " in message


def test_a_wrong_entry_of_a_list_is_named_by_its_place():
    assert "train.adam_betas[1] = 1.5: " in refused(f"{SHORT}[train]\nadam_betas = [0.9, 1.5]\n")
    assert 'methods[1].rank = "8": ' in refused(f'{SHORT}[[methods]]\nkind = "lora"\nrank = "8"\n')


def test_a_dtype_by_torchs_name_is_answered_with_ours():
    message = refused(SHORT.replace("[[methods]]", 'dtype = "float16"\n[[methods]]'))
    assert 'base.dtype = "float16"' in message
    assert "'fp16'" in message


@pytest.mark.parametrize(("lines", "name"), [('[base]\nmodel = "base"\n', "base"), ('[[methods]]\nkind = "lora"\n', "methods")])
def test_a_missing_section_is_named(lines, name):
    assert refused(SHORT.replace(lines, "")).split("job.toml: ")[1].startswith(f"{name}: missing. Add it")


def test_a_missing_task_is_named():
    assert refused(SHORT.partition("[task]")[0]).endswith("job.toml: task: missing. Add it.")


@pytest.mark.parametrize(
    ("line", "name"), [('model = "base"', "base.model"), ('kind = "lora"', "methods[0].kind"), ('data = "train.jsonl"', "task.data")]
)
def test_a_missing_key_is_named(line, name):
    assert refused(SHORT.replace(line, "")).split("job.toml: ")[1].startswith(f"{name}: missing. Add it")


def test_a_task_without_a_kind_is_told_the_kinds():
    message = refused(SHORT.replace('kind = "jsonl"', ""))
    assert "task.kind: missing" in message
    assert "'e2e'" in message
    assert "'jsonl'" in message


def test_a_misspelt_kind_is_told_the_kinds():
    message = refused(SHORT.replace('"jsonl"', '"json"'))
    assert 'task.kind = "json"' in message
    assert "'jsonl', 'csv', 'parquet'" in message
    message = refused(SHORT.replace('"lora"', '"lorra"'))
    assert 'methods[0].kind = "lorra"' in message
    assert "'lora'" in message


@pytest.mark.parametrize(
    ("text", "repair"),
    [
        (SHORT.replace("[[methods]]", "[methods]"), "[[methods]]"),
        ('base = "gpt2"\n' + SHORT.replace('[base]\nmodel = "base"\n', ""), "[base]"),
        (SHORT.replace('kind = "lora"', 'kind = "lora"\ntargets = "q"'), "brackets"),
        (SHORT.replace('kind = "lora"', 'kind = "lora"\ntargets = []'), "at least one"),
        ("methods = []\n" + SHORT.replace('[[methods]]\nkind = "lora"\n', ""), "at least one"),
    ],
)
def test_a_wrong_shape_is_answered_with_the_right_one(text, repair):
    assert repair in refused(text)


def test_two_lengths_or_two_warmups_are_refused():
    message = refused(f"{SHORT}[train]\nepochs = 1\nsteps = 5\n")
    assert "epochs and steps are both given" in message
    message = refused(f"{SHORT}[train]\nwarmup_steps = 1\nwarmup_ratio = 0.1\n")
    assert "warmup_steps and warmup_ratio are both given" in message


def test_a_file_that_is_not_toml_is_refused_with_its_line():
    message = refused("[base]\nmodel = gpt2\n")
    assert "job.toml: not valid TOML" in message
    assert "line 2" in message


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    file = tmp_path / "job.toml"
    file.write_bytes(b'[base]\nmodel = "\xff"\n')
    with pytest.raises(JobError, match=r"job\.toml: not valid TOML"):
        read_job(file)


def test_a_job_file_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path):
    for name in ("nowhere.toml", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(JobError) as caught:
            read_job(Path(name))
        assert name in str(caught.value)
        assert str(tmp_path) in str(caught.value)


def test_relative_paths_become_absolute_from_the_current_folder(tmp_path):
    (tmp_path / "jobs").mkdir()
    write_job(tmp_path, LONG).rename("jobs/moved.toml")
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 3}}')
    job = read_job(Path("jobs/moved.toml"), ("memory.config=mine.json",))
    assert job.base.model == str(tmp_path / "base")
    assert {job.task.data, job.task.valid, job.task.test} == {str(tmp_path / "train.jsonl")}
    assert job.memory.config == str(tmp_path / "mine.json")


@pytest.mark.parametrize("name", ["gpt2-medium", "meta-llama/Llama-3.2-1B"])
def test_a_hub_id_stays_as_it_is(tmp_path, name):
    job = read_job(write_job(tmp_path, SHORT.replace('"base"', f'"{name}"')))
    assert job.base.model == name


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/base", "~/base", "a/b/c", "../nowhere"])
def test_a_base_that_is_neither_a_folder_nor_a_hub_id_is_refused(name):
    message = refused(SHORT.replace('"base"', f'"{name}"'))
    assert f'job.toml: base.model = "{name}"' in message
    assert "Correct the path" in message


def test_an_empty_path_is_not_the_current_folder():
    assert 'base.model = ""' in refused(SHORT.replace('"base"', '""'))
    assert 'task.data = ""' in refused(SHORT.replace('"train.jsonl"', '""'))


@pytest.mark.parametrize("key", ["data", "valid", "test"])
def test_data_that_is_not_there_is_refused_with_where_it_was_looked_for(tmp_path, key):
    text = SHORT.replace('"train.jsonl"', '"gone.jsonl"') if key == "data" else f'{SHORT}{key} = "gone.jsonl"\n'
    message = refused(text)
    assert f'job.toml: task.{key} = "gone.jsonl"' in message
    assert str(tmp_path / "gone.jsonl") in message


def test_a_memory_configuration_that_is_not_there_is_answered_with_the_shipped_ones():
    message = refused(f'{SHORT}[memory]\nconfig = "zero9.json"\n')
    assert 'job.toml: memory.config: there is no file "zero9.json"' in message
    assert "zero0.json, zero3.json" in message


def test_a_bad_memory_configuration_is_refused_when_the_job_is_read(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}}')
    assert "mine.json: zero_optimization.stage = 2" in refused(f'{SHORT}[memory]\nconfig = "mine.json"\n')


@pytest.mark.parametrize("text", [SHORT, LONG], ids=["short", "long"])
def test_the_resolved_text_reads_back_as_an_equal_job_from_anywhere(tmp_path, monkeypatch, text):
    job = read_job(write_job(tmp_path, text))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Path("resolved.toml").write_text(job_toml(job), encoding="utf-8")
    again = read_job(Path("resolved.toml"))
    assert again == job
    assert job_digest(again) == job_digest(job)


def test_the_digest_does_not_depend_on_how_a_job_is_written(tmp_path):
    digest = job_digest(read_job(write_job(tmp_path)))
    sections = SHORT.strip().replace("[task]", "#\n[task]").split("#\n")
    spelt_out = f"# a comment\n{sections[1]}\n[train]\nseed = 1\nbatch_examples = 8\n{sections[0]}"
    assert job_digest(read_job(write_job(tmp_path, spelt_out))) == digest
    assert len(digest) == 64


def test_the_digest_changes_with_every_value(tmp_path):
    file = write_job(tmp_path, LONG)
    (tmp_path / "other").mkdir()
    (tmp_path / "other.jsonl").write_text("")
    changes = [
        *("base.model=other", "base.revision=dev", "base.dtype=bf16", "methods.0.rank=5", "methods.0.targets=['q']"),
        *("methods.0.init=kaiming", "task.data=other.jsonl", "task.separator=", "train.epochs=3", "train.steps=3", "train.seed=8"),
        *("train.adam_betas=[0.8, 0.96]", "train.packing=true", "evaluate.max_prompts=10", "memory.config=zero3.json"),
    ]
    digests = {job_digest(read_job(file, (change,))) for change in changes} | {job_digest(read_job(file))}
    assert len(digests) == len(changes) + 1


METHODS = """
[[methods]]
kind = "{kind}"
{keys}
"""


@pytest.mark.parametrize(
    ("kind", "keys", "told"),
    [
        ("full", 'targets = ["q"]', 'methods[0].targets: unknown key. Did you mean "start"?'),
        ("full_top", "layers = 0", "methods[0].layers = 0: input should be greater than 0."),
        ("prefix_embed", "prefix_tokens = 0\ninfix_tokens = 0", "prefix_tokens and infix_tokens are both 0. Give at least one token."),
        ("adapter", 'placement = "drop"', 'first_layer = None: "drop", and only "drop", needs a first_layer.'),
        ("adapter", "first_layer = 2", 'placement = "houlsby", first_layer = 2: "drop", and only "drop"'),
        ("bitfit", 'start = "runs/none"', 'methods[0].start = "runs/none": no such folder'),
        ("lora", "[[methods]]\nkind = 'lora'", "methods: lora is listed 2 times. List it once, with all its targets."),
        ("full", "[[methods]]\nkind = 'lora'", "full trains the whole base already, so lora adds nothing that is its own"),
        ("full_top", "[[methods]]\nkind = 'bitfit'", "full_top and bitfit both train the biases of the last layers"),
        ("prefix_embed", "[[methods]]\nkind = 'prefix_layer'", "prefix_embed and prefix_layer both place special tokens"),
    ],
)
def test_methods_that_cannot_be_are_refused(kind, keys, told):
    text = SHORT.replace('[[methods]]\nkind = "lora"\n', METHODS.format(kind=kind, keys=keys))
    assert told in refused(text)


def test_a_plan_needs_neither_data_nor_a_delta_to_begin_from(tmp_path):
    text = SHORT.replace("train.jsonl", "not/there.jsonl").replace('kind = "lora"', 'kind = "lora"\nstart = "runs/none"')
    file = write_job(tmp_path, text)
    assert read_job(file, lenient=True).methods[0].start == str(Path("runs/none").resolve())
    with pytest.raises(JobError, match="no such file or folder"):
        read_job(file)
