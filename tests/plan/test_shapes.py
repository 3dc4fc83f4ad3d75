"""Shapes from a config.json, held to the models that transformers builds from the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)  # fmt: skip

from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.head import draw_head
from pipeline.model.build import build
from pipeline.model.config import read_config
from pipeline.model.families import FAMILIES
from pipeline.plan import families
from pipeline.plan.adapted import adapt
from pipeline.plan.families import read_shape

SMALL = {"hidden_size": 96, "intermediate_size": 250, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 999}
GROUPED = {**SMALL, "num_key_value_heads": 2}
OPT = {"hidden_size": 96, "ffn_dim": 250, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 999}
DEBERTA = {**SMALL, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}
CONFIGS = [
    GPT2Config(),
    GPT2Config(n_embd=96, n_layer=3, n_head=4, n_inner=200, vocab_size=1001, n_positions=77),
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, tie_word_embeddings=False),
    LlamaConfig(),
    LlamaConfig(**GROUPED),
    LlamaConfig(**SMALL, head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    MistralConfig(),
    MistralConfig(**GROUPED),
    Qwen2Config(),
    Qwen2Config(**GROUPED),
    Qwen3Config(),
    Qwen3Config(**GROUPED, head_dim=24),
    GemmaConfig(),
    GemmaConfig(**GROUPED, head_dim=24),
    Gemma2Config(),
    Gemma2Config(**GROUPED, head_dim=24),
    Gemma3TextConfig(),
    Gemma3TextConfig(**GROUPED, head_dim=24),
    OPTConfig(),
    OPTConfig(**OPT, word_embed_proj_dim=40, do_layer_norm_before=False),
    OPTConfig(**OPT, enable_bias=False, layer_norm_elementwise_affine=False, tie_word_embeddings=False),
    GPTNeoXConfig(),
    GPTNeoXConfig(**SMALL, attention_bias=False, use_parallel_residual=False),
    BertConfig(),
    BertConfig(**SMALL),
    RobertaConfig(),
    RobertaConfig(**SMALL, type_vocab_size=1, max_position_embeddings=514),
    DebertaV2Config(),
    DebertaV2Config(**DEBERTA, share_att_key=True, position_biased_input=False, conv_kernel_size=3),
    DebertaV2Config(**DEBERTA, share_att_key=False, type_vocab_size=2),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.model_type}-{config.hidden_size}")
def test_every_parameter_is_that_of_transformers(tmp_path, config):
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    model, family = build(read_config(tmp_path), 0.0)
    assert sorted(shape.sizes) == sorted(parameter.numel() for parameter in model.parameters())
    layer = model.get_submodule(f"{family.layers}.0")
    names = {name for name, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))}
    assert {part.name for part in shape.layer if part.sizes} == names
    for part in shape.layer:
        if part.sizes:
            assert part.sizes == tuple(parameter.numel() for parameter in layer.get_submodule(part.name).parameters())
    assert set(shape.roles) == set(family.roles)
    assert (shape.vocabulary, shape.context, shape.layers) == (config.vocab_size, family.context(config), config.num_hidden_layers)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.hidden_size == 96], ids=lambda config: config.model_type)
def test_a_head_for_labels_is_counted(tmp_path, config):
    config.save_pretrained(tmp_path)
    shape, (model, family) = read_shape(tmp_path), build(read_config(tmp_path), 0.0)
    head = draw_head(model.config, family.head, ("no", "yes", "neither"), 0, 0.0, DropoutClock(0), torch.device("cpu"))
    assert shape.head_parameters(3) == sum(tensor.numel() for tensor in head.tensors.values())


def test_every_family_that_can_be_trained_can_be_planned():
    assert set(families._FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.hidden_size != 96], ids=lambda config: config.model_type)
def test_what_a_config_leaves_out_is_as_in_transformers(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.model_type}))
    bare = read_shape(tmp_path)
    if config == type(config)():
        config.save_pretrained(tmp_path)
        assert bare == read_shape(tmp_path)


@pytest.mark.parametrize(
    ("targets", "rank", "published"),
    [(("q", "v"), 1, 4.7), (("q", "v"), 4, 18.8), (("q", "k", "v", "o"), 2, 18.8), (("q", "v"), 8, 37.7), (("q", "v"), 64, 301.9)],
)
def test_gpt3_has_the_paper_s_counts(targets, rank, published):
    shape = read_shape(Path(__file__).parent.parent.parent / "jobs" / "gpt3" / "175b")
    # The paper's 175,255.8M is more than its shape gives, tied or not.
    assert shape.parameters == 174_604_259_328
    trained = shape.layers * adapt(shape, Lora(kind="lora", targets=targets, rank=rank)).layers[0].layer_parameters(shape)
    assert trained / 1e6 == pytest.approx(published, abs=0.1)


def test_ranks_and_modules_by_target(tmp_path):
    CONFIGS[1].save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    found = adapt(shape, Lora(kind="lora", targets=("q", "mlp.c_fc"), rank={"q": 2, "mlp.c_fc": 5}))
    assert found.layers[0].layer_parameters(shape) == 2 * (96 + 96) + 5 * (96 + 200)
    with pytest.raises(JobError, match=r'"query" is not a target of this base. It has q, k, v, o, mlp_in, mlp_out'):
        adapt(shape, Lora(kind="lora", targets=("query",)))


def test_what_is_not_known_is_named(tmp_path):
    with pytest.raises(JobError, match=r"config.json: cannot be read"):
        read_shape(tmp_path / "nothing")
