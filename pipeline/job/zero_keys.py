"""Keys of DeepSpeed's configuration that have no place in a memory configuration, each with what to do instead.

A key at the top that DeepSpeed does not know it ignores without a word; one of `zero_optimization` it refuses when a run starts, after
the queue. So both are told apart from those that belong to the job, before.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

ALLOWED = ("comms_logger", "communication_data_type", "zero_optimization")
_OF_THE_JOB = {
    "activation_checkpointing": "memory.gradient_checkpointing",
    "amp": "base.dtype",
    "bf16": "base.dtype",
    "bfloat16": "base.dtype",
    "data_types": "base.dtype",
    "fp16": "base.dtype",
    "gradient_accumulation_steps": "train.batch_examples and train.micro_batch_tokens",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.learning_rate, train.adam_betas, train.adam_eps and train.weight_decay",
    "scheduler": "train.schedule, train.warmup_steps and train.learning_rate",
    "seed": "train.seed",
    "torch_autocast": "base.dtype",
    "train_batch_size": "train.batch_examples",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
}
"""Key at the top -> the job's keys that say it."""
_SET_HERE = {
    "compression_training", "csv_monitor", "curriculum_learning", "data_efficiency", "dump_state", "elasticity", "flops_profiler",
    "gradient_predivide_factor", "memory_breakdown", "pipeline", "prescale_gradients", "sparse_gradients", "steps_per_print",
    "tensorboard", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
"""Keys at the top that DeepSpeed knows, and that change nothing here or are set by the run."""
ZERO_KEYS = {
    "allgather_bucket_size", "allgather_partitions", "allgather_sequential", "compute_grad_norm", "contiguous_gradients", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory", "elastic_checkpoint", "enable_sanity_checks", "gather_16bit_weights_on_model_save",
    "ignore_unused_parameters", "leaf_module", "legacy_stage1", "load_from_fp32_weights", "log_trace_cache_warnings",
    "max_live_parameters", "max_reuse_distance", "memory_efficient_linear", "model_persistence_threshold",
    "module_granularity_threshold", "offload_optimizer", "offload_param", "overlap_comm", "override_module_apply",
    "param_persistence_threshold", "parameter_alignment", "pipeline_loading_checkpoint", "prefetch_bucket_size", "reduce_bucket_size",
    "reduce_scatter", "round_robin_gradients", "save_muon_momentum_buffer_in_memory", "stage", "stage3_allgather_sequential",
    "stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size", "stage3_use_all_reduce_for_fetch_params", "sub_group_size",
    "use_all_reduce_for_fetch_params", "use_multi_rank_bucket_allreduce", "zenflow", "zero_hpz_partition_size",
    "zero_quantized_gradients", "zero_quantized_nontrainable_weights", "zero_quantized_weights",
}  # fmt: skip
"""Those of `zero_optimization` in deepspeed 0.19.8, by both of their names."""


def strangers(asked: Mapping[str, Any]) -> dict[str, str]:
    """Key, or `zero_optimization.key`, -> what it does there and what to do instead."""
    found = {key: _at_the_top(key) for key in sorted(asked) if key not in ALLOWED}
    section = asked.get("zero_optimization")
    for key in sorted(section) if isinstance(section, dict) else []:
        if key not in ZERO_KEYS:
            near = difflib.get_close_matches(key, ZERO_KEYS, 1)
            instead = f"Did you mean {near[0]}?" if near else "Leave it out."
            found[f"zero_optimization.{key}"] = f"DeepSpeed does not know it and would refuse it when a run starts. {instead}"
    return found


def without_strangers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The same with what has a place only."""
    kept = {key: value for key, value in asked.items() if key in ALLOWED}
    section = kept.get("zero_optimization")
    if isinstance(section, dict):
        kept["zero_optimization"] = {key: value for key, value in section.items() if key in ZERO_KEYS}
    return kept


def _at_the_top(key: str) -> str:
    if key in _OF_THE_JOB:
        return f"belongs to the job. Set {_OF_THE_JOB[key]} there."
    if key in _SET_HERE:
        return "does not belong here: it changes no memory, or the run sets it. Leave it out."
    near = difflib.get_close_matches(key, ALLOWED, 1)
    return f"DeepSpeed does not know it and would ignore it. {f'Did you mean {near[0]}?' if near else 'Leave it out.'}"
