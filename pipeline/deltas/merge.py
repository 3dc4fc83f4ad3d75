"""Base + delta -> an ordinary checkpoint, file to file: W + (alpha / R) B A in fp32, rounded once (Hu et al. 2021, section 4.1), and
the base's own parameters where they were trained.

Every file keeps its layout, header and dtype, so unadapted tensors are copied byte by byte and adapted ones rewritten in place,
a run of rows at a time. The result appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.deltas.changes import Change, changes_of, refuse_misfit, refuse_unfolded
from pipeline.job.errors import JobError
from pipeline.weights.atomic import new_folder, refuse_filled, write_json
from pipeline.weights.delta import Added, Head, read_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.hub import INDEX_NAME
from pipeline.weights.index import Entry, header_of, open_checkpoint, read_header
from pipeline.weights.read import Reader, byte_view

SCHEMA_VERSION = 1
CERTIFICATE = "merge.json"
_COPY_BYTES = 1 << 22
_BLOCK_ELEMENTS = 1 << 20
_TAKEN = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".md", ""}
"""Config, tokenizer, code, licence. Other copies of the base's weights are not merged, so not taken along."""


def merge(base: Path, delta: Path, out: Path, progress: Callable[[Iterable[Entry]], Iterable[Entry]] = iter) -> dict[str, Any]:
    """Writes the merged checkpoint with tokenizer and config, and its certificate `merge.json`.

    Args:
        progress: wraps the iteration over the base's tensors, for a progress bar.

    Returns:
        The certificate: digests of base, delta and result, and per tensor the largest error that rounding to its dtype made.

    Raises:
        JobError: another base than the delta's, a delta that does not fit it, or a destination that is not empty.
    """
    refuse_filled(out)
    checkpoint = open_checkpoint(base)
    stored = read_delta(delta)
    manifest, head = stored.manifest, stored.head
    refuse_unfolded(manifest, delta)
    digests = file_digests(checkpoint.files)
    if base_digest(digests) != manifest.base_digest:
        raise JobError(
            f"{base}: its digest is {base_digest(digests)[:12]}..., the delta was trained on {manifest.base_digest[:12]}... "
            f"({manifest.base}). Name the base that the delta was trained on."
        )
    changes = changes_of(stored)
    refuse_misfit(checkpoint, changes, delta)
    errors: dict[str, float] = {}
    with new_folder(out) as partial, Reader() as reader:
        results = {}
        tensors = iter(progress([entry for file in checkpoint.files for entry in read_header(file)]))
        for file in checkpoint.files:
            # The last file takes a head in; one that the base has gives way.
            extra = head if file == checkpoint.files[-1] else {}
            results[file.name] = _merge_file(file, partial / file.name, tensors, changes, reader, errors, extra, set(head))
        _copy_the_rest(base, partial)
        if manifest.added:
            grown = [(checkpoint.entries[name], change) for name, change in changes.items()]
            more = sum((change.shape(entry.shape)[0] - entry.shape[0]) * entry.bytes // entry.shape[0] for entry, change in grown)
            _announce_tokens(base, partial, manifest.added, more)
        if manifest.head:
            replaced = sum(checkpoint.entries[name].bytes for name in head if name in checkpoint.entries)
            _announce(partial, checkpoint.files[-1].name, manifest.head, sum(4 * tensor.numel() for tensor in head.values()) - replaced)
        certificate = {
            "schema_version": SCHEMA_VERSION,
            "base": {"path": str(base.resolve()), "digest": manifest.base_digest, "files": digests},
            "delta": {"path": str(delta.resolve()), "sha256": manifest.sha256, "manifest": asdict(manifest)},
            "result": {"digest": base_digest(results), "files": results},
            "largest_rounding_error": errors,
        }
        write_json(partial / CERTIFICATE, certificate)
    return certificate


def _merge_file(
    source: Path,
    target: Path,
    tensors: Iterator[Entry],
    changes: dict[str, Change],
    reader: Reader,
    errors: dict[str, float],
    extra: dict[str, torch.Tensor],
    left_out: set[str],
) -> str:
    """Rewrites one file; takes as many entries from `tensors` as it has, then the extra ones. Returns the result's sha256."""
    sha = hashlib.sha256()
    header, data_start = header_of(source)
    entries = read_header(source)
    with source.open("rb") as old, target.open("wb") as new:

        def write(data: bytes | memoryview) -> None:
            sha.update(data)
            new.write(data)

        grown = {entry.name: shape for entry in entries if (shape := changes.get(entry.name, Change()).shape(entry.shape)) != entry.shape}
        if extra or grown or any(entry.name in left_out for entry in entries):
            write(_with(header, [entry for entry in entries if entry.name not in left_out], grown, extra))
        else:
            _copy(old, data_start, write)
        for _ in entries:
            entry = next(tensors)
            if entry.name in left_out:
                continue
            if change := changes.get(entry.name):
                errors[entry.name] = _merge_tensor(entry, change, reader, write)
            else:
                old.seek(entry.start)
                _copy(old, entry.bytes, write)
        end = max((entry.start + entry.bytes for entry in entries), default=data_start)
        old.seek(end)
        _copy(old, source.stat().st_size - end, write)
        for tensor in extra.values():
            write(byte_view(tensor.contiguous()))
    return sha.hexdigest()


def _with(old: dict[str, Any], entries: list[Entry], grown: dict[str, tuple[int, ...]], extra: dict[str, torch.Tensor]) -> bytes:
    """A safetensors header of these tensors of an old one, some with more rows, and of fp32 tensors more, whose data come behind."""
    header, place = {key: value for key, value in old.items() if key == "__metadata__"}, 0
    for entry in entries:
        shape = grown.get(entry.name, entry.shape)
        size = torch.Size(shape).numel() * entry.dtype.itemsize
        header[entry.name] = {**old[entry.name], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    for name, tensor in extra.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [place, place + 4 * tensor.numel()]}
        place += 4 * tensor.numel()
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _announce(folder: Path, file: str, head: Head, more_bytes: int) -> None:
    """Makes config and index those of a model with this head, which is in `file`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = head.labels or ("LABEL_0",)
    config["architectures"] = [head.architecture]
    config["id2label"] = {str(place): name for place, name in enumerate(names)}
    config["label2id"] = {name: place for place, name in enumerate(names)}
    config["problem_type"] = "single_label_classification" if head.labels else "regression"
    if config.get("pad_token_id") is None:
        # transformers looks for the last token that is no padding.
        end = config.get("eos_token_id")
        config["pad_token_id"] = end[0] if isinstance(end, list) else end
    write_json(folder / "config.json", config)
    _grow_index(folder, more_bytes, dict.fromkeys(head.tensors, file))


def _announce_tokens(base: Path, folder: Path, added: Added, more_bytes: int) -> None:
    """Makes config, index and tokenizer those of a model that knows the tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = max(config["vocab_size"], added.ids[-1] + 1)
    write_json(folder / "config.json", config)
    _grow_index(folder, more_bytes)
    # Here alone is transformers needed, and it takes seconds to import.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.add_tokens(list(added.tokens))
    tokenizer.save_pretrained(folder)


def _grow_index(folder: Path, more_bytes: int, files: dict[str, str] | None = None) -> None:
    """Where there is one.

    Args:
        files: further tensors -> the file that each is in.
    """
    if (folder / INDEX_NAME).is_file():
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        index["weight_map"] |= files or {}
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += more_bytes
        write_json(folder / INDEX_NAME, index)


def _merge_tensor(entry: Entry, change: Change, reader: Reader, write: Callable[[memoryview], None]) -> float:
    """Writes the result, a run of rows at a time. Returns the largest error of the one rounding."""
    rows = entry.shape[0]
    columns = entry.numel // rows
    block = max(1, _BLOCK_ELEMENTS // columns)
    error = 0.0
    for first in range(0, rows, block):
        last = min(rows, first + block)
        stored = torch.empty((last - first) * columns, dtype=entry.dtype)
        reader.read(entry, first * columns, stored)
        # In fp32, or in the base's own dtype where that is wider.
        wide = torch.promote_types(entry.dtype, torch.float32)
        exact = change.rows(stored.view(-1, columns).to(wide), first)
        rounded = exact.to(entry.dtype)
        if not rounded.isfinite().all():
            raise JobError(f'{entry.file}: tensor "{entry.name}" is not finite after the merge in {entry.dtype}. Is the delta sound?')
        error = max(error, float((rounded.to(wide) - exact).abs().max()))
        write(byte_view(rounded))
    if (more := change.behind(rows)) is not None:
        write(byte_view(more.to(entry.dtype).contiguous()))
    return error


def _copy(source: BinaryIO, count: int, write: Callable[[bytes], None]) -> None:
    while count:
        data = source.read(min(count, _COPY_BYTES))
        if not data:
            raise JobError(f"{source.name}: ends early. Fetch the base again.")
        write(data)
        count -= len(data)


def _copy_the_rest(base: Path, target: Path) -> None:
    """Config, tokenizer, generation settings, the index."""
    for file in sorted(base.iterdir()):
        old_index = file.name.endswith(".index.json") and file.name != INDEX_NAME
        if file.is_file() and file.suffix in _TAKEN and not file.name.startswith(".") and not old_index and file.name != CERTIFICATE:
            shutil.copyfile(file, target / file.name)
