"""What the study's base is made from: a random GPT-2 with a tokenizer of its own, and running text that has nothing of E2E.

In: WebNLG's XML folders, SAMSum's files. Out: `text/train.jsonl` and `text/valid.jsonl` (a document a line: triples, a line feed, their
text; a dialogue, a blank line, its summary) and `start/`, the checkpoint that jobs/study/pretrain.toml trains. DART is not among them:
half of it is E2E.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from ways import END

from pipeline.job.task import SamSum, WebNlg
from pipeline.tasks.example import Dropped, Pair
from pipeline.tasks.open import open_split, separator_text

VOCABULARY, CONTEXT = 2048, 512
WIDTH, LAYERS, HEADS = 128, 6, 4
HELD_OUT = 200
"""Documents that pretraining is scored on."""
SEED = 1


def make_start(out: Path, webnlg: Path, samsum: Path) -> None:
    """Writes the text, then the checkpoint; nothing where the checkpoint is there."""
    if (out / "start" / "config.json").exists():
        return
    texts = [*_documents(WebNlg(kind="webnlg", data=str(webnlg), separator="\n")), *_documents(SamSum(kind="samsum", data=str(samsum)))]
    random.Random(SEED).shuffle(texts)
    (out / "text").mkdir(parents=True, exist_ok=True)
    for split, part in (("valid", texts[:HELD_OUT]), ("train", texts[HELD_OUT:])):
        lines = (json.dumps({"text": text}, ensure_ascii=False) for text in part)
        (out / "text" / f"{split}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    tokenizer = _tokenizer(texts)
    torch.manual_seed(SEED)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(out / "start.new")
    tokenizer.save_pretrained(out / "start.new")
    (out / "start.new").rename(out / "start")


def _documents(task: WebNlg | SamSum) -> Iterator[str]:
    between = separator_text(task, END) or ""
    for found in open_split(task, "train").read():
        assert isinstance(found, Pair | Dropped)
        if isinstance(found, Pair):
            yield found.prompt + between + found.completion


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT)
