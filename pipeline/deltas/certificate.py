"""`merge.json`, the certificate of a merged folder: what went in, what came out, and what rounding made of it.

base, deltas     paths, digests, weights and manifests of what went in
dtype            asked for; null: the base's
result           `files`: sha256 of each weight file; `digest` of them all, as a base's; `beside`: sha256 of the other files
tensors          of each tensor that a delta changes, what `Rounding` says
converted        of each other tensor that has another dtype than in the base, the same
running          of each weight file, sha256 (its first 16 digits) of all bytes up to the end of the header, and of each tensor
logits           merged and unmerged model compared; null: not asked
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.deltas.beside import CERTIFICATE
from pipeline.deltas.mixture import Mixture
from pipeline.deltas.pieces import Rounding
from pipeline.job.errors import JobError
from pipeline.weights.digest import base_digest, sha256_of
from pipeline.weights.parse import plain_name, read_json

SCHEMA_VERSION = 2
_RUNNING_DIGITS = 16
HEADER = ""
"""Stands for the header where tensors are named."""


@dataclass
class Sums:
    """Of one file of the result, while its bytes go by."""

    sha: Any = field(default_factory=hashlib.sha256)
    length: int = 0
    """Bytes so far."""
    running: list[list[Any]] = field(default_factory=list)
    """Tensor, byte behind it, digits."""
    tensors: dict[str, Rounding] = field(default_factory=dict)

    def take(self, data: bytes | memoryview) -> None:
        self.sha.update(data)
        self.length += len(data)

    def end(self, tensor: str) -> None:
        self.running.append([tensor, self.length, self.sha.hexdigest()[:_RUNNING_DIGITS]])

    def row(self) -> dict[str, Any]:
        return {
            "sha256": self.sha.hexdigest(),
            "running": self.running,
            "tensors": {name: asdict(rounding) for name, rounding in self.tensors.items()},
        }


def certificate_of(
    mixture: Mixture, rows: dict[str, dict[str, Any]], beside: dict[str, str], logits: dict[str, Any] | None
) -> dict[str, Any]:
    """
    Args:
        rows: of each weight file, what its `Sums` say.
        beside: sha256 of each other file.
    """
    files = {name: row["sha256"] for name, row in rows.items()}
    rounded = {name: rounding for row in rows.values() for name, rounding in row["tensors"].items()}
    return {
        "schema_version": SCHEMA_VERSION,
        "base": {"path": str(mixture.base.resolve()), "digest": base_digest(mixture.digests), "files": mixture.digests},
        "deltas": [
            {
                "path": str(one.folder.resolve()),
                "weight": one.weight,
                "sha256": one.stored.manifest.sha256,
                "manifest": asdict(one.stored.manifest),
            }
            for one in mixture.shares
        ],
        "dtype": mixture.dtype,
        "result": {"digest": base_digest(files), "files": files, "beside": beside},
        "tensors": {name: rounding for name, rounding in rounded.items() if name in mixture.changes},
        "converted": {name: rounding for name, rounding in rounded.items() if name not in mixture.changes},
        "running": {name: row["running"] for name, row in rows.items()},
        "logits": logits,
    }


def beside_digests(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """sha256 of each file that is neither one of the weights nor the certificate."""
    others = (file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in (*files, CERTIFICATE))
    return {file.name: sha256_of(file) for file in others}


def read_certificate(folder: Path) -> dict[str, Any]:
    """Raises:
    JobError: there is none, or it cannot be read."""
    file = folder / CERTIFICATE
    if not file.is_file():
        raise JobError(f"{folder}: no {CERTIFICATE} here, so this is not a folder that zlora merge wrote. Name one that is.")
    try:
        certificate = read_json(file)
        if certificate["schema_version"] != SCHEMA_VERSION:
            raise JobError(f"{file}: schema_version {certificate['schema_version']}; this zlora reads {SCHEMA_VERSION}. Merge anew.")
        if not _sound(certificate):
            raise ValueError("not of the form of a certificate")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{file}: cannot be read ({error!r}). The certificate is damaged; merge anew from base and delta.") from None
    return certificate


def _sound(certificate: dict[str, Any]) -> bool:
    """What is read of it has the form that was written, and every name is of a file in the folder."""
    result, running = certificate["result"], certificate["running"]
    names: Sequence[Any] = [*result["files"], *result["beside"]]
    return (
        all(plain_name(name) for name in names)
        and all(
            isinstance(digest, str) for digest in (*result["files"].values(), *result["beside"].values(), certificate["base"]["digest"])
        )
        and running.keys() == result["files"].keys()
        and all(
            isinstance(name, str) and isinstance(end, int) and not isinstance(end, bool) and isinstance(digits, str)
            for rows in running.values()
            for name, end, digits in rows
        )
        and all(a[1] <= b[1] and a[1] >= 0 for rows in running.values() for a, b in pairwise(rows))
        and isinstance(certificate["tensors"], dict)
        and isinstance(certificate["converted"], dict)
        and certificate["dtype"] in (None, "fp32", "bf16", "fp16")
        and isinstance(certificate["deltas"], list)
    )
