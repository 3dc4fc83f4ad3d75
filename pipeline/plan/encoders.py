"""Shapes of encoders from the keys of their config.json, in the order in which transformers' code calls their modules.

Norms stand behind attention and FFN. Their heads for labels are the task's, whole on every rank (pipeline/methods/head.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pipeline.plan.parts import activation, attends, disentangled, layer_norm, linear
from pipeline.plan.shapes import Kept, LabelHead, Part, Shape


def bert(config: dict[str, Any], where: str) -> Shape:
    """BERT and RoBERTa."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    out = attends(linear("attention.output.dense", width, width, True, ("o",), 3), heads, heads, width // heads)
    layer = _layer(config, where, tuple(f"attention.self.{name}" for name in ("query", "key", "value")), out)
    pooled = config["model_type"] == "bert"
    embeddings = _embeddings(config, width, config["max_position_embeddings"])
    pooler = (Part("pooler"), linear("pooler.dense", width, width, True, (), 9)) if pooled else ()
    # Position 0 lies behind the padding token's in RoBERTa.
    context = config["max_position_embeddings"] - (0 if pooled else config["pad_token_id"] + 1)
    return _shape(config, context, embeddings, layer, pooler, LabelHead(dense=not pooled, bias=True))


def deberta(config: dict[str, Any], where: str) -> Shape:
    """DeBERTa v2 and v3: attention by content and by relative position, of every pair of tokens, on padded examples."""
    width, heads, context = config["hidden_size"], config["num_attention_heads"], config["max_position_embeddings"]
    kinds = config.get("pos_att_type") or []
    kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
    relative, shared = config.get("relative_attention"), config.get("share_att_key")
    span = 0
    if relative:
        most = config.get("max_relative_positions", -1)
        buckets = config.get("position_buckets", -1)
        span = buckets if buckets > 0 else most if most > 0 else context
    out = linear("attention.output.dense", width, width, True, ("o",), 3)
    out = disentangled(out, width, heads, span, len({"c2p", "p2c"} & set(kinds)) if relative else 0, bool(shared))
    names = [f"attention.self.{name}_proj" for name in ("query", "key", "value")]
    layer = list(_layer(config, where, tuple(names), out))
    if relative and not shared:
        place = next(number for number, part in enumerate(layer) if part.name == names[2]) + 1
        for kind, name in (("p2c", "pos_query_proj"), ("c2p", "pos_key_proj")):
            if kind in kinds:
                # It reads positions, which nothing trained has changed.
                layer.insert(place, replace(linear(f"attention.self.{name}", width, width, True, (), 1), outputs=0))
        added = len(layer) - len(_layer(config, where, tuple(names), out))
        grown = {"", "attention", "attention.self"}
        layer = [replace(part, inside=part.inside + added) if part.name in grown else part for part in layer]
    narrow = config.get("embedding_size") or width
    embeddings = list(_embeddings(config, narrow, context if config["position_biased_input"] else 0))
    embeddings = [replace(part, sizes=(width, width)) if part.name.endswith("LayerNorm") else part for part in embeddings]
    if narrow != width:
        embeddings.insert(-2, linear("embeddings.embed_proj", narrow, width, False, (), 0))
    # Handed to every layer: checkpointing keeps them.
    handed = (Kept("the mask", "8 S", bytes=8, of="pair"), Kept("relative positions", "8 L^2", bytes=8, of="square"))
    embeddings.append(Part("encoder", keeps=handed))
    if relative:
        embeddings.append(Part("encoder.rel_embeddings", (2 * span * width,)))
    if "layer_norm" in str(config.get("norm_rel_ebd", "none")).lower():
        embeddings.append(Part("encoder.LayerNorm", (width, width)))
    shared = ()
    if kernel := config.get("conv_kernel_size", 0):
        # Behind the first layer only.
        convolution, tanh = (width * (width // config.get("conv_groups", 1)) * kernel, width), Kept("its tanh", "N D e", width)
        embeddings += [Part("encoder.conv.conv", convolution, keeps=(tanh,)), Part("encoder.conv.LayerNorm", (width, width))]
        shared = (Kept("the convolution's norm", "N D e + 8 N", width, 2),)
    shape = _shape(config, context, tuple(embeddings), tuple(layer), (), LabelHead(dense=True, bias=True))
    return replace(shape, packs=False, shared=shared)


def _embeddings(config: dict[str, Any], width: int, positions: int) -> tuple[Part, ...]:
    tables = [("word", config["vocab_size"]), ("token_type", config["type_vocab_size"]), ("position", positions)]
    parts = [Part(f"embeddings.{name}_embeddings", (count * width,)) for name, count in tables if count]
    return (Part("embeddings"), *parts, layer_norm("embeddings.LayerNorm", width, 0), Part("embeddings.dropout"))


def _layer(config: dict[str, Any], where: str, projections: tuple[str, ...], out: Part) -> tuple[Part, ...]:
    width, ffn = config["hidden_size"], config["intermediate_size"]
    return (
        Part("", inside=15, stage=9),
        Part("attention", inside=8, stage=5),
        Part("attention.self", inside=3, stage=2),
        *(linear(name, width, width, True, (role,), 1) for name, role in zip(projections, ("q", "k", "v"), strict=True)),
        Part("attention.output", inside=3, stage=4),
        out,
        Part("attention.output.dropout", stage=4),
        layer_norm("attention.output.LayerNorm", width, 4),
        Part("intermediate", inside=2, stage=7),
        linear("intermediate.dense", width, ffn, True, ("mlp_in",), 6),
        activation("intermediate.intermediate_act_fn", config["hidden_act"], ffn, False, where),
        Part("output", inside=3, stage=9),
        linear("output.dense", ffn, width, True, ("mlp_out",), 7),
        Part("output.dropout", stage=8),
        layer_norm("output.LayerNorm", width, 8),
    )


def _shape(
    config: dict[str, Any], context: int, embeddings: tuple[Part, ...], layer: tuple[Part, ...], end: tuple[Part, ...], head: LabelHead
) -> Shape:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    layer = (replace(layer[0], inside=len(layer) - 1), *layer[1:])
    return Shape(
        config["model_type"], config["num_hidden_layers"], width, config["intermediate_size"], heads, heads, width // heads,
        config["vocab_size"], context, embeddings, layer, end, head=None, label_head=head,
    )  # fmt: skip
