"""Shapes from a config.json, held to the models that transformers builds from the same file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.model.families import FAMILIES
from pipeline.plan.shapes import adapt, read_shape

CONFIGS = [
    GPT2Config(),
    GPT2Config(n_embd=96, n_layer=3, n_head=4, n_inner=200, vocab_size=1001, n_positions=77),
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=500, tie_word_embeddings=False),
    LlamaConfig(hidden_size=96, intermediate_size=250, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=999),
    LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=24, vocab_size=300,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    MistralConfig(hidden_size=96, intermediate_size=250, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=90),
    Qwen2Config(hidden_size=80, intermediate_size=120, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=90),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.model_type}-{config.hidden_size}")
def test_every_parameter_is_that_of_transformers(tmp_path, config):
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sorted(shape.sizes) == sorted(parameter.numel() for parameter in model.parameters())
    layer = model.get_submodule(f"{FAMILIES[config.model_type].layers}.0")
    for part in shape.layer:
        if part.sizes:
            assert part.sizes == tuple(parameter.numel() for parameter in layer.get_submodule(part.name).parameters())
    assert set(shape.roles) == set(FAMILIES[config.model_type].roles)
    assert (shape.vocabulary, shape.context, shape.layers) == (
        config.vocab_size,
        config.max_position_embeddings,
        config.num_hidden_layers,
    )


def test_a_family_that_can_be_trained_but_not_planned_is_told_by_name(tmp_path):
    from pipeline.plan import shapes

    assert set(shapes._FAMILIES) < set(FAMILIES)
    for family in set(FAMILIES) - set(shapes._FAMILIES):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(JobError, match=rf'architecture "{family}" is not known to the plan. Known are gpt2, llama'):
            read_shape(tmp_path)


@pytest.mark.parametrize(
    ("targets", "rank", "published"),
    [(("q", "v"), 1, 4.7), (("q", "v"), 4, 18.8), (("q", "k", "v", "o"), 2, 18.8), (("q", "v"), 8, 37.7), (("q", "v"), 64, 301.9)],
)
def test_gpt3_has_the_paper_s_counts(targets, rank, published):
    shape = read_shape(Path(__file__).parent.parent.parent / "jobs" / "gpt3" / "175b")
    # The paper's 175,255.8M is more than its shape gives, tied or not.
    assert shape.parameters == 174_604_259_328
    trained = shape.layers * adapt(shape, Lora(kind="lora", targets=targets, rank=rank)).layer_parameters(shape)
    assert trained / 1e6 == pytest.approx(published, abs=0.1)


def test_ranks_and_modules_by_target(tmp_path):
    CONFIGS[1].save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    found = adapt(shape, Lora(kind="lora", targets=("q", "mlp.c_fc"), rank={"q": 2, "mlp.c_fc": 5}))
    assert found.layer_parameters(shape) == 2 * (96 + 96) + 5 * (96 + 200)
    with pytest.raises(JobError, match=r'"query" is not a target of this base. It has q, k, v, o, mlp_in, mlp_out'):
        adapt(shape, Lora(kind="lora", targets=("query",)))


def test_what_is_not_known_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    with pytest.raises(JobError, match=r'"mixtral" is not known to the plan. Known are gpt2, llama'):
        read_shape(tmp_path)
    with pytest.raises(JobError, match=r"config.json: cannot be read"):
        read_shape(tmp_path / "nothing")
