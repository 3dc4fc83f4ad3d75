"""A base's name -> a folder here: the folder itself, or the hub's files through its own cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.job.errors import JobError

_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def local_base(model: str, revision: str | None) -> Path:
    """The folder of a base; fetches it where it is a hub id that is not cached yet.

    Raises:
        JobError: no such folder, and the hub does not give it.
    """
    if Path(model).is_dir():
        return Path(model)
    if Path(model).is_absolute() or model.startswith("."):
        raise JobError(f'base "{model}": no such folder. Correct the path.')
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_WANTED))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise JobError(f'base "{model}": neither a folder here nor a model on the hub ({_first_line(error)}). Correct the name.') from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise JobError(
            f'base "{model}": not in the cache here, and the hub cannot be reached ({_first_line(error)}). '
            "Fetch it where there is a network, or name a folder."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
