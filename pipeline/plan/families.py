"""A base's config.json -> its shape. One entry of `_FAMILIES` adds a family, as one of pipeline/model/families.py does.

An entry names what makes the shape, and the values of keys that a config.json may leave out: transformers' own, and what is
particular about the family.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.job.errors import JobError
from pipeline.plan.decoders import gpt2, gpt_neox, llama, opt
from pipeline.plan.encoders import bert, deberta
from pipeline.plan.shapes import Shape
from pipeline.plan.unknown import guessed

_GEMMA = {"norms_in_fp32": True, "head_dim": 256, "tie_word_embeddings": True, "vocab_size": 256000}
_GEMMA_2 = {
    **_GEMMA, "sandwiched": True, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "sliding_window": 4096,
}  # fmt: skip
_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 2048, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_QWEN = {**_LLAMA, "intermediate_size": 22016, "vocab_size": 151936, "max_position_embeddings": 32768, "use_sliding_window": False}
_BERT = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 30522,
    "max_position_embeddings": 512, "type_vocab_size": 2, "hidden_act": "gelu", "pad_token_id": 0,
}  # fmt: skip
_FAMILIES: dict[str, tuple[Callable[[dict[str, Any], str], Shape], dict[str, Any]]] = {
    "bert": (bert, _BERT),
    "deberta-v2": (
        deberta,
        {
            **_BERT, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 24,
            "vocab_size": 128100, "type_vocab_size": 0, "position_biased_input": True,
        },
    ),
    "gemma": (
        llama,
        {
            **_GEMMA, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        },
    ),
    "gemma2": (llama, {**_GEMMA_2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "gemma3_text": (llama, {**_GEMMA_2, "norms_of_heads": True, "vocab_size": 262208, "max_position_embeddings": 131072}),
    "gpt2": (
        gpt2,
        {
            "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024, "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        gpt_neox,
        {
            "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
            "max_position_embeddings": 2048, "hidden_act": "gelu", "attention_bias": True, "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
    ),
    "llama": (llama, _LLAMA),
    "mistral": (
        llama,
        {**_LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    ),
    "opt": (
        opt,
        {
            "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50272,
            "max_position_embeddings": 2048, "activation_function": "relu", "enable_bias": True, "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False, "tie_word_embeddings": True,
        },
    ),
    # Biases on q, k and v, always.
    "qwen2": (llama, {**_QWEN, "bias_in": True, "num_key_value_heads": 32, "sliding_window": 4096}),
    "qwen3": (llama, {**_QWEN, "norms_of_heads": True, "num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096}),
    "roberta": (bert, {**_BERT, "vocab_size": 50265, "pad_token_id": 1}),
}  # fmt: skip
_ALIASES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "hidden_activation": "hidden_act"}
"""A key of config.json -> what the family's own is called, where it has that one."""


def read_shape(folder: Path) -> Shape:
    """The shape that a folder's config.json describes; of an architecture that is not in the table, a guess that says so.

    Raises:
        JobError: no such file, not readable, or without the keys that make a shape.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{file}: cannot be read ({error}). Fetch the base again, or name a folder with a config.json.") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(config, dict):
        raise JobError(f"{file}: is no object of keys. Fetch the base again.")
    if family not in _FAMILIES:
        return guessed(config, folder)
    make, defaults = _FAMILIES[family]
    merged = {**defaults, **config}
    for name, own in _ALIASES.items():
        if name in merged and (own in defaults or name == "hidden_activation"):
            merged[own] = config.get(own, merged[name])
    try:
        return make(merged, str(file))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise JobError(f"{file}: has no usable {error}. Fetch the base again.") from None
