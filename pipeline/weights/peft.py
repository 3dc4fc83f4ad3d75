"""The delta's settings as PEFT reads them, `adapter_config.json`: LoRA, the head beside it, and trained biases.

PEFT has one rank and one alpha, and patterns for the modules that differ; a module's whole name is such a pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.weights.manifest import Head, Module


def peft_config(modules: Sequence[Module], base: str, head: Head | None, dropout: float = 0.0, biases: bool = False) -> dict[str, Any]:
    """LoraConfig as PEFT 0.10 and later read it.

    Args:
        modules: at least one.
        base: folder or hub id.
        biases: trained ones are stored too.
    """
    first = modules[0]
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        # What holds them in transformers' model is saved whole.
        "modules_to_save": list(dict.fromkeys(name.partition(".")[0] for name in head.tensors)) if head else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {module.name: module.rank for module in modules if module.rank != first.rank},
        "alpha_pattern": {module.name: module.alpha for module in modules if module.alpha != first.alpha},
        "target_modules": sorted(module.name for module in modules),
        "lora_dropout": dropout,
        "fan_in_fan_out": any(module.transposed for module in modules),
        "bias": "all" if biases else "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
