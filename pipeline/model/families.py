"""Where the parts of each architecture are, and what is particular about it. One entry adds a family.

A role names a linear map as the paper does; a fused projection holds several roles in runs of output rows. Parameters called `bias`
are the biases, those of norms included. Paths are those of transformers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PretrainedConfig

from pipeline.job.errors import JobError


@dataclass(frozen=True)
class Role:
    """A module inside a layer, and which of its `parts` equal runs of output rows is meant."""

    module: str
    part: int = 0
    parts: int = 1
    per_head: bool = False
    """Each attention head has runs of its own: the rows of head 0's q, k and v, then those of head 1's."""


@dataclass(frozen=True)
class HeadForm:
    """The head for labels that transformers gives this architecture's `...ForSequenceClassification`."""

    output: str
    """Path of the last map, from hidden states to outputs."""
    bias: bool = False
    reads: Literal["first", "last"] = "last"
    """Which token of a text stands for the whole."""
    dense: str | None = None
    """Path of a map before it, as new as the head itself."""
    activation: str = "tanh"
    """Behind that map: its name, or the config's key that has it."""
    dropout_before_dense: bool = False
    """The head's dropout is also on the input of that map."""
    pooler: str | None = None
    """Path of a pooler of the base that the head reads through: pretrained, and frozen as in PEFT."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Of the model, which the head takes the place of; what PEFT calls modules to save."""
        return tuple(dict.fromkeys(path.split(".")[0] for path in (self.dense, self.output) if path))


_SCORE = HeadForm("score")


