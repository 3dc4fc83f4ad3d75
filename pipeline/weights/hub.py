"""A name -> a folder here: the folder itself, or the hub's files through its own cache. The one place that talks to the hub. No torch.

Only what is needed is fetched: of a base the safetensors that its index names, its config and its tokenizer.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.job.errors import JobError
from pipeline.job.files import known_base
from pipeline.weights.unfinished import refuse_unfinished

Kind = Literal["model", "dataset"]
Bar = Callable[[int, Callable[[], int]], AbstractContextManager[None]]
"""(bytes to come, function that says how many have come) -> shown while the block runs."""
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
_WORDS: dict[Kind, str] = {"model": "base", "dataset": "data set"}
_BESIDE = (
    *("config.json", "generation_config.json", INDEX_NAME, "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.model", "tekken.json", "chat_template*", "additional_chat_templates/*"),
)
_ANSWER_S = 10.0
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".safetensors")


@dataclass(frozen=True)
class Fetched:
    """What is here now."""

    name: str
    folder: Path
    commit: str | None
    """None: a folder of the user's."""
    files: int
    bytes: int
    new_bytes: int
    """Of these, fetched just now."""


def local_base(model: str, revision: str | None) -> Path:
    """The folder of a base; fetches it where it is a hub id that is not cached yet. What is cached stays as it is until `zlora fetch`.

    Raises:
        JobError: no such folder, and the hub does not give it.
    """
    return fetch_base(model, revision).folder


def local_tokenizer(model: str, revision: str | None) -> Path:
    """The same folder for whoever needs config and tokenizer only: no weights are fetched.

    Raises:
        JobError: as above.
    """
    return _without_weights(model, revision).folder


def local_config(model: str, revision: str | None) -> Path:
    """A folder with the base's config.json, for whoever needs its shape only; the paper's bases are here without a network.

    Raises:
        JobError: as above.
    """
    if Path(model).is_dir():
        return Path(model)
    known = known_base(model) if revision is None else None
    return known or fetch(model, revision, "model", ("config.json",), ("config.json",)).folder


