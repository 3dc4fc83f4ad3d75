"""An architecture that the table of families does not have: what can be found out about it from its modules.

Its linear maps are adapted by path. Examples are padded, with transformers' own attention, and logits come from transformers' own forward
pass, since it is not known what this model does to them.
"""

from __future__ import annotations

import inspect

from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.job.errors import JobError
from pipeline.model.families import FAMILIES, Family, known_family

_NEEDED = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"}


def family_of(config: PretrainedConfig) -> Family:
    """The table's entry for a base, or one made from its modules.

    Raises:
        JobError: not a decoder of text that works as most do.
    """
    return known_family(config) or _found(config, _empty(config))


def refuse_roles(config: PretrainedConfig, targets: tuple[str, ...]) -> None:
    """Raises:
    JobError: the architecture is not in the table, and a target is not the path of a linear map in its layers, which are listed."""
    if known_family(config):
        return
    model = _empty(config)
    first = f"{_found(config, model).layers}.0."
    paths = [name.removeprefix(first) for name, module in model.named_modules() if name.startswith(first) and _is_linear(module)]
    for target in targets:
        if not any(path == target or path.endswith(f".{target}") for path in paths):
            raise JobError(
                f'methods[0].targets: "{target}" is not a linear map of "{config.model_type}", whose roles (q, v, ...) are not known. '
                f"Name those of a layer by path: {', '.join(paths)}; as in targets = {_quoted(paths[:2])}.",
                everywhere=True,
            )


def _empty(config: PretrainedConfig) -> PreTrainedModel:
    try:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever a config sets off that is none of a decoder's
        raise _unusable(config, "is no decoder of text that transformers knows") from None


def _found(config: PretrainedConfig, model: PreTrainedModel) -> Family:
    keys = config.to_dict()
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == keys.get("num_hidden_layers", config.num_hidden_layers)
    ]
    body = model.base_model_prefix
    missing = _NEEDED - set(inspect.signature(model.forward).parameters)
    if keys.get("is_encoder_decoder") or "text_config" in keys or missing or len(layers) != 1 or not hasattr(model, body):
        raise _unusable(config, "does not work as decoders of text do")
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    first = f"{layers[0]}.0."
    chances = {key for key, value in keys.items() if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool)}
    return Family(
        layers=layers[0],
        body=body,
        roles={},
        norms=tuple(name.removeprefix(first) for name in norms if name.startswith(first)),
        outer_norms=tuple(name for name in norms if not name.startswith(f"{layers[0]}.")),
        dropouts=tuple(sorted(key for key in chances if "layer" not in key)),
        ignored=("*.rotary_emb.inv_freq",),
        packs=False,
        own_logits=True,
        off=tuple(sorted(key for key in chances if "layer" in key)),
    )


def _unusable(config: PretrainedConfig, why: str) -> JobError:
    return JobError(
        f'base.model: architecture "{config.model_type}" is not known, and {why}. Known are {", ".join(sorted(FAMILIES))}; '
        "one entry in pipeline/model/families.py adds another.",
        everywhere=True,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _quoted(paths: list[str]) -> str:
    return "[" + ", ".join(f'"{path}"' for path in paths) + "]"
