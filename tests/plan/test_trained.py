"""What each method trains, counted from shapes: the LoRA paper's list, transformers' parameters by name, PEFT and torch's own modules."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from pipeline.job.errors import JobError
from pipeline.job.files import BASES, known_base
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Lora, PrefixEmbed, PrefixLayer
from pipeline.model.build import build
from pipeline.model.families import FAMILIES
from pipeline.plan.families import read_shape
from pipeline.plan.published import rows
from pipeline.plan.trained import trained
from tests.families import DECODERS, ENCODERS

FULL, BITFIT, LORA = Full(kind="full"), BitFit(kind="bitfit"), Lora(kind="lora")
EMBED, LAYER = PrefixEmbed(kind="prefix_embed"), PrefixLayer(kind="prefix_layer", prefix_tokens=3, infix_tokens=2)
CONFIGS = {
    **ENCODERS,
    **DECODERS,
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=320, n_positions=128),
    "llama": LlamaConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=320,
        attention_bias=True,
    ),
}  # fmt: skip

PRINTED = {
    "gpt2-medium": "FT 354.92 FT-Top2 25.19 Adapter-L 0.37 Adapter-L 11.09 Adapter-H 11.09 PreLayer 0.35 LoRA 0.35",
    "gpt2-large": "FT 774.03 Adapter-L 0.88 Adapter-L 23.00 PreLayer 0.77 LoRA 0.77",
    "roberta-base": "FT 125.0 BitFit 0.1 Adpt-D 0.3 Adpt-D 0.9 LoRA 0.3",
    "roberta-large": "FT 355.0 Adpt-P 3.0 Adpt-P 0.8 Adpt-H 6.0 Adpt-H 0.8 LoRA 0.8",
    "deberta-v2-xxlarge": "FT 1500 LoRA 4.7 LoRA 4.7",
    "gpt3-175b": "FT 175,255.8 BitFit 14.2 PreEmbed 0.4 PreEmbed 0.9 PreEmbed 1.7 PreEmbed 3.2 PreEmbed 6.4 "
    "PreLayer 5.1 PreLayer 10.1 PreLayer 20.2 PreLayer 44.1 PreLayer 76.1 "
    "Adapter-H 7.1 Adapter-H 21.2 Adapter-H 40.1 Adapter-H 77.9 Adapter-H 304.4 "
    "LoRA 4.7 LoRA 4.7 LoRA 9.4 LoRA 9.4 LoRA 18.8 LoRA 18.8 LoRA 37.7 LoRA 37.7 LoRA 301.9 LoRA 603.8 "
    "LoRA+PE 37.8 LoRA+PE 151.1 LoRA+PE 302.1 LoRA+PL 52.8",
}
"""Base -> what the paper calls a method, and its millions of parameters; in its order."""
OTHERS = {
    ("gpt2-medium", "FT", "354.92"): [354_823_168],
    ("gpt2-medium", "Adapter-H", "11.09"): [48 * (2 * 1024 * 112 + 112 + 1024)],
    ("gpt2-medium", "PreLayer", "0.35"): [24 * 1024 * 14],
    ("gpt2-medium", "LoRA", "0.35"): [393_216],
    ("gpt2-large", "PreLayer", "0.77"): [36 * 1280 * 17],
    ("gpt2-large", "LoRA", "0.77"): [737_280],
    ("roberta-base", "FT", "125.0"): [124_055_040],
    ("roberta-large", "FT", "355.0"): [354_310_144],
    ("roberta-large", "Adpt-P", "3.0"): [24 * (2 * 1024 * 64 + 64 + 1024)],
    ("roberta-large", "Adpt-H", "6.0"): [48 * (2 * 1024 * 64 + 64 + 1024)],
    ("deberta-v2-xxlarge", "FT", "1500"): [1_564_549_632],
    ("deberta-v2-xxlarge", "LoRA", "4.7"): [48 * 2 * 2 * 1536 * 8],
    ("gpt3-175b", "FT", "175,255.8"): [174_604_259_328],
    ("gpt3-175b", "BitFit", "14.2"): [96 * 11 * 12288 + 12288],
    ("gpt3-175b", "PreEmbed", "0.4"): [12288 * 40],
    ("gpt3-175b", "PreLayer", "5.1"): [96 * 12288 * 4],
    ("gpt3-175b", "PreLayer", "10.1"): [96 * 12288 * 8],
    ("gpt3-175b", "PreLayer", "20.2"): [96 * 12288 * 16],
    ("gpt3-175b", "PreLayer", "44.1"): [96 * 12288 * 36],
    ("gpt3-175b", "PreLayer", "76.1"): [96 * 12288 * 64],
    ("gpt3-175b", "LoRA", "18.8"): [18_874_368, 18_874_368],
    ("gpt3-175b", "LoRA", "301.9"): [301_989_888],
    ("gpt3-175b", "LoRA", "603.8"): [603_979_776],
    ("gpt3-175b", "LoRA+PE", "37.8"): [37_748_736 + 12 * 12288],
    ("gpt3-175b", "LoRA+PL", "52.8"): [37_748_736 + 96 * 12 * 12288],
}
"""Where the formula gives another figure than the paper prints: what it gives."""


def adapter(placement, rank=5, **settings):
    return Adapter(kind="adapter", placement=placement, rank=rank, **settings)


def top(layers):
    return FullTop(kind="full_top", layers=layers)


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """`families(name)` -> its shape, and name -> elements of each of transformers' parameters."""

    @cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        CONFIGS[name].save_pretrained(folder)
        model, _ = build(AutoConfig.from_pretrained(folder), 0.0)
        return read_shape(folder), {key: parameter.numel() for key, parameter in model.named_parameters()}

    return made


