"""A small random base of every family, with a tokenizer of its kind, saved by transformers as any base is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
)

from tests.bases import VOCABULARY, make_gpt2, make_llama, make_tokenizer
from tests.training import WORDS

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "initializer_range": 0.2,
}
ENCODERS = {
    "bert": BertConfig(**_ENCODER),
    "roberta": RobertaConfig(**_ENCODER, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2),
    "deberta-v2": DebertaV2Config(
        **_ENCODER,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        conv_kernel_size=3,
        type_vocab_size=0,
    ),
}
_DECODER = {
    **_ENCODER,
    "max_position_embeddings": 128,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": 9}
"""Shorter than most examples."""
_GEMMA = {"query_pre_attn_scalar": 6, "tie_word_embeddings": True, **_SLIDING}
DECODERS = {
    "mistral": MistralConfig(**_DECODER | _SLIDING),
    "qwen2": Qwen2Config(**_DECODER),
    "qwen3": Qwen3Config(**_DECODER, **_SLIDING, use_sliding_window=True, max_window_layers=1),
    "gemma": GemmaConfig(**_DECODER | {"tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**_DECODER | _GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3_text": Gemma3TextConfig(**_DECODER | _GEMMA, layer_types=["sliding_attention", "full_attention"]),
    "opt": OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=56,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        layerdrop=0.5,
    ),
    "gpt_neox": GPTNeoXConfig(**_DECODER),
}
"""OPT as its 350m variant is narrower outside its layers."""
UNKNOWN = {"olmo2": (Olmo2Config(**_DECODER), ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))}
"""Not in the table: with the linear maps to adapt, by path."""


LABELS = ("yes", "no", "perhaps")
TEXTS = [(" ".join(WORDS[: 1 + n]), " ".join(WORDS[n : 2 * n + 1])) if n % 3 else (" ".join(WORDS[: n + 2]),) for n in range(6)]
"""To be judged, one or two at a time."""


def make_family(name: str, folder: Path) -> Path:
    """The base of a family, by its `model_type`."""
    if name == "gpt2":
        return make_gpt2(folder)
    if name == "llama":
        return make_llama(folder)
    torch.manual_seed(0)
    config = ENCODERS.get(name) or DECODERS.get(name) or UNKNOWN[name][0]
    model = (AutoModel if name in ENCODERS else AutoModelForCausalLM).from_config(config)
    # transformers starts biases at zero and norms at one (Gemma: zero), which would hide what is lost on the way.
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.1)
    model.save_pretrained(folder)
    if name in ENCODERS:
        make_encoder_tokenizer(folder, name)
    else:
        make_tokenizer(folder)
    return folder


def make_encoder_tokenizer(folder: Path, name: str) -> None:
    """BERT's word pieces with [CLS] and [SEP], or RoBERTa's bytes with <s> and </s>; DeBERTa-v2 has BERT's form of pairs."""
    if name == "roberta":
        start, pad, end, unknown = special = ["<s>", "<pad>", "</s>", "<unk>"]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        pair = f"{start} $A {end} {end} $B {end}"
    else:
        pad, start, end, unknown = special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
        pair = f"{start} $A {end} $B:1 {end}:1"
    tokenizer.train_from_iterator([" ".join(WORDS), "a is the of"], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", pair=pair, special_tokens=ids)
    inputs = ["input_ids", "attention_mask"] if name == "roberta" else ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=start, sep_token=end, pad_token=pad, unk_token=unknown, model_input_names=inputs
    )
    fast.save_pretrained(folder)


def theirs(folder: Path, encoder: bool):
    """transformers' own model in fp32, eager attention; encoders with a head for LABELS."""
    if encoder:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS)).eval()
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def close(one: dict[str, np.ndarray], other: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        scale = max(1.0, float(np.abs(other[name]).max()))
        np.testing.assert_allclose(one[name], other[name], atol=tolerance * scale, err_msg=name)
