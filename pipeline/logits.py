"""A merged folder's answers beside those of base + deltas that are not merged: logits on a few prompts, both models in fp32.

In fp32, so that what differs is what merging did to the weights, not the arithmetic of the comparison. Both are transformers' models, held
one at a time; where memory does not hold one, or transformers does not know it, that is said in the answer's place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline.deltas.changes import Addition
from pipeline.deltas.mixture import Mixture, Share
from pipeline.screen import size_text
from pipeline.weights.manifest import ADDED_EMBEDDINGS

PROMPTS = (
    "The capital of France is",
    "In 1969, two men walked on the Moon, and",
    "def largest(numbers):\n    return",
    "name : Blue Spice | food : Italian | area : riverside ->",
    "Q: What is 7 times 8?\nA:",
)
_NEED_FOR_WEIGHTS = 1.25
"""What a model in fp32 takes beside its weights, at most."""


def compare_logits(mixture: Mixture, folder: Path, prompts: Sequence[str] = PROMPTS) -> dict[str, Any]:
    """
    Args:
        folder: with the merged weights, config and tokenizer.

    Returns:
        `prompts` and `positions` that were compared, the `largest_difference` and `mean_difference` of their logits, the share of positions
        whose largest logit is of the same token or class (`equal_argmax`); or why it was `skipped`.
    """
    need = int(4 * _NEED_FOR_WEIGHTS * sum(entry.numel for entry in mixture.checkpoint.entries.values()))
    if need > (free := _free_bytes()):
        return {"skipped": f"a model in fp32 takes {size_text(need)} of memory, and {size_text(free)} are free"}
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            make = getattr(transformers, (config.architectures or ["none"])[0])
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            tokens = [torch.tensor([tokenizer(prompt).input_ids]) for prompt in prompts]
            apart = _answers(_unmerged(mixture, config, make), tokens)
            merged = _answers(make.from_pretrained(folder, dtype=torch.float32, local_files_only=True), tokens)
        except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            return {"skipped": f"transformers does not load this model or its tokenizer here: {said}"}
    pairs = list(zip(apart, merged, strict=True))
    differences = torch.cat([(one - other).abs().flatten() for one, other in pairs])
    equal = torch.cat([(one.argmax(-1) == other.argmax(-1)).flatten() for one, other in pairs])
    return {
        "prompts": len(prompts),
        "positions": equal.numel(),
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "equal_argmax": float(equal.float().mean()),
    }


def _answers(model: Any, tokens: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each prompt [positions, vocabulary or classes]."""
    with torch.no_grad():
        return [torch.atleast_2d(model.eval()(row).logits[0]) for row in tokens]


def _unmerged(mixture: Mixture, config: Any, make: Any) -> Any:
    """The base by transformers, with the deltas beside its weights."""
    stored = json.loads((mixture.base / "config.json").read_text(encoding="utf-8"))
    config.vocab_size = stored.get("vocab_size", getattr(config, "vocab_size", None))
    model = make.from_pretrained(mixture.base, config=config, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        start = {one.name: model.get_parameter(one.name).clone() for share in mixture.shares for one in share.stored.manifest.replaced}
        for share in mixture.shares:
            _put_beside(model, share, start)
    return model


def _put_beside(model: Any, share: Share, start: dict[str, torch.Tensor]) -> None:
    stored, manifest = share.stored, share.stored.manifest
    for module in manifest.modules:
        addition = Addition(module, *stored.pairs[module.name], share.weight)
        model.get_submodule(module.name).register_forward_hook(_adding(addition))
    for one in manifest.replaced:
        parameter = model.get_parameter(one.name)
        parameter += share.weight * (stored.replaced[one.name].view_as(parameter) - start[one.name])
    if manifest.added:
        size = max(model.get_input_embeddings().weight.shape[0], manifest.added.ids[-1] + 1)
        model.resize_token_embeddings(size, mean_resizing=False)
        for name, rows in stored.added.items():
            table = model.get_input_embeddings() if name == ADDED_EMBEDDINGS else model.get_output_embeddings()
            if table is not None:
                table.weight[list(manifest.added.ids)] = rows
    for name, tensor in stored.head.items():
        model.get_parameter(name).copy_(tensor)


def _adding(addition: Addition) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
    scale = addition.weight * addition.module.alpha / addition.module.rank
    return lambda _, inputs, output: output + (inputs[0] @ addition.a.T @ addition.b.T) * scale


def _free_bytes() -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    return int(rows["MemAvailable"].split()[0]) * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and reports of what it did not load are not for the person who merges."""
    logging = transformers.utils.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
