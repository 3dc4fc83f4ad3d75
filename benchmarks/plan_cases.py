"""The jobs of `plan_accuracy.py`: small random bases of every family, and what is trained on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
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
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)
from transformers.utils import logging

ENCODERS = ("bert", "roberta", "deberta-v2")
OUTPUTS = 3
"""Of an encoder's head."""
EVEN, UNEVEN, LONG = [256] * 4, [300, 200, 37], [500, 500]
_ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
_OUTER = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "max_position_embeddings": 600, **_ENDS}
_PLAIN = {**_OUTER, "intermediate_size": 720}
_GROUPED = {**_PLAIN, "num_key_value_heads": 4, "head_dim": 32}
_OTHER = {"vocab_size": 3001, "hidden_size": 288, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 600, **_ENDS}
_DEBERTA = {"relative_attention": True, "position_buckets": 32, "norm_rel_ebd": "layer_norm", "pos_att_type": ["p2c", "c2p"]}
BASES: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(vocab_size=1000, n_positions=512, n_embd=256, n_layer=4, n_head=4, **_ENDS),
    "gpt2-wide": GPT2Config(vocab_size=5003, n_positions=600, n_embd=320, n_layer=3, n_head=5, n_inner=800, **_ENDS),
    "llama": LlamaConfig(
        vocab_size=1000, max_position_embeddings=512, hidden_size=256, intermediate_size=680, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, **_ENDS,
    ),
    "llama-tied": LlamaConfig(
        vocab_size=4001, max_position_embeddings=600, hidden_size=320, intermediate_size=864, num_hidden_layers=3,
        num_attention_heads=5, num_key_value_heads=5, tie_word_embeddings=True, attention_bias=True, **_ENDS,
    ),
    "mistral": MistralConfig(**_GROUPED, sliding_window=100),
    "qwen2": Qwen2Config(**_GROUPED),
    "qwen3": Qwen3Config(**_GROUPED),
    "gemma": GemmaConfig(**_GROUPED),
    "gemma2": Gemma2Config(**_GROUPED, sliding_window=100),
    "gemma3": Gemma3TextConfig(**_GROUPED, sliding_window=100),
    "opt": OPTConfig(**_OUTER, ffn_dim=1024),
    "opt-350m": OPTConfig(**_OUTER, ffn_dim=1024, word_embed_proj_dim=128, do_layer_norm_before=False),
    "gpt_neox": GPTNeoXConfig(**_PLAIN),
    "bert": BertConfig(**_PLAIN),
    "roberta": RobertaConfig(**_PLAIN),
    "deberta": DebertaV2Config(**_PLAIN, **_DEBERTA, share_att_key=True, position_biased_input=False, conv_kernel_size=3),
    "qwen3-tied": Qwen3Config(**_OTHER, intermediate_size=700, num_key_value_heads=3, head_dim=40, tie_word_embeddings=True),
    "gemma2-wide": Gemma2Config(**_OTHER, intermediate_size=1000, num_key_value_heads=2, head_dim=64, sliding_window=150),
    "neox-serial": GPTNeoXConfig(**_OTHER, intermediate_size=1100, use_parallel_residual=False, rotary_pct=0.5),
    "deberta-plain": DebertaV2Config(**_OTHER, **_DEBERTA, intermediate_size=900, share_att_key=False, type_vocab_size=2),
    "roberta-narrow": RobertaConfig(**_OTHER, intermediate_size=500),
    "mistral-full": MistralConfig(**_OTHER, intermediate_size=800, num_key_value_heads=2, sliding_window=None),
}  # fmt: skip
HELD_OUT_BASES: dict[str, PretrainedConfig] = {
    "gemma3-wide": Gemma3TextConfig(**_OTHER, intermediate_size=640, num_key_value_heads=1, head_dim=48),
    "opt-unbiased": OPTConfig(**_OTHER, ffn_dim=700, enable_bias=False),
    "bert-wide": BertConfig(**_OTHER, intermediate_size=1000),
    "qwen2-tied": Qwen2Config(**_OTHER, intermediate_size=900, num_key_value_heads=6, tie_word_embeddings=True),
}
"""Of the cases that are held out."""
LEAN = {"stage": 3, "stage3_prefetch_bucket_size": 300_000, "stage3_max_live_parameters": 1_500_000, "stage3_max_reuse_distance": 700_000}
JOB = """
[base]
model = "{base}"
[[methods]]
kind = "lora"
[task]
kind = "jsonl"
data = "{data}"
[train]
batch_examples = 4
"""
FP32, BF16, RECOMPUTE = "base.dtype=fp32", "base.dtype=bf16", "memory.gradient_checkpointing=true"
FULL, INT8 = "methods.0.kind=full", "memory.int8_gathers=true"


