"""`zlora export`: PEFT, loralib's formula and huggingface_hub read what is written, and `zlora import` reads the same bits back."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, RobertaForSequenceClassification

from pipeline.deltas.merge import merge
from pipeline.deltas.resize import resize
from pipeline.exchange.exporting import check_vllm, export
from pipeline.exchange.importing import import_delta
from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, read_job
from pipeline.weights.delta import read_delta
from pipeline.weights.manifest import read_manifest
from tests.deltas.conftest import make_delta
from tests.training import trained, write_examples, write_job

TOKENS = torch.arange(4, 44)[None]
BITFIT = 'methods=[{kind="lora", targets=["q", "o"], rank=2}, {kind="bitfit"}]'
CASES = {
    "gpt2 q v": ("gpt2_base", ("methods.0.rank=3",)),
    "gpt2 all": ("gpt2_base", ('methods.0.targets=["q", "k", "v", "o", "mlp_in", "mlp_out"]', "methods.0.rank=2")),
    "gpt2 v o": ("gpt2_base", ('methods.0.targets=["v", "o"]', "methods.0.rank={v = 2, o = 2}")),
    "gpt2 whole map": ("gpt2_base", ('methods.0.targets=["attn.c_attn"]', "methods.0.rank=4")),
    "gpt2 biases": ("gpt2_base", (BITFIT,)),
    "llama": ("llama_base", ('methods.0.targets=["q", "v", "mlp_out"]', 'methods.0.scaling="sqrt_rank"', "methods.0.rank=5")),
}


@pytest.fixture(scope="module")
def made(request, ranks1, tmp_path_factory):
    """A trained delta and its base, by case; made once."""
    done = {}

    def make(case):
        if case not in done:
            name, settings = CASES[case]
            folder, base = tmp_path_factory.mktemp("export"), request.getfixturevalue(name)
            trained(ranks1, write_job(folder, base), folder / "run", *settings, "train.learning_rate=0.1")
            done[case] = (folder / "run" / "delta", base)
        return done[case]

    return make


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def merged_logits(base, delta, out, kind=AutoModelForCausalLM) -> torch.Tensor:
    merge(base, delta, out)
    return logits(kind.from_pretrained(out))


def same(one, other) -> None:
    """Every tensor to the bit, and what it is multiplied by."""
    ours, theirs = read_delta(one), read_delta(other)
    for name in ("pairs", "head", "replaced"):
        left, right = getattr(ours, name), getattr(theirs, name)
        assert left.keys() == right.keys(), name
        for key in left:
            assert all(map(torch.equal, left[key], right[key])) if name == "pairs" else torch.equal(left[key], right[key])
    scales = ({module.name: module.alpha / module.rank for module in stored.manifest.modules} for stored in (ours, theirs))
    assert next(scales) == pytest.approx(next(scales), rel=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it_with_the_merged_models_logits_and_it_comes_back(case, made, tmp_path):
    delta, base = made(case)
    export(delta, "peft", tmp_path / "peft", None, None)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "peft")
    torch.testing.assert_close(logits(model), merged_logits(base, delta, tmp_path / "merged"), atol=1e-4, rtol=1e-4)
    assert (logits(model) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    import_delta(tmp_path / "peft", str(base), None, tmp_path / "back", None, (), ())
    same(delta, tmp_path / "back")
    if case == "gpt2 biases":
        assert len(read_delta(tmp_path / "back").replaced) == 19
        assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["bias"] == "all"


def by_loralib(tensors: dict[str, torch.Tensor], alpha: float, parts: list[str]) -> dict[str, torch.Tensor]:
    """What each weight [D, K] gains by loralib's `Linear` and `MergedLinear`."""
    gains = {}
    for name in {key.rpartition(".")[0] for key in tensors if ".lora_" in key}:
        a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        if a.shape[0] == b.shape[1] and not (parts and name.endswith("c_attn")):
            gains[name] = b @ a * (alpha / b.shape[1])
            continue
        update = nn.functional.conv1d(a[None], b[..., None], groups=len(parts))[0] * (alpha / b.shape[1])
        padded = torch.zeros(3, update.shape[0] // len(parts), update.shape[1])
        padded[["qkv".index(part) for part in parts]] = update.view(len(parts), -1, update.shape[1])
        gains[name] = padded.flatten(0, 1)
    return gains


@pytest.mark.parametrize(
    ("case", "parts"), [("gpt2 q v", ["q", "v"]), ("gpt2 all", ["q", "k", "v"]), ("gpt2 v o", ["v"]), ("gpt2 biases", ["q"]), ("llama", [])]
)
def test_loralibs_formula_gives_the_merged_weights_and_it_comes_back(case, parts, made, tmp_path):
    delta, base = made(case)
    settings = export(delta, "loralib", tmp_path / "lora", None, None)["settings"]
    assert settings["parts"] == parts
    tensors = torch.load(tmp_path / "lora" / "lora.bin", weights_only=True)
    merge(base, delta, tmp_path / "merged")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (base, tmp_path / "merged")
    )
    gains = by_loralib(tensors, settings["lora_alpha"], parts)
    assert len(gains) == len(read_manifest(delta).modules)
    for name, gain in gains.items():
        moved = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(moved.T if "gpt2" in case else moved, gain, atol=1e-5, rtol=1e-4)
    import_delta(tmp_path / "lora" / "lora.bin", str(base), None, tmp_path / "back", settings["lora_alpha"], tuple(parts), ())
    same(delta, tmp_path / "back")
    # The folder knows what its file does not hold.
    import_delta(tmp_path / "lora", str(base), None, tmp_path / "again", None, (), ())
    same(delta, tmp_path / "again")