def test_the_paper_s_list_to_its_printed_precision_or_with_a_reason():
    found: dict[str, list[str]] = {}
    others: dict[tuple[str, str, str], list[int]] = {}
    for row in rows():
        found.setdefault(row.base, []).extend((row.name, row.printed))
        count = trained(read_shape(BASES / row.base), *row.methods)
        if row.as_printed(count) != row.printed:
            others.setdefault((row.base, row.name, row.printed), []).append(count)
            assert row.note, row
    assert {base: " ".join(words) for base, words in found.items()} == PRINTED
    assert others == OTHERS


def test_what_the_reasons_say_is_so():
    shapes = {name: read_shape(BASES / name) for name in PRINTED}
    medium, gpt3 = shapes["gpt2-medium"], shapes["gpt3-175b"]
    assert round((medium.parameters + 24 * 4 * 1024) / 1e6, 2) == 354.92
    assert [round(shapes[name].parameters / 1e9, 2) for name in ("gpt2-medium", "gpt2-large")] == [0.35, 0.77]
    for name, millions, printed in (("roberta-base", 124.65, 125), ("roberta-large", 355.36, 355)):
        with_head = shapes[name].parameters + shapes[name].head_parameters(2)
        assert (round(with_head / 1e6, 2), round(with_head / 1e6)) == (millions, printed)
    assert gpt3.parameters + 50257 * 12288 == 175_221_817_344
    assert round(96 * 12 * 12288 / 1e6, 1) == 14.2


