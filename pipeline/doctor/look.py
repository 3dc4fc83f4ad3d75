"""A process of its own that loads the libraries and looks at the GPUs through torch. What it finds goes out as one JSON line.

Of its own, because a library that does not fit may end its process, hang, or print what nobody asked for.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from pipeline.cluster.launch import visible_gpus
from pipeline.doctor.finding import Finding
from pipeline.doctor.gpus import Device, Gpus
from pipeline.doctor.libraries import LOADED, Libraries
from pipeline.plan.hardware import computes_bf16

_PROGRAM = "import sys; sys.path[:] = [p for p in sys.path if p]; from pipeline.doctor.look import tell; tell()"
_LONGEST_S = 300.0


class Look:
    """Runs beside whatever else is looked at."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", _PROGRAM]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )

    def answer(self) -> tuple[Libraries, Gpus] | Finding:
        """What it found; or, if it came to nothing, that."""
        try:
            out, error = self._process.communicate(timeout=_LONGEST_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            repair = "The file system of the environment, or the GPUs' driver (try nvidia-smi), does not answer."
            return Finding("Python and libraries", "libraries", f"not loaded after {_LONGEST_S:.0f} s", "problem", repair)
        if self._process.returncode:
            return _died(self._process.returncode, error)
        return parse(out)

    def end(self) -> None:
        """However it stands."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def _died(code: int, error: str) -> Finding:
    how = f"ended by {signal.Signals(-code).name}" if code < 0 else (error.strip().splitlines() or [f"exit code {code}"])[-1]
    repair = "Two libraries do not fit together. Make the environment anew: make clean, make setup."
    return Finding("Python and libraries", "libraries", f"loading them: {how}", "problem", repair)


def parse(text: str) -> tuple[Libraries, Gpus]:
    """What `tell` wrote."""
    told = json.loads(text)
    libraries, gpus = told["libraries"], told["gpus"]
    devices = tuple(Device(**{**device, "capability": tuple(device["capability"])}) for device in gpus["devices"])
    return (
        Libraries(**{**libraries, "required": tuple(libraries["required"]), "compiled": tuple(libraries["compiled"])}),
        Gpus(**{**gpus, "built": tuple(gpus["built"]), "devices": devices}),
    )


def tell() -> None:
    """In that process: everything, as one line."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What libraries say is of interest only where they end the process.
    os.dup2(2, 1)
    begun, broken = time.perf_counter(), {}
    for name in LOADED:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    required = _required()
    libraries = Libraries(
        platform.python_version(), required, _versions(required), broken, *_compiled(), load_s=time.perf_counter() - begun
    )
    print(json.dumps({"libraries": asdict(libraries), "gpus": asdict(_gpus("torch" in broken))}), file=out, flush=True)
    # Not the interpreter's own end: a driver's threads may not come to one.
    os._exit(0)


def _required() -> tuple[str, ...]:
    try:
        return tuple(line for line in requires("zlora") or () if "extra ==" not in line)
    except PackageNotFoundError:
        return LOADED


def _versions(required: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for line in required:
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _compiled() -> tuple[tuple[str, ...], str]:
    try:
        from deepspeed.git_version_info import installed_ops, torch_info
    except Exception:
        return (), ""
    names = tuple(name for name, there in installed_ops.items() if there)
    return names, str(torch_info["version"]) if names else ""


def _gpus(without_torch: bool) -> Gpus:
    file = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text(encoding="utf-8")) if file.exists() else None
    seen = (visible_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), driver[0] if driver else "")
    if without_torch:
        return Gpus(*seen, torch="", cuda=None, built=(), unusable="", devices=(), nccl=None, cpu_failed="", gloo=False)
    import torch

    unusable, devices = "", []
    if seen[0] and torch.version.cuda:
        try:
            torch.cuda.init()
            devices = [_device(torch, place) for place in range(torch.cuda.device_count())]
        except Exception as error:
            unusable = _first_line(error)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda and torch.distributed.is_nccl_available() else None
    built = tuple(torch.cuda.get_arch_list()) if devices else ()
    on_cpu = _failed(torch, torch.device("cpu"), bf16=True)
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    return Gpus(*seen, torch.__version__, torch.version.cuda, built, unusable, tuple(devices), nccl, on_cpu, gloo)


def _device(torch: Any, place: int) -> Device:
    properties = torch.cuda.get_device_properties(place)
    capability = (properties.major, properties.minor)
    failed = _failed(torch, torch.device("cuda", place), computes_bf16(capability))
    try:
        free, total = torch.cuda.mem_get_info(place)
    except Exception as error:
        return Device(properties.name, capability, properties.total_memory, 0, _first_line(error))
    return Device(properties.name, capability, total, free, failed)


def _failed(torch: Any, device: Any, bf16: bool) -> str:
    """What a matrix product on a device says that does not work there."""
    try:
        for dtype in (torch.float32, torch.float16, *((torch.bfloat16,) if bf16 else ())):
            ones = torch.ones(64, 64, dtype=dtype, device=device)
            if float((ones @ ones).float().sum()) != 64.0**3:
                return f"a matrix product in {dtype} is wrong"
    except Exception as error:
        return _first_line(error)
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
