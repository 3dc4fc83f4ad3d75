"""Small random bases with tokenizers of their own, saved by transformers as any base is."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
_TEXT = ["name : Blue Spice | food : Italian | area : riverside", "The Blue Spice is an Italian place by the river ."]


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCABULARY` entries with one end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def make_gpt2(folder: Path, seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.2}
    model = GPT2LMHeadModel(GPT2Config(**{**settings, **changes}, bos_token_id=0, eos_token_id=0))
    # transformers starts biases at zero, which would hide a bias that is lost on the way.
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_llama(folder: Path, seed: int = 0, **changes) -> Path:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes}, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer(folder)
    return folder
