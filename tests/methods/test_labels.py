"""A head for labels, against transformers' models for sequence classification with PEFT: the same training, the same answers."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

from pipeline.deltas.merge import merge
from pipeline.tasks.order import Stream
from tests.families import make_family
from tests.training import WORDS, read_run, trained

NAMES = ("cheap", "dear", "unknown")
STEPS = 6
JOB = """
[base]
model = "{base}"
dtype = "fp32"
[[methods]]
kind = "lora"
targets = ["o"]
rank = 3
alpha = 12
[task]
kind = "{kind}"
data = "{data}"
text_pair = "other"
{labels}
[train]
batch_examples = 7
steps = 6
learning_rate = 0.01
warmup_steps = 2
"""


def write_job(folder, base, kind):
    """Two texts a row, and what there is to say of them; lengths of all kinds."""
    rng = np.random.default_rng(1)
    data = folder / "data"
    data.mkdir()
    for split, count in (("train", 23), ("valid", 17), ("test", 5)):
        with (data / f"{split}.csv").open("w", newline="") as stream:
            out = csv.writer(stream)
            out.writerow(["text", "other", "label"])
            for number in range(count):
                one, two = (" ".join(WORDS[i] for i in rng.integers(0, len(WORDS), 1 + number % 7)) for _ in range(2))
                out.writerow([one, two, NAMES[number % 3] if kind == "classification" else round(float(rng.normal()), 3)])
    job = folder / "job.toml"
    job.write_text(JOB.format(base=base, kind=kind, data=data, labels=f"labels = {json.dumps(NAMES)}" if kind == "classification" else ""))
    return job


def read_rows(folder, split):
    with (folder / "data" / f"{split}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def wanted(row, kind):
    return NAMES.index(row["label"]) if kind == "classification" else float(row["label"])


def logits_of(model, tokenizer, row):
    ids = tokenizer(f"{row['text']}\n{row['other']}", return_tensors="pt").input_ids
    return model(ids).logits[0]


def loss_of(logits, label, kind, smoothing=0.0):
    if kind == "regression":
        return (logits[0] - label) ** 2
    return torch.nn.functional.cross_entropy(logits[None], torch.tensor([label]), label_smoothing=smoothing)


@pytest.fixture(params=[(base, kind) for base in ("gpt2_base", "llama_base") for kind in ("classification", "regression")])
def case(request):
    name, kind = request.param
    base = request.getfixturevalue(name)
    outputs = len(NAMES) if kind == "classification" else 1
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs, pad_token_id=0)
    return base, kind, plain, AutoTokenizer.from_pretrained(base)


def test_a_plain_peft_loop_trains_the_same_head_and_delta(case, ranks3, tmp_path):
    base, kind, plain, tokenizer = case
    job = write_job(tmp_path, base, kind)
    smoothing = 0.1 if kind == "classification" else 0.0
    settings = (f"train.label_smoothing={smoothing}",)
    trained(ranks3, job, tmp_path / "start", *settings, "train.steps=1")  # the first step has no learning rate
    ours = trained(ranks3, job, tmp_path / "run", *settings)
    model = PeftModel.from_pretrained(plain, tmp_path / "start" / "delta", is_trainable=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    rows, losses = read_rows(tmp_path, "train"), []
    for step in range(STEPS):
        chosen = [rows[index] for index in Stream((len(rows),), 1).examples(7 * step, 7)]
        loss = sum(loss_of(logits_of(model, tokenizer, row), wanted(row, kind), kind, smoothing) for row in chosen) / len(chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    np.testing.assert_allclose(ours.losses, losses, rtol=2e-5)
    assert [row["target_tokens"] for row in ours.steps] == [7] * STEPS
    theirs = {
        name.replace(".default", "").replace("modules_to_save.", ""): p.detach().numpy()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert theirs.keys() == ours.tensors.keys()
    assert sum("score" in name for name in theirs) == 1
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours.tensors[name], tensor, atol=3e-5, err_msg=name)


def test_scores_and_the_merged_model_are_transformers_and_scikit_learns(case, ranks2, tmp_path):
    base, kind, plain, tokenizer = case
    run = tmp_path / "run"
    trained(ranks2, write_job(tmp_path, base, kind), run)
    merge(base, run / "delta", tmp_path / "merged")
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    adapted = PeftModel.from_pretrained(plain, run / "delta").eval()
    rows = read_rows(tmp_path, "valid")
    with torch.no_grad():
        logits = torch.stack([logits_of(adapted, tokenizer, row) for row in rows])
        torch.testing.assert_close(torch.stack([logits_of(merged, tokenizer, row) for row in rows]), logits, atol=2e-5, rtol=1e-4)
    told = json.loads((run / "result.json").read_text())["valid"]
    known = [wanted(row, kind) for row in rows]
    losses = [float(loss_of(row, label, kind)) for row, label in zip(logits, known, strict=True)]
    assert told["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    predicted = [json.loads(line) for line in (run / "predictions" / f"valid-{STEPS:06d}.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in predicted] == [f"{row['text']}\n{row['other']}" for row in rows]
    if kind == "classification":
        assert merged.config.id2label == dict(enumerate(NAMES))
        found = logits.argmax(1).tolist()
        assert [row["prediction"] for row in predicted] == [NAMES[place] for place in found]
        expected = (accuracy_score(known, found), f1_score(known, found, average="macro"), matthews_corrcoef(known, found))
        assert (told["accuracy"], told["f1"], told["matthews"]) == pytest.approx(expected, abs=1e-9)
    else:
        found = logits[:, 0].tolist()
        assert merged.config.problem_type == "regression"
        assert [float(row["prediction"]) for row in predicted] == pytest.approx(found, abs=1e-5)
        expected = (pearsonr(known, found)[0], spearmanr(known, found)[0], told["loss"] ** 0.5)
        assert (told["pearson"], told["spearman"], told["rmse"]) == pytest.approx(expected, abs=1e-4)


def test_ranks_packing_and_micro_batches_change_nothing(gpt2_base, ranks1, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base, "classification")
    settings = ("train.classifier_dropout=0.3", "methods.0.dropout=0.2")
    one = trained(ranks1, job, tmp_path / "one", *settings)
    for name, pool, others in (
        ("two", ranks2, ()),
        ("padded", ranks2, ("train.packing=false",)),
        ("small", ranks1, ("train.micro_batch_tokens=80",)),
    ):
        other = trained(pool, job, tmp_path / name, *settings, *others)
        np.testing.assert_allclose(other.losses, one.losses, rtol=1e-5)
    plain = trained(ranks1, job, tmp_path / "plain", "methods.0.dropout=0.2")
    assert not np.allclose(plain.losses, one.losses, rtol=1e-4), "dropout before the head does something"


def test_a_run_with_a_head_goes_on_exactly(gpt2_base, ranks2, tmp_path):
    job = write_job(tmp_path, gpt2_base, "classification")
    whole = trained(ranks2, job, tmp_path / "whole", "train.save_every_steps=2")
    trained(ranks2, job, tmp_path / "part", "train.save_every_steps=2", "train.schedule=constant", "train.steps=4")
    trained(ranks2, job, tmp_path / "constant", "train.schedule=constant")
    trained(ranks2, job, tmp_path / "part", "train.save_every_steps=2", "train.schedule=constant")
    assert (tmp_path / "part" / "delta" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "constant" / "delta" / "adapter_model.safetensors"
    ).read_bytes()
    assert whole.losses[:3] == pytest.approx(read_run(tmp_path / "part").losses[:3])


def test_withheld_labels_are_predicted_and_not_scored(gpt2_base, ranks2, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    header = "index\tsentence1\tsentence2"
    for name, labels in (("train", ["entailment", "not_entailment"] * 4), ("dev", ["entailment"] * 3)):
        lines = [f"{header}\tlabel", *(f"{n}\tThe Eagle is near .\tThe Mill .\t{label}" for n, label in enumerate(labels))]
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (data / "test.tsv").write_text(f"{header}\n0\tA pub .\tA cafe .\n1\tThe city .\tThe Mill .\n")
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(base=gpt2_base, kind="glue", data=data, labels='name = "rte"').replace('text_pair = "other"\n', ""))
    trained(ranks2, job, tmp_path / "run", "train.steps=2")
    answer = ranks2.run(evaluate_here, str(tmp_path / "run"), "test")[0]
    assert answer["metrics"] == {}
    assert answer["notes"] == ["2 labels of the test split are withheld: predictions, but no scores."]
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines()]
    assert {row["prediction"] for row in rows} <= {"entailment", "not_entailment"}
    assert [row["references"] for row in rows] == [[], []]


def evaluate_here(ranks, run, split):
    import io
    from pathlib import Path

    from pipeline.job.read import read_job
    from pipeline.run import evaluate
    from pipeline.screen import Screen

    shown = Screen(io.StringIO(), shown=ranks.first)
    return evaluate(read_job(Path(run) / "job.toml"), Path(run), split, "last", ranks, shown)


def test_labels_as_text_are_generated_and_scored_as_labels(gpt2_base, ranks2, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    # The second text is there twice, with other labels: one prompt, two answers.
    lines = ["sentence\tlabel", "A pub .\t1", "A cafe .\t0", "A cafe .\t1", "The Mill .\t0"]
    for name in ("train", "dev"):
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    job = tmp_path / "job.toml"
    text = JOB.format(base=gpt2_base, kind="glue", data=data, labels='name = "sst2"\nform = "text"').replace('text_pair = "other"\n', "")
    job.write_text(text.replace("batch_examples = 7", "batch_examples = 4") + "[evaluate]\nmax_new_tokens = 12\n")
    everywhere = ('methods.0.targets=["q", "v", "o", "mlp_in", "mlp_out"]', "methods.0.rank=8", "methods.0.alpha=16")
    trained(ranks2, job, tmp_path / "run", "train.steps=60", *everywhere)
    told = json.loads((tmp_path / "run" / "result.json").read_text())["valid"]
    assert told["accuracy"] == 0.75, "three of four, whatever is said of the second text"
    assert told.keys() == {"accuracy", "loss", "perplexity"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "valid-000060.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["references"]) for row in rows][1] == ("sentence: A cafe .", ["negative", "positive"])
    assert (rows[0]["prediction"], rows[2]["prediction"]) == ("positive", "negative")


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2"])
def test_an_encoder_trains_on_pairs_and_judges_as_transformers_does(name, ranks2, tmp_path):
    base = make_family(name, tmp_path / "base")
    job = write_job(tmp_path, base, "classification")
    settings = ('methods.0.targets=["q", "v"]', "train.max_tokens=14", 'task.too_long="truncate"', "train.steps=3", "train.warmup_steps=0")
    run = trained(ranks2, job, tmp_path / "run", *settings)
    ranks2.run(evaluate_here, str(tmp_path / "run"), "test")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(NAMES))
    model, tokenizer = PeftModel.from_pretrained(plain, tmp_path / "run" / "delta").eval(), AutoTokenizer.from_pretrained(base)
    predictions = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "test.jsonl").read_text().splitlines()]
    for row, prediction in zip(read_rows(tmp_path, "test"), predictions, strict=True):
        logits = model(**tokenizer(row["text"], row["other"], return_tensors="pt")).logits[0]
        assert prediction["prediction"] == NAMES[int(logits.argmax())]
    # The first step's loss, from the tensors it began with: a step at a learning rate of next to nothing leaves them.
    start = trained(ranks2, job, tmp_path / "start", *settings[:3], "train.steps=1", "train.learning_rate=1e-12", "train.warmup_steps=0")
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(NAMES))
    model, rows = PeftModel.from_pretrained(plain, tmp_path / "start" / "delta").eval(), read_rows(tmp_path, "train")
    losses = []
    for index in Stream((len(rows),), 1).examples(0, 7):
        pair = tokenizer(rows[index]["text"], rows[index]["other"], truncation="longest_first", max_length=14, return_tensors="pt")
        losses.append(float(loss_of(model(**pair).logits[0], wanted(rows[index], "classification"), "classification").detach()))
    assert run.losses[0] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert start.losses[0] == run.losses[0]