def test_the_papers_published_file_comes_out_as_it_went_in(shared_data, roberta_shaped, tmp_path):
    published = shared_data / "lora_paper_adapter" / "roberta_base_lora_mnli.bin"
    base = roberta_shaped
    labels = ("entailment", "neutral", "contradiction")
    import_delta(published, str(base), None, tmp_path / "mnli", 16.0, (), labels)
    settings = export(tmp_path / "mnli", "loralib", tmp_path / "out", None, None)["settings"]
    assert (settings["lora_alpha"], settings["labels"]) == (16.0, list(labels))
    ours, theirs = (torch.load(file, map_location="cpu", weights_only=True) for file in (tmp_path / "out" / "lora.bin", published))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    import_delta(tmp_path / "out" / "lora.bin", str(base), None, tmp_path / "again", None, (), ())
    same(tmp_path / "mnli", tmp_path / "again")
    assert read_manifest(tmp_path / "again").head.labels == labels
    export(tmp_path / "mnli", "peft", tmp_path / "peft", None, None)
    import_delta(tmp_path / "peft", str(base), None, tmp_path / "back", None, (), labels)
    same(tmp_path / "mnli", tmp_path / "back")
    bare = RobertaForSequenceClassification.from_pretrained(base, num_labels=3)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(bare, tmp_path / "peft")),
        merged_logits(base, tmp_path / "mnli", tmp_path / "merged", RobertaForSequenceClassification),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("family", ["roberta", "bert", "deberta-v2"])
def test_a_head_and_biases_go_to_peft_together(family, families, ranks1, tmp_path):
    base, rows = families(family), tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"a {label} b,{label}\n" for label in ("yes", "no")))
    job = tmp_path / "job.toml"
    job.write_text(
        f'[base]\nmodel = "{base}"\ndtype = "fp32"\n[[methods]]\nkind = "lora"\nrank = 2\n[[methods]]\nkind = "bitfit"\n'
        f'[task]\nkind = "classification"\ndata = "{rows}"\nlabels = ["yes", "no"]\n[train]\nsteps = 3\nlearning_rate = 0.1\n'
    )
    trained(ranks1, job, tmp_path / "run")
    export(tmp_path / "run" / "delta", "peft", tmp_path / "peft", None, None)
    wanted = merged_logits(base, tmp_path / "run" / "delta", tmp_path / "merged", AutoModelForSequenceClassification)
    bare = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, tmp_path / "peft")), wanted, atol=1e-4, rtol=1e-4)
    import_delta(tmp_path / "peft", str(base), None, tmp_path / "back", None, (), ("yes", "no"))
    same(tmp_path / "run" / "delta", tmp_path / "back")