@dataclass(frozen=True)
class Family:
    layers: str
    """Path of the list of layers; layer i is `{layers}.{i}`."""
    body: str
    """Path of the part that turns token ids into hidden states."""
    roles: dict[str, Role]
    norms: tuple[str, ...]
    """Paths inside a layer."""
    outer_norms: tuple[str, ...]
    """Paths of those outside the layers."""
    dropouts: tuple[str, ...]
    """Config keys of the base's own dropout probabilities."""
    post_norm: str | None = None
    """Of models that norm the sum of MLP and residual: the path of that norm inside a layer."""
    ignored: tuple[str, ...] = ()
    """Patterns of checkpoint tensors that are no weights of this model: constants, and heads for other tasks."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Part of a parameter's name -> what older checkpoints call it."""
    encoder: bool = False
    """Attends both ways: judges texts, and generates none."""
    head: HeadForm = field(default=_SCORE)
    positions_after_padding: bool = False
    """Position 0 is at the embedding behind the padding token's, as in fairseq's models."""
    shared_inputs: tuple[str, ...] = ()
    """Names of parameters, or how they begin, from which an input of all layers beside the hidden states is computed."""
    token_types: bool = False
    """Is told which tokens are the second text's."""
    packs: bool = True
    """Its attention can be told where packed examples begin and end. Else they are padded."""
    own_logits: bool = False
    """Logits come from transformers' own forward pass, since it is not known what it does to them."""
    off: tuple[str, ...] = ()
    """Config keys of chances to skip a layer, which would have the ranks gather different ones: set to 0."""

    def first_position(self, config: PretrainedConfig) -> int:
        """What the model calls a text's first position."""
        return config.pad_token_id + 1 if self.positions_after_padding else 0

    def norm_behind_mlp(self, config: PretrainedConfig) -> str | None:
        """Path inside a layer of the norm of the sum of MLP and residual, in models that have it there."""
        # Most OPTs norm before.
        return None if getattr(config, "do_layer_norm_before", False) else self.post_norm

    def context(self, config: PretrainedConfig) -> int:
        """Positions that a text may have."""
        return config.max_position_embeddings - self.first_position(config)


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
    norms=("ln_1", "ln_2"),
    outer_norms=("transformer.ln_f",),
    dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    ignored=("*.attn.bias", "*.attn.masked_bias"),
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
    norms=("input_layernorm", "post_attention_layernorm"),
    outer_norms=("model.norm",),
    dropouts=("attention_dropout",),
    ignored=("*.rotary_emb.inv_freq",),
)
_QWEN3 = replace(_LLAMA, norms=(*_LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"))
_GEMMA2 = replace(_LLAMA, norms=(*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm"))
_GEMMA3 = replace(_GEMMA2, norms=(*_GEMMA2.norms, "self_attn.q_norm", "self_attn.k_norm"))
_OPT = Family(
    layers="model.decoder.layers",
    body="model",
    roles={
        "q": Role("self_attn.q_proj"),
        "k": Role("self_attn.k_proj"),
        "v": Role("self_attn.v_proj"),
        "o": Role("self_attn.out_proj"),
        "mlp_in": Role("fc1"),
        "mlp_out": Role("fc2"),
    },
    norms=("self_attn_layer_norm", "final_layer_norm"),
    outer_norms=("model.decoder.final_layer_norm",),
    dropouts=("dropout", "attention_dropout"),
    post_norm="final_layer_norm",
    off=("layerdrop",),
)
_GPT_NEOX = Family(
    layers="gpt_neox.layers",
    body="gpt_neox",
    roles={
        "q": Role("attention.query_key_value", 0, 3, per_head=True),
        "k": Role("attention.query_key_value", 1, 3, per_head=True),
        "v": Role("attention.query_key_value", 2, 3, per_head=True),
        "o": Role("attention.dense"),
        "mlp_in": Role("mlp.dense_h_to_4h"),
        "mlp_out": Role("mlp.dense_4h_to_h"),
    },
    norms=("input_layernorm", "post_attention_layernorm"),
    outer_norms=("gpt_neox.final_layer_norm",),
    dropouts=("hidden_dropout", "attention_dropout"),
    ignored=("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq"),
    renamed=(("lm_head.", "embed_out."),),
)
_BERT = Family(
    layers="bert.encoder.layer",
    body="bert",
    roles={
        "q": Role("attention.self.query"),
        "k": Role("attention.self.key"),
        "v": Role("attention.self.value"),
        "o": Role("attention.output.dense"),
        "mlp_in": Role("intermediate.dense"),
        "mlp_out": Role("output.dense"),
    },
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    outer_norms=("bert.embeddings.LayerNorm",),
    dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
    post_norm="output.LayerNorm",
    ignored=("*embeddings.position_ids", "cls.*", "classifier.*"),
    renamed=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    encoder=True,
    head=HeadForm("classifier", bias=True, reads="first", pooler="bert.pooler"),
    token_types=True,
)
_ROBERTA = Family(
    layers="roberta.encoder.layer",
    body="roberta",
    roles=_BERT.roles,
    norms=_BERT.norms,
    outer_norms=("roberta.embeddings.LayerNorm",),
    dropouts=_BERT.dropouts,
    post_norm=_BERT.post_norm,
    # Its heads do not read through the pooler that some checkpoints have.
    ignored=("*embeddings.position_ids", "lm_head.*", "classifier.*", "*pooler.dense.*"),
    renamed=_BERT.renamed,
    encoder=True,
    head=HeadForm("classifier.out_proj", bias=True, reads="first", dense="classifier.dense", dropout_before_dense=True),
    positions_after_padding=True,
)
_DEBERTA_V2 = Family(
    layers="deberta.encoder.layer",
    body="deberta",
    roles={
        **_BERT.roles,
        "q": Role("attention.self.query_proj"),
        "k": Role("attention.self.key_proj"),
        "v": Role("attention.self.value_proj"),
    },
    norms=_BERT.norms,
    outer_norms=("deberta.embeddings.LayerNorm", "deberta.encoder.LayerNorm", "deberta.encoder.conv.LayerNorm"),
    dropouts=_BERT.dropouts,
    post_norm=_BERT.post_norm,
    ignored=("*embeddings.position*", "cls.*", "lm_predictions.*", "mask_predictions.*", "classifier.*", "pooler.*"),
    renamed=_BERT.renamed,
    encoder=True,
    head=HeadForm("classifier", bias=True, reads="first", dense="pooler.dense", activation="pooler_hidden_act"),
    shared_inputs=("deberta.encoder.rel_embeddings", "deberta.encoder.LayerNorm"),
    token_types=True,
    packs=False,
)
FAMILIES = {
    "bert": _BERT,
    "deberta-v2": _DEBERTA_V2,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "roberta": _ROBERTA,
}


def known_family(config: PretrainedConfig) -> Family | None:
    """The entry for a base's `model_type`; None where there is none.

    Raises:
        JobError: a mixture of experts, or one that is set to work in a way that this is not written for.
    """
    experts = {key: value for key, value in config.to_dict().items() if "expert" in key and isinstance(value, int) and value > 1}
    if experts:
        # Of those, the largest is how many there are; others say how many a token has.
        key, value = max(experts.items(), key=lambda item: item[1])
        raise JobError(
            f'base.model: "{config.model_type}" is a mixture of experts ({key} = {value}), whose routing is not trained rightly here. '
            "Use a dense base."
        )
    family = FAMILIES.get(config.model_type)
    if family and family.encoder and (getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False)):
        raise JobError(f"{config.name_or_path}: config.json makes a decoder of a {config.model_type}. Set is_decoder to false.")
    if family and getattr(config, "use_bidirectional_attention", False):
        raise JobError(f"{config.name_or_path}: config.json lets a {config.model_type} look ahead, so it generates no text. Use another.")
    return family


def refuse_encoder(config: PretrainedConfig, what: str) -> None:
    """Raises:
    JobError: the base is an encoder, which generates no text, and `what` needs one that does."""
    family = known_family(config)
    if family and family.encoder:
        decoders = ", ".join(sorted(name for name, family in FAMILIES.items() if not family.encoder))
        raise JobError(
            f"base.model: {config.model_type} is an encoder, which generates no text; {what} needs a decoder ({decoders}). "
            'Use one, or give it a task with labels: "glue", "classification", "regression".',
            everywhere=True,
        )
