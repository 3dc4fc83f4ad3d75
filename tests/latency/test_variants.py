"""The timed models compute what they are called: against transformers' own model, with each method written out beside it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.job.method import Adapter, Lora
from pipeline.latency.variants import METHODS, make_variants
from pipeline.model.config import read_config
from pipeline.model.families import FAMILIES
from pipeline.plan.families import read_shape
from pipeline.plan.trained import trained

CPU = torch.device("cpu")
TOKENS = torch.randint(300, (3, 11), generator=torch.Generator().manual_seed(0))


def made(folder, methods=METHODS, dtype=torch.float32, bottlenecks=(4,)):
    return {one.name: one for one in make_variants(read_config(folder), methods, 2, bottlenecks, dtype, CPU)}


def theirs(folder, base):
    """transformers' model of the same weights."""
    config = read_config(folder)
    kind = AutoModelForSequenceClassification if base.family.encoder else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in base.model.named_parameters():
            model.get_parameter(name).copy_(parameter)
    return model


def answer(model, family):
    with torch.no_grad():
        if family.encoder:
            return model.get_submodule(family.body)(TOKENS).last_hidden_state
        return model(TOKENS).logits


def logits(variant):
    with torch.inference_mode():
        return variant.logits(TOKENS)


def up(tensors, name, h):
    """up(relu(down(h))) with the tensors of one adapter."""
    if f"{name}.norm.weight" in tensors:
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], tensors[f"{name}.norm.weight"], tensors[f"{name}.norm.bias"])
    inner = torch.relu(h @ tensors[f"{name}.down.weight"].T + tensors[f"{name}.down.bias"])
    return inner @ tensors[f"{name}.up.weight"].T + tensors[f"{name}.up.bias"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_base_is_transformers_and_merged_is_unmerged(name, families):
    folder = families(name)
    found = made(folder)
    base = found["base"]
    expected = answer(theirs(folder, base), base.family)
    scale = float(expected.abs().max())
    assert torch.allclose(logits(base), expected, atol=2e-5 * scale)
    apart, merged = logits(found["lora 2"]), logits(found["merged"])
    assert torch.allclose(merged, apart, atol=2e-5 * scale)
    for variant in ("merged", "adapter-l 4", "adapter-h 4"):
        assert not torch.allclose(logits(found[variant]), expected, atol=2e-5 * scale), variant
    assert torch.equal(logits(found["again"]), logits(base))


@pytest.mark.parametrize("placement", ["l", "h"])
def test_adapters_are_where_the_paper_has_them(placement, gpt2_base):
    found = made(gpt2_base)
    variant, model = found[f"adapter-{placement} 4"], theirs(gpt2_base, found["base"])
    for number, layer in enumerate(model.transformer.h):
        for path in ("attn.c_proj", "mlp.c_proj") if placement == "h" else ("",):
            name = ".".join(filter(None, (f"transformer.h.{number}", path, "adapter")))
            # A layer's output is its hidden state.
            layer.get_submodule(path).register_forward_hook(lambda module, inputs, h, name=name: h + up(variant.tensors, name, h))
    assert torch.allclose(logits(variant), answer(model, variant.family), atol=1e-5)


def test_each_method_trains_what_the_plan_counts_and_shares_the_base(gpt2_base):
    found, shape = made(gpt2_base, bottlenecks=(4, 8)), read_shape(gpt2_base)
    assert list(found) == ["base", "merged", "lora 2", "adapter-l 4", "adapter-l 8", "adapter-h 4", "adapter-h 8", "again"]
    assert found["lora 2"].trained == found["merged"].trained == trained(shape, Lora(kind="lora", rank=2))
    for width in (4, 8):
        for name, placement in (("l", "lin"), ("h", "houlsby")):
            assert found[f"adapter-{name} {width}"].trained == trained(shape, Adapter(kind="adapter", placement=placement, rank=width))
    own = {name: tensor.data_ptr() for name, tensor in found["base"].model.named_parameters()}
    for name, variant in found.items():
        other = {key for key, tensor in variant.model.named_parameters() if tensor.data_ptr() != own[key]}
        adapted = {f"transformer.h.{number}.attn.c_attn.weight" for number in range(3)}
        assert other == (adapted if name == "merged" else set()), name
        assert not any(tensor.requires_grad for tensor in variant.tensors.values())


def test_all_is_held_in_the_asked_dtype(llama_base):
    found = made(llama_base, dtype=torch.bfloat16)
    for variant in found.values():
        assert {tensor.dtype for tensor in (*variant.model.parameters(), *variant.tensors.values())} == {torch.bfloat16}
    merged, apart, base = (logits(found[name]).float() for name in ("merged", "lora 2", "base"))
    assert (merged - apart).abs().mean() < 0.2 * (merged - base).abs().mean()
