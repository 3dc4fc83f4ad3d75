"""Where the parts of each architecture are. One entry adds a family.

A role names a linear map as the paper does; a fused projection holds several roles in equal or given runs of output rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from pipeline.job.errors import JobError


@dataclass(frozen=True)
class Role:
    """A module inside a layer, and which of its `parts` equal runs of output rows is meant."""

    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    layers: str
    """Path of the list of layers; layer i is `{layers}.{i}`."""
    body: str
    """Path of the part that turns token ids into hidden states."""
    roles: dict[str, Role]
    dropouts: tuple[str, ...]
    """Config keys of the base's own dropout probabilities."""
    ignored: tuple[str, ...] = ()
    """Endings of checkpoint tensors that are constants, not weights."""


_GPT2 = Family(
    layers="transformer.h",
    body="transformer",
    roles={
        "q": Role("attn.c_attn", 0, 3),
        "k": Role("attn.c_attn", 1, 3),
        "v": Role("attn.c_attn", 2, 3),
        "o": Role("attn.c_proj"),
        "mlp_in": Role("mlp.c_fc"),
        "mlp_out": Role("mlp.c_proj"),
    },
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ignored=(".attn.bias", ".attn.masked_bias"),
)
_LLAMA = Family(
    layers="model.layers",
    body="model",
    roles={
        "q": Role("self_attn.q_proj"),
        "k": Role("self_attn.k_proj"),
        "v": Role("self_attn.v_proj"),
        "o": Role("self_attn.o_proj"),
        "mlp_gate": Role("mlp.gate_proj"),
        "mlp_in": Role("mlp.up_proj"),
        "mlp_out": Role("mlp.down_proj"),
    },
    dropouts=("attention_dropout",),
    ignored=(".rotary_emb.inv_freq",),
)
FAMILIES = {"gpt2": _GPT2, "llama": _LLAMA}


def family_of(config: PretrainedConfig) -> Family:
    """The entry for a base's `model_type`.

    Raises:
        JobError: the architecture is not known.
    """
    if config.model_type not in FAMILIES:
        raise JobError(
            f'base.model: architecture "{config.model_type}" is not known. Known are {", ".join(sorted(FAMILIES))}; '
            "one entry in pipeline/model/families.py adds another."
        )
    return FAMILIES[config.model_type]
