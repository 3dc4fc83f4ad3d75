"""A base's architecture from its config, with no weights: every parameter on `meta`, every linear map frozen."""

from __future__ import annotations

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pipeline.job.errors import JobError
from pipeline.model import attention
from pipeline.model.config import first_line
from pipeline.model.families import Family
from pipeline.model.head import Head
from pipeline.model.linear import replace_linears
from pipeline.model.pooler import Pooler
from pipeline.model.unknown import family_of
from pipeline.model.vocabulary import Embedding, is_plain
from pipeline.plan.hardware import computes_bf16, without_kernels

_ACTIVATIONS = ("activation_function", "hidden_act", "hidden_activation")
"""Keys of configs."""
_FUSED, _SAME_AS_FUSED = "gelu_pytorch_tanh", ("gelu_new", "gelu_fast")
"""One kernel that keeps its input alone, for the same function written in many steps, which keep four to six tensors of the FFN's width."""
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(config: PretrainedConfig, dropout: float) -> tuple[PreTrainedModel, Family]:
    """The language model of a config, or the encoder without its head, on `meta`; constant buffers (rotary frequencies) are real.

    Args:
        dropout: probability of the base's own dropouts.

    Raises:
        JobError: an unknown architecture, or sizes that do not fit together.
    """
    family = family_of(config)
    for key in family.dropouts:
        setattr(config, key, dropout)
    for key in family.off:
        setattr(config, key, 0.0)
    for key in _ACTIVATIONS:
        if getattr(config, key, None) in _SAME_AS_FUSED:
            setattr(config, key, _FUSED)
    attention.register()
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            kind = AutoModelForSequenceClassification if family.encoder else AutoModelForCausalLM
            model = kind.from_config(config, attn_implementation=attention.NAME if family.packs else None)
        model.tie_weights()
    except Exception as error:  # as above
        raise JobError(f"{config.name_or_path}: its config.json makes no model ({first_line(error)}). Fetch it again.") from None
    if family.encoder:
        # The head is the delta's, whole and in fp32 on every rank.
        for name in family.head.modules:
            setattr(model, name, nn.Identity())
        if path := family.head.pooler:
            model.set_submodule(path, Pooler(model.get_submodule(path)))
    elif not family.own_logits:
        model.lm_head = Head(model.lm_head, getattr(config, "final_logit_softcapping", None))
    body = model.get_submodule(family.body)
    if is_plain(embedding := body.get_input_embeddings()):
        body.set_input_embeddings(Embedding(embedding))
    replace_linears(model)
    model.requires_grad_(False)
    return model, family


def require_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype, if this device computes in it.

    Raises:
        JobError: bf16 on a GPU without it (V100 and older), or a GPU that this torch build has no kernels for.
    """
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if problem := without_kernels(name, capability, tuple(torch.cuda.get_arch_list()), torch.__version__):
            raise JobError(problem)
        if dtype == "bf16" and not computes_bf16(capability):
            raise JobError(f'base.dtype = "bf16": {name} does not compute in bf16. Use "fp16" (loss scaling is automatic) or "fp32".')
    return TORCH_DTYPES[dtype]


def checkpointed(model: PreTrainedModel, family: Family) -> None:
    """Recomputes each layer in the backward pass.

    Reentrant: under ZeRO-3 it gathers a layer once or twice, non-reentrant 19 to 38 times. It needs an input with a gradient,
    which frozen embeddings do not give: their output is made a leaf that has one. A trained input that all layers share is beyond it:
    each layer would go back through the one graph behind it.
    """
    shared = any(p.requires_grad and name.startswith(family.shared_inputs) for name, p in model.named_parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": not shared})
    embeddings: nn.Module = model.get_submodule(family.body).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True) if torch.is_grad_enabled() else output)
