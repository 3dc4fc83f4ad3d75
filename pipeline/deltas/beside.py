"""What stands beside a result's weights: the base's config, tokenizer, licence and index, made those of the result where they differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.deltas.layout import Layout
from pipeline.deltas.mixture import Mixture
from pipeline.weights.atomic import write_json
from pipeline.weights.hub import INDEX_NAME
from pipeline.weights.manifest import Added, Head

CERTIFICATE = "merge.json"
CONFIG = "config.json"
_TAKEN = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ""}
"""Config, tokenizer, code, licence. Other copies of the base's weights are not merged, so not taken along."""
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers' name today, and the one before."""


def write_beside(mixture: Mixture, layouts: Sequence[Layout], folder: Path) -> None:
    """Everything but weights and certificate."""
    for file in sorted(mixture.base.iterdir()):
        old_index = file.name.endswith(".index.json") and file.name != INDEX_NAME
        if file.is_file() and file.suffix in _TAKEN and not file.name.startswith(".") and not old_index and file.name != CERTIFICATE:
            shutil.copyfile(file, folder / file.name)
    if mixture.added or mixture.head or mixture.dtype:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if mixture.added:
            config["vocab_size"] = max(config["vocab_size"], mixture.added.ids[-1] + 1)
        if mixture.head:
            _announce_head(config, mixture.head)
        if mixture.dtype:
            _announce_dtype(config, _DTYPE_NAMES[mixture.dtype])
        write_json(folder / CONFIG, config)
        _announce_sizes(mixture, layouts, folder)
    if mixture.added:
        _teach_tokens(mixture.base, folder, mixture.added)


def _announce_head(config: dict[str, Any], head: Head) -> None:
    names = head.labels or ("LABEL_0",)
    config["architectures"] = [head.architecture]
    config["id2label"] = {str(place): name for place, name in enumerate(names)}
    config["label2id"] = {name: place for place, name in enumerate(names)}
    config["problem_type"] = "single_label_classification" if head.labels else "regression"
    if config.get("pad_token_id") is None:
        # transformers looks for the last token that is no padding.
        end = config.get("eos_token_id")
        config["pad_token_id"] = end[0] if isinstance(end, list) else end


def _announce_dtype(config: dict[str, Any], name: str) -> None:
    """By the key that is there, in the parts of a composed config too."""
    if not any(key in config for key in _DTYPE_KEYS):
        config["dtype"] = name
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part |= {key: name for key in _DTYPE_KEYS if key in part}


def _announce_sizes(mixture: Mixture, layouts: Sequence[Layout], folder: Path) -> None:
    """In the index, where there is one."""
    if not (folder / INDEX_NAME).is_file():
        return
    index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in mixture.head_tensors} | dict.fromkeys(
        mixture.head_tensors, layouts[-1].name
    )
    metadata = index.get("metadata", {})
    pieces = [piece for layout in layouts for piece in layout.pieces]
    if "total_size" in metadata:
        metadata["total_size"] = sum(piece.bytes for piece in pieces)
    if "total_parameters" in metadata:
        # transformers counts a tied one once, so the difference is added.
        more = sum(piece.bytes // piece.dtype.itemsize for piece in pieces)
        metadata["total_parameters"] += more - sum(entry.numel for entry in mixture.checkpoint.entries.values())
    write_json(folder / INDEX_NAME, index)


def _teach_tokens(base: Path, folder: Path, added: Added) -> None:
    # Here alone is transformers needed, and it takes seconds to import.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.add_tokens(list(added.tokens))
    tokenizer.save_pretrained(folder)
