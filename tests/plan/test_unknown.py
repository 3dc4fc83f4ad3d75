"""Bases that the plan does not know: what their config.json says is counted, and the rest is said to be a guess."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    GPTJConfig,
    MixtralConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.plan.families import read_shape
from pipeline.planning.job import make_plan
from tests.training import write_job

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
MIXTURES = [
    MixtralConfig(),
    MixtralConfig(**SMALL, intermediate_size=96, max_position_embeddings=128),
    Qwen2MoeConfig(),
    Qwen2MoeConfig(**SMALL, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=6),
    Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=6, head_dim=16),
]


@pytest.mark.parametrize("config", MIXTURES, ids=lambda config: f"{config.model_type}-{config.hidden_size}")
def test_a_mixture_s_parameters_are_those_of_transformers(tmp_path, config):
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(tmp_path)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "is a mixture of" in shape.notes[0]


@pytest.mark.parametrize("config", [Olmo2Config(), PhiConfig(), BloomConfig(), GPTJConfig()], ids=lambda config: config.model_type)
def test_an_unknown_base_is_guessed_closely(tmp_path, config):
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_shape(tmp_path)
    assert shape.parameters == pytest.approx(sum(parameter.numel() for parameter in model.parameters()), rel=0.05)
    assert "is not known to the plan" in shape.notes[0]


def test_a_mixture_is_planned_and_what_is_a_guess_is_said(tmp_path, gpt2_base):
    base = tmp_path / "mixture"
    MIXTURES[1].save_pretrained(base)
    plan = make_plan(read_job(write_job(tmp_path, base), ()), "a100-80g", 4, None, None)
    assert "refuses to train" in plan["notes"][0]
    assert plan["base"]["parameters"] == 333504
    # q and v, rank 3: q as wide as the base, v of half its heads.
    assert plan["trained_parameters"] == 2 * 3 * (64 + 64 + 64 + 32)
    assert make_plan(read_job(write_job(tmp_path, gpt2_base), ()), "a100-80g", 4, None, None)["notes"] == []


def test_an_encoder_is_planned_for_labels_only(tmp_path):
    base = tmp_path / "bert"
    BertConfig(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4).save_pretrained(base)
    with pytest.raises(JobError, match="bert is an encoder, which generates no text"):
        make_plan(read_job(write_job(tmp_path, base), ()), "a100-80g", 1, None, None)


def test_an_index_of_the_weights_is_believed(tmp_path):
    config = {"model_type": "novel", "hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 100, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    guess = read_shape(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 4_000_000}}))
    shape = read_shape(tmp_path)
    assert guess.parameters < shape.parameters == 1_000_000
    assert sum(shape.sizes) == pytest.approx(1_000_000, abs=4)
    assert "parameters are counted by model.safetensors.index.json" in shape.notes


def test_what_cannot_even_be_guessed_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel", "hidden_size": 64, "vocab_size": 100}))
    with pytest.raises(
        JobError, match=r'config.json: architecture "novel" is not known to the plan, and the file has no num_hidden_layers'
    ):
        read_shape(tmp_path)
