"""`zlora logs`: what a run's newest job printed, then what libraries printed on its ranks; or one rank's. Follows it across requeues."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster.queue import listed
from pipeline.cluster.record import events
from pipeline.cluster.standing import newest
from pipeline.job.errors import JobError
from pipeline.job.printable import printable
from pipeline.runs.folder import LOGS, held

_POLL_S = 0.5
_ASK_S = 5.0
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class Log:
    file: Path
    alive: Callable[[], bool]
    """Whether there is more to come; asks the queue."""


def logs_of(run: Path, rank: int | None) -> list[Log]:
    """Which files to show, the most telling first.

    Raises:
        JobError: no such folder, or nothing has been written.
    """
    if not run.is_dir():
        raise JobError(f"{run}: there is no such run folder. Name the one that zlora train or zlora submit wrote.")
    submitted = newest(events(run))

    def alive() -> bool:
        if submitted and (known := listed([submitted.job]).get(submitted.job)) and not known.over:
            return True
        return held(run)

    ranks = sorted((run / LOGS).glob("rank*.txt"), key=lambda file: int(file.stem[4:]) if file.stem[4:].isdigit() else -1)
    if rank is not None:
        return [Log(run / LOGS / f"rank{rank}.txt", alive)]
    batch = [run / submitted.log] if submitted and submitted.log else []
    found = [*batch, *(file for file in ranks if file.stat().st_size)]
    if not found and not submitted and (inside := [path.name for path in sorted(run.iterdir()) if (path / LOGS).is_dir()]):
        raise JobError(f"{run}: is a folder of runs. Name one of them: {', '.join(inside[:3])}{', ...' * (len(inside) > 3)}.")
    if not found:
        raise JobError(
            f"{run}: has no log yet: it was not submitted, and no rank has printed anything. zlora status {run} says how it stands."
        )
    return [Log(file, alive) for file in found]


def text_of(log: Log) -> Iterator[bytes]:
    """The file as it is, piece by piece; none where it is not there yet."""
    try:
        with log.file.open("rb") as opened:
            while piece := opened.read(_CHUNK_BYTES):
                yield piece
    except FileNotFoundError:
        return


def shown(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """As a terminal may have it: what a model or a library wrote must not steer it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        yield printable(decoder.decode(piece), kept="\n\t\r").encode()
    yield decoder.decode(b"", final=True).encode()


def follow(log: Log) -> Iterator[bytes]:
    """The file, and what comes, until nothing comes any more: the job has left the queue, or the local training has ended.

    A file that is not there yet, is cut or is replaced, is begun anew, as tail -F does.
    """
    place, identity, asked, last = 0, None, 0.0, False
    while True:
        try:
            with log.file.open("rb") as opened:
                now = opened.fileno(), log.file.stat()
                if identity != now[1].st_ino or now[1].st_size < place:
                    identity, place = now[1].st_ino, 0
                opened.seek(place)
                while piece := opened.read(_CHUNK_BYTES):
                    place += len(piece)
                    yield piece
        except FileNotFoundError:
            pass
        # Looked once more after the end: what was written between the look and the question.
        if last:
            return
        if time.monotonic() - asked > _ASK_S:
            asked, last = time.monotonic(), not log.alive()
        if not last:
            time.sleep(_POLL_S)