def model_type_of(base: str, revision: str | None) -> str | None:
    """From its config.json; None where that is not to be had."""
    try:
        found = json.loads((local_config(base, revision) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (JobError, OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def fetch_base(model: str, revision: str | None, bar: Bar | None = None) -> Fetched:
    """The same, and what was fetched.

    Raises:
        JobError: as above; with `bar`, also a disk that has no room for it.
    """
    beside = _without_weights(model, revision, bar)
    if beside.commit is None:
        return beside
    # By its commit: a branch may move between the two.
    names = weight_names(beside.folder)
    weights = fetch(model, beside.commit, "model", names, names, bar)
    if not weights.files:
        raise JobError(_without_safetensors(model, beside.commit))
    return Fetched(
        model,
        beside.folder,
        beside.commit,
        beside.files + weights.files,
        beside.bytes + weights.bytes,
        beside.new_bytes + weights.new_bytes,
    )


def _without_weights(model: str, revision: str | None, bar: Bar | None = None) -> Fetched:
    if Path(model).is_dir():
        refuse_unfinished(Path(model))
        files = [path for path in Path(model).iterdir() if path.is_file()]
        return Fetched(model, Path(model), None, len(files), sum(file.stat().st_size for file in files), 0)
    if Path(model).is_absolute() or model.startswith("."):
        raise JobError(f'base "{model}": no such folder. Correct the path.')
    return fetch(model, revision, "model", _BESIDE, ("config.json",), bar)


def fetch(
    name: str, revision: str | None, kind: Kind, patterns: tuple[str, ...], needed: tuple[str, ...] = (), bar: Bar | None = None
) -> Fetched:
    """The files of a repository that match. What the cache has whole is taken from there, and nobody is asked.

    Args:
        needed: files without which the cache's copy does not count.
        bar: shows progress; with it the hub is asked whether there is something newer, and for sizes.

    Raises:
        JobError: the hub does not give them; the disk has no room for them.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # What a person sees of it is our business.
    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / repo_folder_name(repo_id=name, repo_type=kind) / "blobs"
    asked: dict[str, Any] = {"repo_id": name, "repo_type": kind, "revision": revision, "allow_patterns": list(patterns)}
    with _explained(name, revision, kind):
        # A commit never changes; a branch may have moved.
        folder = _cached(asked, needed) if bar is None or re.fullmatch("[0-9a-f]{40}", revision or "") else None
        new_bytes = 0
        try:
            if folder is None:
                # `snapshot_download` asks the same, and would wait for ever where a firewall swallows the question.
                HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=_ANSWER_S)
        except HfHubHTTPError:
            raise
        except Exception:  # out of reach: of the HTTP library, whichever huggingface_hub has
            if (folder := _cached(asked, needed)) is None:
                raise
        if folder is None:
            if bar:
                new_bytes = sum(file.file_size or 0 for file in snapshot_download(**asked, dry_run=True) if file.will_download)
            _refuse_full(cache, name, kind, new_bytes)
            before = _size(blobs)
            with bar(new_bytes, lambda: _size(blobs) - before) if bar and new_bytes else nullcontext():
                folder = Path(snapshot_download(**asked))
    files = {path for pattern in patterns for path in folder.glob(f"**/{pattern}" if kind == "dataset" else pattern) if path.is_file()}
    return Fetched(name, folder, folder.name, len(files), sum(file.stat().st_size for file in files), new_bytes)


def _cached(asked: dict[str, Any], needed: tuple[str, ...]) -> Path | None:
    """The cache's copy, if it is whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(**asked, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if all((folder / file).is_file() for file in needed) else None


def weight_names(folder: Path) -> tuple[str, ...]:
    index = folder / INDEX_NAME
    if not index.is_file():
        return (SINGLE_NAME,)
    try:
        return tuple(sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JobError(f"{index}: not a valid safetensors index ({error!r}). Fetch the file again.") from None


def _without_safetensors(model: str, commit: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(model, revision=commit)
    except Exception:  # only for a better message
        files = []
    others = sorted(name for name in files if name.endswith(_OTHER_WEIGHTS))
    found = f", only {', '.join(others[:3])}" if others else ""
    return (
        f'base "{model}": has no {SINGLE_NAME} on the hub{found}. Convert it: '
        f'AutoModelForCausalLM.from_pretrained("{model}").save_pretrained("FOLDER"), the same with its tokenizer, and name FOLDER.'
    )


def _refuse_full(cache: Path, name: str, kind: Kind, needed: int) -> None:
    place = next(path for path in (cache, *cache.parents) if path.exists())
    if needed > (free := shutil.disk_usage(place).free):
        raise JobError(
            f'{_WORDS[kind]} "{name}": {needed:,} bytes to fetch, and {free:,} are free at {cache}. '
            "Make room, or set HF_HOME to a folder on another disk."
        )


def _size(folder: Path) -> int:
    total = 0
    if folder.is_dir():
        for entry in os.scandir(folder):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue  # renamed meanwhile
    return total


@contextmanager
def _explained(name: str, revision: str | None, kind: Kind) -> Iterator[None]:
    """Whatever the hub or the way to it refuses, as one line with its repair; never with a token or a signed address in it."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    what, page = f'{_WORDS[kind]} "{name}"', f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
    sign_in = "sign in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except hub.GatedRepoError:
        raise JobError(f"{what}: gated. Accept its licence on {_clean(page)}, {sign_in}, then run again.") from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        where = "neither a folder here nor a model on the hub" if kind == "model" else "not on the hub"
        raise JobError(f"{what}: {where} ({_reason(error)}). Correct the name; if it is private, {sign_in}.") from None
    except hub.RevisionNotFoundError:
        raise JobError(f'{what}: has no revision "{revision}" on the hub. Correct it, or leave it out.') from None
    except hub.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise JobError(f"{what}: the hub does not accept the token here ({_reason(error)}). Renew it: {sign_in}.") from None
        raise JobError(f"{what}: the hub does not give it ({_reason(error)}). Run again later; what is here already stays.") from None
    except OSError as error:
        if error.errno is not None and not isinstance(error, ConnectionError | TimeoutError | FileNotFoundError):
            raise  # of the disk
        raise JobError(_out_of_reach(what, error)) from None
    except JobError:
        raise
    except Exception as error:  # of the HTTP library, whichever huggingface_hub has
        raise JobError(_out_of_reach(what, error)) from None


def _out_of_reach(what: str, error: Exception) -> str:
    return (
        f"{what}: not, or not all of it, in the cache here, and the hub cannot be reached ({_reason(error)}). "
        "Fetch it where there is a network: zlora fetch JOB."
    )


def _reason(error: Exception) -> str:
    return _clean((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def _clean(text: str) -> str:
    """Without what may give access: the query of an address, a name and password in it, a token."""
    return re.sub(r"hf_\w+", "hf_...", re.sub(r"\?\S+", "", re.sub(r"://[^/\s@]+@", "://", text)))
