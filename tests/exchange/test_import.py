"""`zlora import`: loralib's checkpoints, the paper's published one among them, and what PEFT itself saved, give the same model here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, RobertaForSequenceClassification

from pipeline.analyze.report import analyze
from pipeline.deltas.merge import merge
from pipeline.exchange.importing import import_delta
from pipeline.job.errors import JobError
from pipeline.job.files import memory_config
from pipeline.job.method import Lora
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.methods.files import restore
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.weights.delta import read_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.manifest import read_manifest
from tests.families import make_family
from tests.training import trained

MNLI = ("entailment", "neutral", "contradiction")
PLAIN = {"r": 3, "lora_alpha": 12}
TOKENS = torch.arange(4, 44)[None]


def imported(source, base, out, alpha=None, parts=(), labels=()):
    report = import_delta(source, str(base), None, out, alpha, parts, labels)
    json.dumps(report)
    return report


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def published(shared_data):
    return shared_data / "lora_paper_adapter" / "roberta_base_lora_mnli.bin"


@pytest.fixture(scope="module")
def mnli(published, roberta_shaped, tmp_path_factory):
    """The published checkpoint as our delta."""
    out = tmp_path_factory.mktemp("import") / "mnli"
    assert imported(published, roberta_shaped, out, 16.0, labels=MNLI)["modules"] == 24
    return out


def test_the_papers_checkpoint_is_in_the_delta_to_the_bit(published, mnli):
    theirs = torch.load(published, map_location="cpu", weights_only=True)
    stored = read_delta(mnli)
    assert sum(a.numel() + b.numel() for a, b in stored.pairs.values()) == 294_912
    assert {(module.rank, module.alpha) for module in stored.manifest.modules} == {(8, 16.0)}
    ours = {f"{name}.lora_{part}": tensor for name, pair in stored.pairs.items() for part, tensor in zip("AB", pair, strict=True)}
    ours |= stored.head
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    head = stored.manifest.head
    assert (head.labels, head.architecture) == (MNLI, "RobertaForSequenceClassification")


def test_its_spectra_are_those_of_its_products(published, mnli):
    theirs = torch.load(published, map_location="cpu", weights_only=True)
    rows = analyze([mnli])["maps"]
    assert [(row["layer"], row["role"]) for row in rows] == [(layer, role) for layer in range(12) for role in "qv"]
    for row in rows:
        (found,) = row["deltas"]
        product = 2 * theirs[f"{row['module']}.lora_B"].double() @ theirs[f"{row['module']}.lora_A"].double()
        values = torch.linalg.svdvals(product)[:8]
        torch.testing.assert_close(torch.tensor(found["singular_values"], dtype=torch.float64), values, atol=0, rtol=1e-5)
        # What the paper says of its own: few directions have most of it.
        assert 1 < found["effective_rank"] < 8


def test_it_attaches_to_a_roberta_base_with_every_name_and_none_too_many(roberta_shaped, mnli):
    cpu, zero = torch.device("cpu"), deepspeed_config(memory_config("zero0.json"))
    base = load_base(roberta_shaped, read_config(roberta_shaped), torch.float32, cpu, zero)
    delta = attach(base, (Lora(kind="lora", rank=8, alpha=16.0),), 1, cpu, MNLI)
    # Refuses another set of modules, another rank, another head.
    restore(delta, mnli, base_digest(file_digests((roberta_shaped / "model.safetensors",))))
    pairs = read_delta(mnli).pairs
    for adapted in delta.adapted:
        (branch,) = adapted.branches
        assert all(torch.equal(*two) for two in zip((branch.a, branch.b), pairs[adapted.module], strict=True))


def test_a_job_begins_from_it(roberta_shaped, mnli, ranks1, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"a {label} b,{label}\n" for label in MNLI))
    job = tmp_path / "job.toml"
    job.write_text(
        f'[base]\nmodel = "{roberta_shaped}"\ndtype = "fp32"\n[[methods]]\nkind = "lora"\nrank = 8\nstart = "{mnli}"\n'
        f'[task]\nkind = "classification"\ndata = "{rows}"\nlabels = {json.dumps(MNLI)}\n[train]\nsteps = 1\nlearning_rate = 1e-9\n'
    )
    trained(ranks1, job, tmp_path / "run")
    before, after = read_delta(mnli), read_delta(tmp_path / "run" / "delta")
    assert after.manifest.step == 1
    for name, pair in before.pairs.items():
        torch.testing.assert_close(after.pairs[name], pair, atol=1e-7, rtol=0)
    torch.testing.assert_close(after.head, before.head, atol=1e-7, rtol=0)


def test_it_answers_as_loralibs_formula_does(published, roberta_shaped, mnli, tmp_path):
    tensors = torch.load(published, map_location="cpu", weights_only=True)
    reference = RobertaForSequenceClassification.from_pretrained(roberta_shaped, num_labels=3)
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "lora_A":
            reference.get_submodule(module).weight.data += tensors[f"{module}.lora_B"] @ tensor * (16 / 8)
        elif kind != "lora_B":
            reference.get_parameter(name).data.copy_(tensor)
    wanted = logits(reference)
    bare = RobertaForSequenceClassification.from_pretrained(roberta_shaped, num_labels=3)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(bare, mnli)), wanted, atol=1e-5, rtol=1e-5)
    merge(roberta_shaped, mnli, tmp_path / "merged")
    merged, info = RobertaForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"]
    assert {name.partition(".")[0] for name in info["unexpected_keys"]} <= {"lm_head"}
    assert merged.config.id2label == dict(enumerate(MNLI))
    torch.testing.assert_close(logits(merged), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("base", "targets"), [("gpt2_base", ["c_attn", "attn.c_proj", "c_fc"]), ("llama_base", ["q_proj", "v_proj", "down_proj"])]
)
@pytest.mark.parametrize(
    ("settings", "safe"),
    [
        (PLAIN, True),
        (PLAIN, False),
        ({**PLAIN, "rank_pattern": {".*c_attn|v_proj": 2}, "alpha_pattern": {".*1.*": 9, "c_fc|v_proj": 7}}, True),
        ({**PLAIN, "use_rslora": True}, True),
    ],
    ids=["plain", "pickled", "patterns", "stabilised"],
)
def test_what_peft_saved_answers_as_peft_does(base, targets, settings, safe, request, tmp_path):
    folder = request.getfixturevalue(base)
    torch.manual_seed(1)
    config = LoraConfig(
        **settings, target_modules=targets, init_lora_weights=False, fan_in_fan_out=base == "gpt2_base", task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "peft", safe_serialization=safe)
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists() == safe
    assert imported(tmp_path / "peft", folder, tmp_path / "delta")["modules"] == 9
    merge(folder, tmp_path / "delta", tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(theirs), atol=1e-4, rtol=1e-4)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "delta")
    assert torch.equal(logits(again), logits(theirs))


def test_a_head_that_peft_saved_comes_with_it(tmp_path):
    base = make_family("roberta", tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    theirs = get_peft_model(RobertaForSequenceClassification.from_pretrained(base, num_labels=1), config)
    theirs.save_pretrained(tmp_path / "peft")
    imported(tmp_path / "peft", base, tmp_path / "delta")
    assert read_manifest(tmp_path / "delta").head.labels is None
    merge(base, tmp_path / "delta", tmp_path / "merged")
    torch.testing.assert_close(
        logits(RobertaForSequenceClassification.from_pretrained(tmp_path / "merged")), logits(theirs), atol=1e-4, rtol=1e-4
    )


def loralib_gpt2(file: Path, enabled: list[bool], rank: int = 2) -> dict[str, torch.Tensor]:
    """A checkpoint as the paper's GPT-2 code saves it. Returns what each weight [K, D] gains at alpha = 8, by loralib's formula."""
    torch.manual_seed(2)
    width, parts, saved, gains = 32, sum(enabled), {}, {}
    for layer in range(3):
        name = f"transformer.h.{layer}.attn.c_attn"
        a, b = torch.randn(parts * rank, width), torch.randn(parts * width, rank)
        saved[f"module.{name}.lora_A"], saved[f"module.{name}.lora_B"] = a, b
        update = nn.functional.conv1d(a[None], b[..., None], groups=parts)[0]
        padded, place = torch.zeros(len(enabled), width, width), torch.tensor(enabled)
        padded[place] = update.view(parts, width, width)
        gains[name] = padded.view(-1, width).T * (8 / rank)
    torch.save({"model_state_dict": saved}, file)
    return gains


@pytest.mark.parametrize(("parts", "enabled"), [("q,v", [True, False, True]), ("q,k,v", [True, True, True]), ("v", [False, False, True])])
def test_loralibs_pairs_of_a_fused_map_are_taken_apart(parts, enabled, gpt2_base, tmp_path):
    gains = loralib_gpt2(tmp_path / "gpt2.pt", enabled)
    imported(tmp_path / "gpt2.pt", gpt2_base, tmp_path / "delta", 8.0, tuple(parts.split(",")))
    merge(gpt2_base, tmp_path / "delta", tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (gpt2_base, tmp_path / "merged"))
    assert len(gains) == 3
    for name, gain in gains.items():
        torch.testing.assert_close(after[f"{name}.weight"] - before[f"{name}.weight"], gain, atol=1e-5, rtol=1e-5)


def save(tensors, folder):
    torch.save(tensors, folder / "file.bin")
    return folder / "file.bin"


def pair(module="transformer.h.0.attn.c_proj", a=(2, 32), b=(32, 2), **others):
    return {f"{module}.lora_A": torch.ones(a), f"{module}.lora_B": torch.ones(b), **others}


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        (pair(), {"alpha": None}, r"file.bin: a loralib checkpoint does not hold alpha. Give --alpha"),
        (pair("h.0.attn.query"), {}, r"file.bin: h.0.attn.query: not in a gpt2"),
        (pair(other=torch.ones(2)), {}, r"file.bin: other: not in a gpt2"),
        (pair(a=(2, 31)), {}, r"has A of 2 x 31 and B of 32 x 2; the base's map is of 32 x 32"),
        (pair(a=(4, 32)), {}, r"pairs of 2 parts of a fused map. Give --parts, those of none that are known here"),
        (pair("transformer.h.0.attn.c_attn", (4, 32), (64, 2)), {}, r"Give --parts, those of q, k, v that were trained"),
        (pair("transformer.h.0.attn.c_attn", (4, 32), (64, 2)), {"parts": ("q", "o")}, r"Give --parts, those of q, k, v"),
        (dict(list(pair().items())[:1]), {}, r"transformer.h.0.attn.c_proj has lora_A, but no lora_B"),
        ({"weight": torch.ones(2)}, {}, r"has no tensors of a LoRA, such as weight"),
        ({"model": JobError}, {}, r"cannot be read as a file of tensors alone"),
        ([torch.ones(2)], {}, r"not a table of tensors by name"),
        (pair(), {"labels": ("a", "b")}, r"--labels a,b: .* has no head"),
        (pair(**{"score.weight": torch.ones(3, 32)}), {"labels": ("a", "b")}, r"--labels a,b: 2 names for 3 outputs"),
        (pair(**{"score.weight": torch.ones(3, 31)}), {}, r"score.weight has shape \[3, 31\], the base's head \[3, 32\]"),
    ],
)
def test_what_does_not_fit_is_said(tensors, options, said, gpt2_base, tmp_path):
    file = save(tensors, tmp_path)
    with pytest.raises(JobError, match=said):
        imported(file, gpt2_base, tmp_path / "delta", **{"alpha": 8.0, **options})
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, 'peft_type = "IA3". Only'),
        ({"use_dora": True}, "use_dora = true makes it another map"),
        ({"lora_alpha": None}, None),
    ],
)
def test_another_variant_of_peft_is_refused(change, said, llama_base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | change).items() if v is not None}))
    with pytest.raises(JobError, match=said or "cannot be read as the config of a LoRA"):
        imported(tmp_path / "peft", llama_base, tmp_path / "delta")


def test_a_folder_says_its_own_alpha_and_nothing_is_replaced(llama_base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(JobError, match=r"adapter_config\.json says what alpha is"):
        imported(tmp_path / "empty", llama_base, tmp_path / "delta", 8.0)
    with pytest.raises(JobError, match=r"has no adapter_config\.json"):
        imported(tmp_path / "empty", llama_base, tmp_path / "delta")
    with pytest.raises(JobError, match="no such file or folder"):
        imported(tmp_path / "nowhere", llama_base, tmp_path / "delta", 8.0)
    with pytest.raises(JobError, match="not empty"):
        imported(save(pair(), tmp_path), llama_base, tmp_path, 8.0)