@pytest.mark.parametrize("case", ["gpt2 q v", "gpt2 biases", "norms"])
def test_the_dense_difference_is_what_merging_adds(case, made, deltas, llama_base, tmp_path):
    delta, base = (deltas["norms"], llama_base) if case == "norms" else made(case)
    export(delta, "dense", tmp_path / "dense", str(base), None)
    merge(base, delta, tmp_path / "merged")
    before, after = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (base, tmp_path / "merged")
    )
    found = load_file(tmp_path / "dense" / "difference.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(found)
    for name, difference in found.items():
        assert difference.dtype == torch.float32
        torch.testing.assert_close(difference, after[name] - before[name], atol=1e-6, rtol=1e-4)
    with pytest.raises(JobError, match="Give --base"):
        export(delta, "dense", tmp_path / "again", None, None)


@pytest.fixture(scope="module")
def scored(gpt2_base, ranks1, tmp_path_factory):
    """A run that scored and kept its best delta."""
    folder = tmp_path_factory.mktemp("scored")
    job, data = write_job(folder, gpt2_base), folder / "data"
    data.mkdir()
    for split in ("train", "valid"):
        write_examples(data / f"{split}.jsonl", 24 if split == "train" else 6)
    settings = (f'task.data="{data}"', "evaluate.every_steps=2", 'evaluate.best_metric="loss"', "evaluate.max_new_tokens=4")
    trained(ranks1, job, folder / "run", *settings)
    return folder / "run"


def test_the_hub_reads_the_card_and_peft_the_folder(scored, gpt2_base, tmp_path):
    export(scored / "best", "hub", tmp_path / "my-adapter", None, None)
    text = (tmp_path / "my-adapter" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag, card.data.base_model) == ("peft", "text-generation", None)
    assert {"lora", "zlora"} <= set(card.data.tags)
    assert card.data.license is None, "nobody has said one"
    assert card.data.model_name == "my-adapter"
    best = json.loads((scored / "best" / "score.json").read_text())
    by_name = {result.metric_name: result for result in card.data.eval_results}
    assert {"BLEU", "exact_match", "loss", "perplexity"} == set(by_name)
    assert by_name["loss"].metric_value == best["value"]
    assert {(one.dataset_split, one.dataset_name, one.task_type) for one in by_name.values()} == {("valid", "jsonl", "text-generation")}
    manifest, state = read_manifest(scored / "best"), next((scored / "state").glob("*/state.json"))
    told = [manifest.base_digest, *manifest.base_files.values(), manifest.sha256, job_digest(read_job(scored / "job.toml"))]
    told += [row["sha256"] for row in json.loads(state.read_text())["data"]]
    told += [torch.__version__, "train.learning_rate", "0.01", "methods[0].rank", "the best of its run by loss", '" ->"']
    for one in told:
        assert one in text, one
    assert str(tmp_path.parent) not in text, "no paths"
    assert str(gpt2_base) not in text + (tmp_path / "my-adapter" / "adapter_config.json").read_text()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_base), tmp_path / "my-adapter")
    torch.testing.assert_close(logits(model), merged_logits(gpt2_base, scored / "best", tmp_path / "merged"), atol=1e-4, rtol=1e-4)


