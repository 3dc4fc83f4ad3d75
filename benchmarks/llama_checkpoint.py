"""Writes a random bf16 Llama checkpoint of a wanted size, tensor by tensor: making a billion parameters needs a few dozen MiB.

Out: config.json, safetensors shards and their index, as on the hub. The shape is TinyLlama's; the number of layers follows from
the wanted number of parameters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

WIDTH, FFN, HEADS, KV_HEADS, VOCABULARY = 2048, 5632, 32, 4, 32000
_SHARD_BYTES = 500_000_000
_PIECE = 1 << 22


def write_llama(folder: Path, parameters: float, seed: int = 0) -> int:
    """Writes about `parameters` parameters into `folder`; returns how many they are."""
    folder.mkdir(parents=True, exist_ok=True)
    per_layer = sum(math.prod(shape) for _, shape in _layer(0))
    layers = max(1, round((parameters - 2 * VOCABULARY * WIDTH) / per_layer))
    (folder / "config.json").write_text(json.dumps(_config(layers), indent=2), encoding="utf-8")
    tensors = [("model.embed_tokens.weight", (VOCABULARY, WIDTH))]
    for layer in range(layers):
        tensors += _layer(layer)
    tensors += [("model.norm.weight", (WIDTH,)), ("lm_head.weight", (VOCABULARY, WIDTH))]
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, shape in tensors:
        if sum(2 * math.prod(s) for _, s in shards[-1]) > _SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, shape))
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard, generator)
        weight_map |= {name: file for name, _ in shard}
    count = sum(math.prod(shape) for _, shape in tensors)
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return count


def _layer(layer: int) -> list[tuple[str, tuple[int, ...]]]:
    kv_width = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (kv_width, WIDTH),
        "self_attn.v_proj": (kv_width, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (FFN, WIDTH),
        "mlp.up_proj": (FFN, WIDTH),
        "mlp.down_proj": (WIDTH, FFN),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    return [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in shapes.items()]


def _write_shard(file: Path, shard: list[tuple[str, tuple[int, ...]]], generator: torch.Generator) -> None:
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shard:
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shard:
            for first in range(0, math.prod(shape), _PIECE):
                piece = torch.empty(min(_PIECE, math.prod(shape) - first), dtype=torch.bfloat16)
                stream.write(piece.uniform_(-0.05, 0.05, generator=generator).view(torch.uint8).numpy().data)


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }
