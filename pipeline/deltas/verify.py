"""`zlora verify`: every byte of a merged folder, a delta, a state or a run, against the digests that were written with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.deltas.beside import CERTIFICATE
from pipeline.deltas.certificate import HEADER, read_certificate
from pipeline.deltas.parallel import side_by_side
from pipeline.job.errors import JobError
from pipeline.weights.delta import read_delta
from pipeline.weights.digest import base_digest, sha256_of
from pipeline.weights.manifest import MANIFEST
from pipeline.weights.state import SUMS, Damaged, states_of, verify_state
from pipeline.weights.unfinished import refuse_unfinished

_CHUNK_BYTES = 1 << 22
_MERGE_ANEW = "Merge it anew from base and delta"


def verify(folder: Path, seen: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """
    Args:
        folder: a merged folder, a delta, a state, or a run with states and deltas.
        seen: is told of each run of bytes that was read, for a progress bar.

    Returns:
        What was verified: `kind`, `files` and `bytes`.

    Raises:
        JobError: the first file, and tensor, that is not what was written; or none of these.
    """
    refuse_unfinished(folder)
    found: dict[str, list[Path]] = {"merged": [], "delta": [], "state": []}
    for kind, path in parts_of(folder):
        match kind:
            case "merged":
                files = verify_merged(path, seen)
            case "delta":
                read_delta(path)
                files = _files(path)
            case _:
                _verify_state(path)
                files = _files(path)
        if kind != "merged":
            seen(sum(file.stat().st_size for file in files))
        found[kind] += files
    every = [file for files in found.values() for file in files]
    kinds = [kind for kind, files in found.items() if files]
    return {
        "schema_version": 1,
        "folder": str(folder.resolve()),
        "kinds": kinds,
        "files": len(every),
        "bytes": sum(file.stat().st_size for file in every),
    }


def bytes_of(folder: Path) -> int:
    """How many there are to verify, about."""
    refuse_unfinished(folder)
    return sum(file.stat().st_size for _, path in parts_of(folder) for file in _files(path))


def parts_of(folder: Path) -> list[tuple[str, Path]]:
    """Kind and folder of everything there that has digests.

    Raises:
        JobError: nothing has.
    """
    if (folder / CERTIFICATE).is_file():
        return [("merged", folder)]
    if (folder / MANIFEST).is_file():
        return [("delta", folder)]
    if (folder / SUMS).is_file():
        return [("state", folder)]
    deltas = [("delta", folder / name) for name in ("delta", "best") if (folder / name / MANIFEST).is_file()]
    states = [("state", path) for path in states_of(folder / "state")]
    if not deltas and not states:
        raise JobError(
            f"{folder}: has no {CERTIFICATE}, {MANIFEST} or {SUMS}, so there is nothing to verify it by. Name a merged folder, a delta, "
            "a state or a run."
        )
    return deltas + states


def verify_merged(folder: Path, seen: Callable[[int], None] = lambda count: None, workers: int | None = None) -> list[Path]:
    """All files of a merged folder. Returns them.

    Raises:
        JobError: as above.
    """
    certificate = read_certificate(folder)
    result = certificate["result"]
    if base_digest(result["files"]) != result["digest"]:
        raise JobError(f"{folder / CERTIFICATE}: its digest of the whole is not that of its files: it was changed. {_MERGE_ANEW}.")
    files = sorted(result["files"].items())
    side_by_side(files, (), lambda one, _: verify_file(folder / one[0], one[1], certificate["running"][one[0]], seen), workers)
    for name, digest in result["beside"].items():
        file = folder / name
        if not file.is_file():
            raise JobError(f"{file}: is missing, though {CERTIFICATE} names it. Copy the base's, or merge anew.")
        if sha256_of(file) != digest:
            raise JobError(f"{file}: was changed since the merge. Put back what it was, or merge anew from base and delta.")
        seen(file.stat().st_size)
    return [folder / name for name in (*result["files"], *result["beside"])]


def verify_file(file: Path, digest: str, running: list[list[Any]], seen: Callable[[int], None] = lambda count: None) -> None:
    """One weight file.

    Args:
        running: as the certificate has it.

    Raises:
        JobError: naming the first tensor whose bytes are others.
    """
    sha, done = hashlib.sha256(), 0
    try:
        with file.open("rb", buffering=0) as stream:
            for tensor, end, digits in running:
                _take(stream, sha, end - done, seen)
                done = end
                if sha.hexdigest()[: len(digits)] != digits:
                    what = "its header" if tensor == HEADER else f'tensor "{tensor}"'
                    short = f" It ends early, at byte {file.stat().st_size:,}." if file.stat().st_size < end else ""
                    raise JobError(f"{file}: {what} is not what was written: its bytes have another sha256.{short} {_MERGE_ANEW}.")
            _take(stream, sha, file.stat().st_size - done, seen)
    except FileNotFoundError:
        raise JobError(f"{file}: is missing, though {CERTIFICATE} names it. {_MERGE_ANEW}.") from None
    if sha.hexdigest() != digest:
        raise JobError(f"{file}: its sha256 is not that of {CERTIFICATE}, though its tensors are as written. {_MERGE_ANEW}.")


def _take(stream: BinaryIO, sha: Any, count: int, seen: Callable[[int], None]) -> None:
    while count > 0 and (data := stream.read(min(count, _CHUNK_BYTES))):
        sha.update(data)
        seen(len(data))
        count -= len(data)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _verify_state(path: Path) -> None:
    try:
        verify_state(path)
    except Damaged as error:
        raise JobError(f"{error}. The run passes it over for the next older state; remove it, or put it back from a copy.") from None
