"""Makes the base model of the demo, `base/`, from nothing: text, tokenizer and a small GPT-2.

The text comes from pretraining_text.py and has nothing to do with the demo's two tasks. The tokenizer is a
byte-level BPE with 1024 entries, of which `<|endoftext|>` begins, ends and pads. The model has 2.5 million
parameters, so that the folder stays under 10 MB. Seeds are fixed, so the same machine makes the same model.

`python make_base.py` takes about 17 minutes on two CPU cores; the result is kept in the repository.
"""

import argparse
import math
import time
from itertools import islice
from pathlib import Path

import torch
from pretraining_text import END, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

BASE = Path(__file__).parent / "base"
SIZE_LIMIT = 10_000_000  # bytes, for the whole folder

VOCABULARY = 1024
CONTEXT = 256
WIDTH, LAYERS, HEADS = 192, 5, 6

BATCH = 16
MATRIX_RATE, OTHER_RATE = 0.02, 4e-3
WARM_UP, COOL_DOWN = 0.02, 0.5  # shares of the steps
TEXT_SEED, TOKENIZER_SEED, CHECK_SEED, MODEL_SEED = 1, 2, 3, 4


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Not the end marks: they are never to be part of anything else.
    text = (document.replace(END, "\n") for document in islice(documents(TOKENIZER_SEED), 20_000))
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT)


def token_rows(tokenizer: PreTrainedTokenizerFast, seed: int, rows: int) -> torch.Tensor:
    """Documents one after the other, cut into rows of the context's length."""
    stream: list[int] = []
    source = documents(seed)
    while len(stream) < rows * CONTEXT:
        texts = [text + END for text in islice(source, 1000)]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
            stream.extend(encoding.ids)
    return torch.tensor(stream[: rows * CONTEXT], dtype=torch.int32).view(rows, CONTEXT)


def new_model() -> GPT2LMHeadModel:
    torch.manual_seed(MODEL_SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=True, **ends,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def make_optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon learns a good deal faster than AdamW here, but it is for the matrices inside the layers only."""
    matrices = [weight for weight in model.transformer.h.parameters() if weight.ndim == 2]
    inside = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in inside]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int) -> float:
    done = (step + 1) / steps
    return min(1.0, done / WARM_UP, max(0.02, (1 - done) / COOL_DOWN))


def loss_of(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(rows).logits
    guesses, targets = logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten().long()
    return torch.nn.functional.cross_entropy(guesses, targets)


def train(model: GPT2LMHeadModel, rows: torch.Tensor) -> None:
    optimizers = make_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, len(rows) // BATCH)) for optimizer in optimizers
    ]
    model.train()
    mean_loss = math.log(VOCABULARY)
    bar = tqdm(rows.split(BATCH), desc="pretraining", mininterval=5)
    for batch in bar:
        loss = loss_of(model, batch)
        loss.backward()
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad(set_to_none=True)
        mean_loss += 0.02 * (loss.item() - mean_loss)
        bar.set_postfix(loss=f"{mean_loss:.3f}", refresh=False)


@torch.no_grad()
def check_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    model.eval()
    return sum(loss_of(model, batch).item() for batch in rows.split(BATCH)) / math.ceil(len(rows) / BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base model of the demo.")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 4096 tokens")
    parser.add_argument("--out", type=Path, default=BASE, help="folder to write")
    arguments = parser.parse_args()

    start = time.perf_counter()
    tokenizer = train_tokenizer()
    rows = token_rows(tokenizer, TEXT_SEED, arguments.steps * BATCH)
    model = new_model()
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens")
    train(model, rows)
    print(f"loss on new text: {check_loss(model, token_rows(tokenizer, CHECK_SEED, 10 * BATCH)):.3f}")

    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    size = sum(file.stat().st_size for file in arguments.out.iterdir())
    print(f"{arguments.out}: {size:,} bytes after {time.perf_counter() - start:.0f} s")
    if size >= SIZE_LIMIT:
        raise SystemExit(f"the folder must be smaller than {SIZE_LIMIT:,} bytes")


if __name__ == "__main__":
    main()