def cases(folder: Path) -> list[dict[str, Any]]:
    """Writes bases and jobs to the folder. The last cases are held out: see `_held_out`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    data = folder / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "lean.json").write_text(json.dumps({"zero_optimization": LEAN}))
    for name, config in (BASES | HELD_OUT_BASES).items():
        model = AutoModel if config.model_type in ENCODERS else AutoModelForCausalLM
        model.from_config(config).save_pretrained(folder / name)
        (folder / f"{name}.toml").write_text(JOB.format(base=folder / name, data=data))
    return [*_grid(folder), *({**case, "name": f"{case['name']} (held out)"} for case in _held_out(folder))]


def _case(folder: Path, base: str, tokens: list[int], ranks: int, *changes: str, labels: int = 200, batches: int = 1) -> dict[str, Any]:
    """Args:
    labels: tokens with a label.
    """
    title = [base, f"{len(tokens)} x {max(tokens)}", f"{ranks} rank{'s' if ranks > 1 else ''}", *(_short(change) for change in changes)]
    return {
        "name": ", ".join(title),
        "method": next((change.partition("=")[2] for change in changes if change.startswith("methods.0.kind=")), "lora"),
        "job": str(folder / f"{base}.toml"),
        "set": [change.replace("lean.json", str(folder / "lean.json")) for change in changes],
        "tokens": tokens,
        "label_tokens": labels,
        "micro_batches": batches,
        "ranks": ranks,
        "outputs": OUTPUTS if (BASES | HELD_OUT_BASES)[base].model_type in ENCODERS else 0,
    }


def _short(change: str) -> str:
    key, value = change.split("=", 1)
    return {"dtype": value, "config": value, "kind": value, "placement": value, "gradient_checkpointing": "recomputed"}.get(
        key.split(".")[-1], change.split(".")[-1]
    )


def _grid(folder: Path) -> list[dict[str, Any]]:
    lean, whole = "memory.config=lean.json", "memory.config=zero0.json"

    def case(base: str, tokens: list[int], ranks: int, *changes: str, labels: int = 200, batches: int = 1) -> dict[str, Any]:
        return _case(folder, base, tokens, ranks, *changes, labels=labels, batches=batches)

    grid = [
        case(base, tokens, 2, dtype, *more)
        for base in ("gpt2", "llama")
        for dtype, tokens, more in ((FP32, EVEN, ()), (BF16, UNEVEN, (RECOMPUTE,)), (BF16, EVEN, (lean,)))
    ]
    grid += [case("llama", EVEN, 2, FP32, INT8), case("gpt2", UNEVEN, 2, BF16, lean, INT8)]
    grid += [case("gpt2", EVEN, 1, FP32), case("llama", UNEVEN, 1, BF16, whole), case("gpt2", UNEVEN, 2, FP32, whole, RECOMPUTE)]
    grid += [
        case("llama", EVEN, 2, BF16, _targets("q", "v", "o", "mlp_out"), "methods.0.rank=16"),
        case("gpt2-wide", LONG, 2, BF16, _targets("q", "k", "v", "o", "mlp_in"), "methods.0.rank=4", labels=700, batches=2),
        case("gpt2-wide", UNEVEN, 2, FP32, RECOMPUTE, lean, "methods.0.dropout=0.1", labels=100),
        case("llama-tied", LONG, 1, BF16, RECOMPUTE, _targets("q", "v", "mlp_out"), labels=998),
        case("mistral", UNEVEN, 2, FP32),
        case("qwen2", UNEVEN, 1, BF16, RECOMPUTE),
        case("qwen3", UNEVEN, 2, FP32, lean),
        case("gemma", EVEN, 1, FP32, RECOMPUTE),
        case("gemma2", EVEN, 2, FP32, _targets("q", "o", "mlp_out")),
        case("gemma2", UNEVEN, 2, BF16, RECOMPUTE),
        case("gemma3", EVEN, 2, BF16),
        case("opt", UNEVEN, 2, FP32, _targets("q", "v", "mlp_out")),
        case("opt-350m", EVEN, 2, BF16, RECOMPUTE),
        case("gpt_neox", EVEN, 2, BF16, lean),
        case("gpt_neox", LONG, 2, FP32, RECOMPUTE, _targets("q", "mlp_in")),
        case("bert", UNEVEN, 2, FP32),
        case("roberta", EVEN, 2, BF16, _targets("q", "v", "mlp_out")),
        case("roberta", LONG, 2, FP32, RECOMPUTE, lean),
        case("deberta", EVEN, 2, FP32),
        case("deberta", UNEVEN, 2, BF16, RECOMPUTE),
        case("gpt2", EVEN, 2, FP32, FULL),
        case("gpt2-wide", UNEVEN, 2, BF16, FULL, RECOMPUTE, batches=2),
        case("llama", EVEN, 1, BF16, FULL),
        case("llama-tied", UNEVEN, 2, FP32, FULL, whole),
        case("gemma2", EVEN, 2, BF16, FULL, lean),
        case("roberta", EVEN, 2, FP32, FULL),
        case("opt-350m", EVEN, 2, BF16, FULL, RECOMPUTE),
        case("gpt_neox", UNEVEN, 2, FP32, "methods.0.kind=full_top"),
        case("llama", EVEN, 2, BF16, "methods.0.kind=full_top", RECOMPUTE),
        case("roberta", UNEVEN, 2, BF16, "methods.0.kind=bitfit"),
        case("gpt2", EVEN, 2, FP32, "methods.0.kind=bitfit", RECOMPUTE),
        case("gpt2", UNEVEN, 2, FP32, "methods.0.kind=prefix_embed"),
        case("llama", EVEN, 2, BF16, "methods.0.kind=prefix_layer", RECOMPUTE),
        case("gpt2", EVEN, 2, BF16, *_adapter("houlsby"), "methods.0.train_layernorm=true"),
        case("qwen2", EVEN, 2, FP32, *_adapter("lin"), "methods.0.rank=64", "methods.0.nonlinearity=gelu"),
        case("bert", UNEVEN, 2, FP32, *_adapter("pfeiffer")),
        case("opt-350m", EVEN, 2, BF16, *_adapter("pfeiffer"), RECOMPUTE),
        case("roberta", EVEN, 2, FP32, *_adapter("drop"), "methods.0.first_layer=2"),
    ]
    # These were held out too, until two of them showed what was said wrongly.
    grid += [
        case("qwen3-tied", [400, 350, 90, 60], 2, BF16, _targets("k", "mlp_gate"), "methods.0.rank=5", labels=300),
        case("gemma2-wide", [220] * 3, 2, FP32, RECOMPUTE, _targets("v", "mlp_out")),
        case("neox-serial", LONG, 2, BF16, "methods.0.dropout=0.1", labels=600, batches=2),
        case("deberta-plain", [180, 150, 150], 2, FP32, _targets("q", "v", "o")),
        case("roberta-narrow", [128] * 8, 2, BF16, "memory.config=zero0.json", _targets("k", "mlp_in"), "methods.0.rank=64"),
        case("mistral-full", [512], 1, FP32, RECOMPUTE, _targets("q", "k", "v", "o", "mlp_in"), labels=511),
    ]
    return grid


def _held_out(folder: Path) -> list[dict[str, Any]]:
    """Shapes and settings that nobody had looked at when the formulas were made; run once they were done."""
    return [
        _case(folder, "gemma3-wide", [330, 330], 2, BF16, RECOMPUTE, _targets("q", "mlp_out")),
        _case(folder, "opt-unbiased", [500, 120], 2, FP32, _targets("k", "v"), "methods.0.dropout=0.05", labels=350),
        _case(folder, "bert-wide", [90] * 7, 2, BF16, RECOMPUTE, _targets("o", "mlp_out")),
        _case(folder, "qwen2-tied", [210, 200, 190], 1, FP32, "methods.0.rank=24", labels=500),
    ]


def _adapter(placement: str) -> tuple[str, str]:
    return "methods.0.kind=adapter", f"methods.0.placement={placement}"


def _targets(*roles: str) -> str:
    return f"methods.0.targets={list(roles)}"
