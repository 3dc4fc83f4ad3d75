"""The shape of a base whose architecture the plan does not know, as far as the usual keys of its config.json say it.

In: a config.json's keys and the folder it is in. Out: a `Shape` of Llama's form, with `notes` that say what is a guess. A mixture's
experts are counted; where the folder has an index of its weights, the number of parameters is that of the index.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.plan.decoders import llama
from pipeline.plan.parts import FACTORS, linear
from pipeline.plan.shapes import Kept, Part, Shape

_NAMES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "intermediate_size": ("ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "n_ctx", "max_seq_len", "seq_length"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "vocab_size": ("padded_vocab_size",),
}
"""A key -> what else it is called."""
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PARTICULAR: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"bias_in": True},
    "qwen3_moe": {"norms_of_heads": True},
    "qwen3_next": {"norms_of_heads": True},
    "mixtral": {"num_key_value_heads": 8},
}
"""Of mixtures whose other parts are a known family's."""


def guessed(config: dict[str, Any], folder: Path) -> Shape:
    """Raises:
    JobError: not even width, layers and vocabulary are there."""
    where, family = str(folder / "config.json"), str(config.get("model_type"))
    notes = []
    if isinstance(config.get("text_config"), dict) and "hidden_size" not in config:
        config = {**config, **config["text_config"], "model_type": family}
        notes.append("only its text part is counted")
    keys = dict(config)
    for key, others in _NAMES.items():
        found = next((config[name] for name in (key, *others) if config.get(name) is not None), None)
        if found is not None:
            keys[key] = found
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not isinstance(keys.get(key), int):
            raise JobError(f'{where}: architecture "{family}" is not known to the plan, and the file has no {key} to guess from.')
    keys = {
        "num_attention_heads": max(1, keys["hidden_size"] // 64),
        "max_position_embeddings": 2048,
        **_PARTICULAR.get(family, {}),
        **keys,
    }
    keys.setdefault("tie_word_embeddings", False)
    if keys.get("hidden_act") not in FACTORS:
        keys["hidden_act"] = "silu"
    experts = next((config[key] for key in _EXPERTS if isinstance(config.get(key), int) and config[key] > 1), 0)
    if "intermediate_size" not in keys:
        keys["intermediate_size"] = 4 * keys["hidden_size"]
        notes += [] if experts else ["the FFN is taken to be four times as wide as the hidden states"]
    shape = llama(keys, where)
    if keys["hidden_act"] != "silu" and not experts:
        shape = _ungated(shape)
    if config.get("is_encoder_decoder"):
        notes.append("it is an encoder with a decoder, which zlora refuses to train; only one of them is counted")
    notes.insert(0, f'"{family}" is not known to the plan: its layers are taken to be like Llama\'s; activations and times are a guess')
    if experts:
        shape = _mixture(shape, keys, experts)
        notes[0] = (
            f'"{family}" is a mixture of {experts} experts, which zlora refuses to train; attention and experts are counted from the '
            "usual keys, activations and gathers are a guess"
        )
    counted = _counted(config, folder, notes)
    return replace(shape, packs=False, guessed=True, counted=counted, notes=tuple(notes))


def _ungated(shape: Shape) -> Shape:
    """With two maps in the FFN, as most have that do not use SiLU."""
    layer = [part for part in shape.layer if part.name != "mlp.gate_proj"]
    mlp = next(number for number, part in enumerate(layer) if part.name == "mlp")
    for number in (0, mlp):
        layer[number] = replace(layer[number], inside=layer[number].inside - 1)
    return replace(shape, layer=tuple(layer))


def _mixture(shape: Shape, keys: dict[str, Any], experts: int) -> Shape:
    """With each layer's FFN replaced by the experts, which transformers holds in two tensors, their router and what all tokens pass."""
    width, ffn = shape.width, keys.get("moe_intermediate_size") or shape.ffn
    used = keys.get("num_experts_per_tok") or keys.get("moe_top_k") or 2
    shared = keys.get("shared_expert_intermediate_size") or (keys.get("n_shared_experts") or 0) * ffn
    active = used * ffn
    mlp = [
        Part("mlp.gate", (experts * width,), stage=6),
        Part(
            "mlp.experts", (experts * 2 * ffn * width, experts * ffn * width), 3 * width, active, stage=7,
            keeps=(Kept("activation function of the experts in use", "3 N F e each", 3 * active),),
            forward=(Kept("", "", 2 * active),), backward=(Kept("", "", 3 * active),),
        ),
    ]  # fmt: skip
    if shared:
        mlp += [
            linear("mlp.shared_expert.gate_proj", width, shared, False, (), 6),
            linear("mlp.shared_expert.up_proj", width, shared, False, (), 6),
            linear("mlp.shared_expert.down_proj", shared, width, False, (), 7),
        ]
        if "shared_expert_intermediate_size" in keys:
            mlp.append(Part("mlp.shared_expert_gate", (width,), stage=6))
    place = next(number for number, part in enumerate(shape.layer) if part.name == "mlp")
    kept = (*shape.layer[1:place], replace(shape.layer[place], inside=len(mlp)), *mlp)
    return replace(shape, layer=(replace(shape.layer[0], inside=len(kept)), *kept), ffn=max(active, shared))


def _counted(config: dict[str, Any], folder: Path, notes: list[str]) -> int | None:
    """Parameters by the index of the weights, where there is one."""
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))["metadata"]
        if "total_parameters" in about:
            count = int(about["total_parameters"])
        else:
            dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
            count = int(about["total_size"]) // _BYTES.get(dtype, 2)
            notes.append(f"total_size is taken to be in {dtype}")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    notes.append(f"parameters are counted by {file.name}")
    return count