@pytest.mark.parametrize("name", PRINTED)
def test_the_paper_s_bases_are_transformers(name):
    model, _ = build(AutoConfig.from_pretrained(BASES / name), 0.0)
    shape, parameters = read_shape(BASES / name), {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert trained(shape, FULL) == sum(parameters.values())
    assert trained(shape, BITFIT) == sum(size for key, size in parameters.items() if key.endswith("bias"))
    assert known_base(name) == BASES / name


def test_gpt3_is_the_shipped_job_s():
    shipped = Path(__file__).parents[2] / "jobs" / "gpt3" / "175b" / "config.json"
    assert json.loads(shipped.read_text()) == json.loads((BASES / "gpt3-175b" / "config.json").read_text())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_parts_of_the_base_are_transformers_by_name(families, name):
    shape, parameters = families(name)
    last = f"{FAMILIES[name].layers}.{shape.layers - 1}."
    norms = tuple(f"{FAMILIES[name].layers}.{layer}.{norm}." for layer in range(shape.layers) for norm in FAMILIES[name].norms)

    def of(chosen):
        return sum(size for key, size in parameters.items() if chosen(key))

    assert trained(shape, FULL) == of(lambda key: True)
    assert trained(shape, BITFIT) == of(lambda key: key.endswith("bias"))
    assert trained(shape, top(1)) == of(lambda key: key.startswith(last))
    assert trained(shape, top(shape.layers)) == of(lambda key: key.startswith(FAMILIES[name].layers))
    plain, with_norms = (trained(shape, adapter("pfeiffer", train_layernorm=on)) for on in (False, True))
    assert with_norms - plain == of(lambda key: key.startswith(norms)) > 0


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_is_added_is_as_large_as_torch_and_peft_make_it(families, name):
    shape, parameters = families(name)
    width = CONFIGS[name].hidden_size
    table = next(key for key in parameters if "embed" in key or "wte" in key)
    with torch.device("meta"):
        bottleneck = nn.Sequential(nn.Linear(width, 5), nn.Linear(5, width))
        norm = nn.LayerNorm(width)
    one, norm = (sum(parameter.numel() for parameter in module.parameters()) for module in (bottleneck, norm))
    assert trained(shape, adapter("houlsby")) == 2 * shape.layers * one
    assert trained(shape, adapter("pfeiffer")) == shape.layers * one
    assert trained(shape, adapter("lin")) == shape.layers * (one + norm)
    assert trained(shape, adapter("lin", train_layernorm=False)) == shape.layers * one
    assert trained(shape, adapter("drop", first_layer=1)) == (shape.layers - 1) * one
    assert trained(shape, EMBED) == 16 * parameters[table] // CONFIGS[name].vocab_size
    assert trained(shape, LAYER) == 5 * shape.layers * width


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_lora_and_prompts_are_peft_s(families, name):
    for config, method in (
        (LoraConfig(target_modules=["q_proj", "v_proj"], r=8), LORA),
        (PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=16), EMBED),
    ):
        with init_empty_weights():
            model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS[name]), config)
        assert trained(families(name)[0], method) == model.get_nb_trainable_parameters()[0]


def test_of_several_methods_what_two_of_them_train_counts_once(families):
    shape, _ = families("gpt2")
    norms = adapter("houlsby", train_layernorm=True)
    # Two norms a layer, of width 32.
    assert trained(shape, norms, BITFIT) == trained(shape, norms) + trained(shape, BITFIT) - 3 * 2 * 32
    assert trained(shape, norms, top(1)) == trained(shape, norms) + trained(shape, top(1)) - 2 * 2 * 32
    assert trained(shape, LORA, EMBED) == trained(shape, LORA) + trained(shape, EMBED)
    assert trained(shape, FULL, LAYER) == shape.parameters + trained(shape, LAYER)
    upper = adapter("drop", first_layer=2, train_layernorm=True)
    assert trained(shape, upper) == trained(shape, adapter("drop", first_layer=2)) + 2 * 2 * 32


def test_what_the_base_does_not_have_is_said(families):
    shape, _ = families("gpt2")
    with pytest.raises(JobError, match=r"first_layer = 3, but the base's layers are 0 to 2"):
        trained(shape, adapter("drop", first_layer=3))
    with pytest.raises(JobError, match=r"layers = 4, but the base has 3"):
        trained(shape, top(4))
    with pytest.raises(JobError, match=r'"query" is not a target'):
        trained(shape, Lora(kind="lora", targets=("query",)))


def test_a_base_is_the_paper_s_by_its_own_name_only():
    assert known_base("FacebookAI/roberta-base") == known_base("roberta-base")
    assert known_base("openai-community/gpt2-large") == BASES / "gpt2-large"
    for name in ("someone/gpt2-large", "gpt2-large/", "..", "", "gpt2"):
        assert known_base(name) is None, name