def test_a_delta_without_its_run_has_a_card_that_says_so(deltas, tmp_path):
    delta = tmp_path / "delta"
    delta.mkdir()
    manifest = json.loads((deltas["labels"] / "manifest.json").read_text())
    (delta / "manifest.json").write_text(json.dumps(manifest | {"base": "org/some-llama"}))
    (delta / "adapter_model.safetensors").write_bytes((deltas["labels"] / "adapter_model.safetensors").read_bytes())
    export(delta, "hub", tmp_path / "out", None, None)
    text = (tmp_path / "out" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/some-llama", "text-classification")
    assert card.data.eval_results is None
    assert "The run that made it is not known" in text
    assert "no, yes, perhaps" in text


def test_a_delta_made_from_others_says_from_which(made, tmp_path):
    delta, _ = made("gpt2 q v")
    resize(delta, tmp_path / "small", 2, None)
    export(tmp_path / "small", "hub", tmp_path / "out", None, None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "made by zlora from what is named below" in text
    assert f"sha256 {read_manifest(delta).sha256}" in text
    assert '{"rank": 2, "energy": null}' in text
    assert str(delta.parent) not in text
    (tmp_path / "small" / "made.json").write_text('{"total": [1], "from": 3}')
    export(tmp_path / "small", "hub", tmp_path / "again", None, None)
    assert "brought into zlora from another tool" in (tmp_path / "again" / "README.md").read_text()


def test_what_a_form_has_no_place_for_is_refused(made, deltas, llama_base, tmp_path):
    prefix = make_delta(llama_base, tmp_path / "prefix", 1)
    manifest = json.loads((prefix / "manifest.json").read_text())
    named = manifest["modules"][0]["name"]
    other = f"base_model.model.{named}.lora_A.weight"
    manifest |= {"modules": manifest["modules"][1:], "other": [other], "methods": [{"kind": "adapter"}]}
    (prefix / "manifest.json").write_text(json.dumps(manifest))
    uneven = tmp_path / "uneven"
    make_delta(llama_base, uneven, 2)
    held = json.loads((uneven / "manifest.json").read_text())
    held["modules"][0]["alpha"] = 3.0
    (uneven / "manifest.json").write_text(json.dumps(held))
    for delta, form, said in (
        (prefix, "peft", "PEFT's LoRA has no place for adapter of zlora's form"),
        (deltas["tokens"], "hub", "no place for rows of 16 added tokens"),
        (deltas["norms"], "loralib", r"trained parameters of the base that are not biases \(model.norm.weight and others"),
        (uneven, "loralib", "its modules have alpha 3.0 and 4.0"),
    ):
        with pytest.raises(JobError, match=said):
            export(delta, form, tmp_path / "out", None, None)
    for name in ("labels", "tokens"):
        with pytest.raises(JobError, match="which the base has not"):
            export(deltas[name], "dense", tmp_path / "out", str(llama_base), None)
    assert not (tmp_path / "out").exists()


def test_vllm_is_told_of_a_delta(made, deltas, llama_base, tmp_path):
    good = check_vllm(deltas["mlp"], str(llama_base), None)
    assert (good.reasons, good.notes, good.max_lora_rank) == ((), (), 8)
    for name, said in (("labels", "modules_to_save"), ("tokens", "Added tokens"), ("norms", "parameters of the base is trained too")):
        (reason,) = check_vllm(deltas[name], str(llama_base), None).reasons
        assert said in reason
    delta, base = made("gpt2 q v")
    (reason,) = check_vllm(delta, str(base), None).reasons
    assert "no LoRA for a gpt2" in reason


@pytest.mark.parametrize(
    ("settings", "alpha", "message"),
    [
        ({}, 7.0, r"--alpha 7: .*loralib.json says 4. Leave the option out"),
        ({"base_digest": "0" * 64}, None, "--base .* has other weights than .* which .* was exported for"),
        ({"lora_alpha": float("nan")}, None, "loralib.json: cannot be read .*lora_alpha nan"),
        ({"parts": "qv"}, None, "qv: not a list of texts"),
        ({"schema_version": 9}, None, "schema_version 9; this zlora reads 1"),
        ({"parts": ["q", "k", "v"]}, None, "Give --parts"),
    ],
)
def test_settings_beside_a_loralib_file_that_do_not_fit_are_refused(settings, alpha, message, made, tmp_path):
    delta, base = made("gpt2 q v")
    told = export(delta, "loralib", tmp_path / "lora", None, None)["settings"]
    (tmp_path / "lora" / "loralib.json").write_text(json.dumps(told | {"lora_alpha": 4.0} | settings))
    with pytest.raises(JobError, match=message):
        import_delta(tmp_path / "lora", str(base), None, tmp_path / "back", alpha, (), ())
    assert not (tmp_path / "back").exists()
