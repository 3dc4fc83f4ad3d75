"""The GPUs: whether torch can use what the driver shows, has kernels for it, and computes there in bf16 and fp16. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.doctor.finding import Finding, Group
from pipeline.plan.hardware import GIB, computes_bf16, without_kernels

_GROUP: Group = "GPUs"
_OTHERS_BYTES = 2 * GIB
"""Held on a GPU beside this process: more than a context and a display take."""
_ANOTHER_BUILD = 'make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu126"'


@dataclass(frozen=True)
class Device:
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    free_bytes: int
    failed: str
    """What a matrix product said that did not work there; empty: it worked."""


@dataclass(frozen=True)
class Gpus:
    """What the driver shows, and what torch makes of it."""

    shown: int
    """By the driver, or by CUDA_VISIBLE_DEVICES where that is set."""
    hidden: str | None
    """CUDA_VISIBLE_DEVICES."""
    driver: str
    """Its version; empty: there is none."""
    torch: str
    """Its version; empty: it does not load."""
    cuda: str | None
    """That torch was built with; None: a build for the CPU."""
    built: tuple[str, ...]
    """Architectures that torch has kernels for."""
    unusable: str
    """Why torch can use none of them; empty: it can."""
    devices: tuple[Device, ...]
    nccl: str | None
    cpu_failed: str
    """As of a device."""
    gloo: bool

    @property
    def usable(self) -> int:
        return sum(not device.failed and _kernels(self, device) is None for device in self.devices)


def judge_gpus(found: Gpus) -> list[Finding]:
    """Nothing is wrong with a machine without GPUs: its ranks are on the CPU."""
    if not found.shown:
        where = f"none: CUDA_VISIBLE_DEVICES={found.hidden} shows none" if found.hidden is not None and found.driver else "none here"
        return [Finding(_GROUP, "GPUs", f"{where}; ranks compute on the CPU"), *(_on_the_cpu(found) if found.torch else [])]
    if not found.torch:
        return [Finding(_GROUP, "GPUs", f"{found.shown} shown, driver {found.driver or 'none'}; torch does not load")]
    if found.unusable or not found.devices:
        return [_unusable(found)]
    names = Counter(f"{device.name} ({device.memory_bytes / GIB:.0f} GiB)" for device in found.devices)
    value = f"{', '.join(f'{count} x {name}' for name, count in names.items())}; driver {found.driver}, CUDA {found.cuda}"
    fewer = len(found.devices) < found.shown
    findings = [
        Finding(_GROUP, "GPUs", value)
        if not fewer
        else Finding(
            _GROUP,
            "GPUs",
            f"torch sees {value}; {found.shown} are shown",
            "problem",
            "nvidia-smi names the GPU that is lost; restart the node or leave it out: CUDA_VISIBLE_DEVICES=0,1,...",
        ),
        *_computing(found),
    ]
    return [*findings, _busy(found), *_nccl(found)]


def _on_the_cpu(found: Gpus) -> list[Finding]:
    another = "Install one of torch's own builds: make setup TORCH=..."
    computes = Finding(_GROUP, "bf16, fp16", "the CPU computes in both")
    if found.cpu_failed:
        computes = Finding(_GROUP, "bf16, fp16", found.cpu_failed, "problem", another)
    if not found.gloo:
        return [computes, Finding(_GROUP, "NCCL", f"not needed, but torch {found.torch} has no gloo for CPU ranks", "problem", another)]
    return [computes, Finding(_GROUP, "NCCL", "not needed: CPU ranks talk by gloo")]


def _unusable(found: Gpus) -> Finding:
    if found.cuda is None:
        value = f"{found.shown} shown, but torch {found.torch} is a build for the CPU"
        return Finding(_GROUP, "GPUs", value, "problem", f"Install a build for GPUs: {_ANOTHER_BUILD}, or cu130 for A100 and later.")
    why = found.unusable or "it does not say why"
    value = f"{found.shown} shown, driver {found.driver or 'none'}, but torch {found.torch} can use none: {why}"
    repair = (
        f"torch was built for CUDA {found.cuda}. Where nvidia-smi shows an older CUDA version, install a build for that one "
        f"({_ANOTHER_BUILD}) or a newer driver; in a container, start it with --gpus all (--nv)."
    )
    return Finding(_GROUP, "GPUs", value, "problem", repair)


def _computing(found: Gpus) -> list[Finding]:
    """Kernels, bf16, fp16: of all GPUs, by what is wrong with the first one."""
    for device in found.devices:
        if problem := _kernels(found, device):
            value, _, repair = problem.partition(". ")
            return [Finding(_GROUP, "kernels", value, "problem", repair)]
        if device.failed:
            repair = "nvidia-smi -q shows errors of its memory; leave it out with CUDA_VISIBLE_DEVICES, and tell the administrator."
            return [Finding(_GROUP, "kernels", f"{device.name}: {device.failed}", "problem", repair)]
    chips = ", ".join(sorted({f"sm_{major}{minor}" for major, minor in (device.capability for device in found.devices)}))
    without = {device.name for device in found.devices if not computes_bf16(device.capability)}
    bf16 = f"no: {', '.join(sorted(without))}" if without else "yes"
    repair = 'Use base.dtype = "fp16" there (loss scaling is automatic); "bf16" is refused.' if without else ""
    return [
        Finding(_GROUP, "kernels", f"torch {found.torch} has them for {chips}"),
        Finding(_GROUP, "fp16", "yes"),
        Finding(_GROUP, "bf16", bf16, "warning" if without else "good", repair),
    ]


def _busy(found: Gpus) -> Finding:
    held = {place: device.memory_bytes - device.free_bytes for place, device in enumerate(found.devices)}
    if busy := {place: count for place, count in held.items() if count > _OTHERS_BYTES}:
        value = ", ".join(f"{count / GIB:.0f} GiB of GPU {place}" for place, count in busy.items())
        repair = "nvidia-smi shows whose processes those are. End them, or choose other GPUs with CUDA_VISIBLE_DEVICES."
        return Finding(_GROUP, "memory", f"others hold {value}", "warning", repair)
    return Finding(_GROUP, "memory", "free")


def _nccl(found: Gpus) -> list[Finding]:
    if found.nccl:
        return [Finding(_GROUP, "NCCL", found.nccl)]
    repair = f"Ranks on GPUs talk by NCCL. Install one of torch's own builds: {_ANOTHER_BUILD}."
    return [Finding(_GROUP, "NCCL", f"torch {found.torch} was built without it", "problem", repair)]


def _kernels(found: Gpus, device: Device) -> str | None:
    return without_kernels(device.name, device.capability, found.built, found.torch)
