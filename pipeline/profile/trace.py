"""One step as a trace of operators and kernels, by module, for a browser's trace viewer."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function


@contextmanager
def traced(root: nn.Module, device: torch.device, file: Path | None) -> Iterator[None]:
    """Writes what runs in the block.

    Args:
        file: gzipped JSON; None: nothing is traced.
    """
    if file is None:
        yield
        return
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _named(root), profile(activities=activities) as recorder:
        yield
    plain = file.with_suffix("")
    recorder.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(file, "wb") as target:
        shutil.copyfileobj(source, target)
    plain.unlink()


@contextmanager
def _named(root: nn.Module) -> Iterator[None]:
    """Each module's forward pass is a span of its name."""
    handles, spans = [], []

    def begin(name: str) -> Callable[..., None]:
        def enter(*_: object) -> None:
            spans.append(record_function(name))
            spans[-1].__enter__()

        return enter

    def end(*_: object) -> None:
        spans.pop().__exit__(None, None, None)

    for path, module in root.named_modules():
        name = path.removeprefix("model.") or type(module).__name__
        handles += [module.register_forward_pre_hook(begin(name)), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
