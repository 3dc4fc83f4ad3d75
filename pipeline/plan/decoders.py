"""Shapes of decoders from the keys of their config.json, in the order in which transformers' code calls their modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.plan.parts import activation, attends, layer_norm, linear, rms_norm, rotations, scaled, scores
from pipeline.plan.shapes import LabelHead, Part, Shape

_FULL, _SLIDING = "full_attention", "sliding_attention"


def gpt2(config: dict[str, Any], where: str) -> Shape:
    width, layers, heads = config["n_embd"], config["n_layer"], config["n_head"]
    vocabulary, context = config["vocab_size"], config["n_positions"]
    ffn = config.get("n_inner") or 4 * width
    out = linear("attn.c_proj", width, width, True, ("o",), 3)
    layer = (
        Part("", inside=10, stage=9),
        layer_norm("ln_1", width, 0),
        Part("attn", inside=3, stage=4),
        linear("attn.c_attn", width, 3 * width, True, ("q", "k", "v"), 1),
        attends(out, heads, heads, width // heads),
        Part("attn.resid_dropout", stage=4),
        layer_norm("ln_2", width, 5),
        Part("mlp", inside=4, stage=9),
        linear("mlp.c_fc", width, ffn, True, ("mlp_in",), 6),
        activation("mlp.act", config["activation_function"], ffn, False, where),
        linear("mlp.c_proj", ffn, width, True, ("mlp_out",), 7),
        Part("mlp.dropout", stage=8),
    )
    return Shape(
        "gpt2", layers, width, ffn, heads, heads, width // heads, vocabulary, context,
        embeddings=(Part("wte", (vocabulary * width,)), Part("wpe", (context * width,)), Part("drop")),
        layer=layer,
        end=(layer_norm("ln_f", width, 9),),
        head=Part("lm_head", (vocabulary * width,), width, vocabulary),
        tied=config["tie_word_embeddings"],
    )  # fmt: skip


def llama(config: dict[str, Any], where: str) -> Shape:
    """Llama and its kin: Mistral, Qwen, Gemma. What tells them apart are keys, which a family's entry may fix."""
    width, ffn, layers, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    kv_heads, head_width = config.get("num_key_value_heads") or heads, config.get("head_dim") or width // heads
    vocabulary, context = config["vocab_size"], config["max_position_embeddings"]
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    bias_in, gemma = bias or bool(config.get("bias_in")), bool(config.get("norms_in_fp32"))

    def norm(name: str, stage: int, width: int = width, heads: int = 1) -> Part:
        part = rms_norm(name, width, stage, heads)
        return scaled(part) if gemma else part

    q, k, v = (
        linear(f"self_attn.{name}_proj", width, count * head_width, bias_in, (name,), 1)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    projections: tuple[Part, ...] = (q, k, v)
    if config.get("norms_of_heads"):
        q_norm, k_norm = norm("self_attn.q_norm", 2, head_width, heads), norm("self_attn.k_norm", 2, head_width, kv_heads)
        # Gemma 3 projects all three first.
        projections = (q, k, v, q_norm, k_norm) if gemma else (q, q_norm, k, k_norm, v)
    window, share = _window(config, layers)
    out = linear("self_attn.o_proj", heads * head_width, width, bias, ("o",), 3)
    capped = config.get("attn_logit_softcapping")
    out = scores(out, heads, head_width) if capped else attends(out, heads, kv_heads, head_width, share)
    mlp: tuple[Part, ...] = (
        Part("mlp", inside=4, stage=9 if not config.get("sandwiched") else 8),
        linear("mlp.gate_proj", width, ffn, mlp_bias, ("mlp_gate",), 6),
        activation("mlp.act_fn", config["hidden_act"], ffn, True, where),
        linear("mlp.up_proj", width, ffn, mlp_bias, ("mlp_in",), 6),
        linear("mlp.down_proj", ffn, width, mlp_bias, ("mlp_out",), 7),
    )
    after = norm("post_attention_layernorm", 5)
    if config.get("sandwiched"):
        mlp = (norm("pre_feedforward_layernorm", 5), *mlp, norm("post_feedforward_layernorm", 8))
        after = norm("post_attention_layernorm", 4)
    attention = (Part("self_attn", inside=len(projections) + 1, stage=4), *projections, out)
    inside = (norm("input_layernorm", 0), *attention, after, *mlp)
    return Shape(
        config["model_type"], layers, width, ffn, heads, kv_heads, head_width, vocabulary, context,
        embeddings=(Part("embed_tokens", (vocabulary * width,)), Part("rotary_emb")),
        layer=(Part("", inside=len(inside), stage=9), *inside),
        end=(norm("norm", 9),),
        head=Part("lm_head", (vocabulary * width,), width, vocabulary),
        tied=config["tie_word_embeddings"],
        shared=(rotations(head_width),),
        window=window,
        softcapped=bool(config.get("final_logit_softcapping")),
    )  # fmt: skip


def _window(config: dict[str, Any], layers: int) -> tuple[int | None, float]:
    """Tokens of the sliding window, and the share of layers that have it."""
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return None, 0.0
    kinds = config.get("layer_types")
    if not kinds:
        match config["model_type"]:
            case "gemma2" | "gemma3_text":
                every = 2 if config["model_type"] == "gemma2" else config.get("sliding_window_pattern", 6)
                kinds = [_SLIDING if (place + 1) % every else _FULL for place in range(layers)]
            case "qwen2" | "qwen3":
                kinds = [_SLIDING if place >= config.get("max_window_layers", 28) else _FULL for place in range(layers)]
            case _:
                kinds = [_SLIDING]
    return window, kinds.count(_SLIDING) / len(kinds)


def gpt_neox(config: dict[str, Any], where: str) -> Shape:
    width, ffn, layers, heads = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    vocabulary, bias, parallel = config["vocab_size"], config["attention_bias"], config["use_parallel_residual"]
    attention_lane, mlp_lane = (1, 2) if parallel else (0, 0)
    out = linear("attention.dense", width, width, bias, ("o",), 3, attention_lane)
    layer = (
        Part("", inside=10, stage=9),
        layer_norm("input_layernorm", width, 0),
        Part("attention", inside=2, stage=4, lane=attention_lane),
        linear("attention.query_key_value", width, 3 * width, bias, ("q", "k", "v"), 1, attention_lane),
        attends(out, heads, heads, width // heads),
        Part("post_attention_dropout", stage=4, lane=attention_lane),
        layer_norm("post_attention_layernorm", width, 0 if parallel else 5, shares=parallel),
        Part("mlp", inside=3, stage=9, lane=mlp_lane),
        linear("mlp.dense_h_to_4h", width, ffn, True, ("mlp_in",), 6, mlp_lane),
        activation("mlp.act", config["hidden_act"], ffn, False, where, mlp_lane),
        linear("mlp.dense_4h_to_h", ffn, width, True, ("mlp_out",), 7, mlp_lane),
        Part("post_mlp_dropout", stage=8, lane=mlp_lane),
    )
    layer = (replace(layer[0], inside=len(layer) - 1), *layer[1:])
    return Shape(
        "gpt_neox", layers, width, ffn, heads, heads, width // heads, vocabulary, config["max_position_embeddings"],
        embeddings=(Part("embed_in", (vocabulary * width,)), Part("emb_dropout"), Part("rotary_emb")),
        layer=layer,
        end=(layer_norm("final_layer_norm", width, 9),),
        head=Part("lm_head", (vocabulary * width,), width, vocabulary),
        tied=config["tie_word_embeddings"],
        shared=(rotations(int(width // heads * _rotated(config))),),
    )  # fmt: skip


def _rotated(config: dict[str, Any]) -> float:
    """Share of a head."""
    rope = config.get("rope_parameters") or {}
    return float(rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25)))


def opt(config: dict[str, Any], where: str) -> Shape:
    width, ffn, layers, heads = (config[key] for key in ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads"))
    vocabulary, context, bias = config["vocab_size"], config["max_position_embeddings"], config["enable_bias"]
    outside, affine = config.get("word_embed_proj_dim") or width, config["layer_norm_elementwise_affine"]
    before = config["do_layer_norm_before"]
    out = linear("self_attn.out_proj", width, width, bias, ("o",), 3)
    first = layer_norm("self_attn_layer_norm", width, 0 if before else 4, affine)
    attention = (
        Part("self_attn", inside=4, stage=4),
        *(linear(f"self_attn.{name}_proj", width, width, bias, (name,), 1) for name in ("q", "k", "v")),
        attends(out, heads, heads, width // heads),
    )
    second = layer_norm("final_layer_norm", width, 5 if before else 8, affine)
    mlp: tuple[Part, ...] = (
        linear("fc1", width, ffn, bias, ("mlp_in",), 6),
        activation("activation_fn", config["activation_function"], ffn, False, where),
        replace(linear("fc2", ffn, width, bias, ("mlp_out",), 7), input_kept=config["activation_function"] == "relu"),
    )
    inside = (first, *attention, second, *mlp) if before else (*attention, first, *mlp, second)
    # Two positions more, as the released weights have.
    embeddings = [Part("decoder"), Part("embed_tokens", (vocabulary * outside,)), Part("embed_positions", ((context + 2) * width,))]
    end = [layer_norm("final_layer_norm", width, 9, affine)] if before and not config["_remove_final_layer_norm"] else []
    if outside != width:
        embeddings.insert(2, linear("project_in", outside, width, False, (), 0))
        end.append(linear("project_out", width, outside, False, (), 9))
    return Shape(
        "opt", layers, width, ffn, heads, heads, width // heads, vocabulary, context,
        embeddings=tuple(embeddings),
        layer=(Part("", inside=len(inside), stage=9), *inside),
        end=tuple(end),
        head=Part("lm_head", (vocabulary * outside,), outside, vocabulary),
        tied=config["tie_word_embeddings"],
        label_head=LabelHead(width=outside),
    )  # fmt: skip
