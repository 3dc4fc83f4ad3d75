"""Python and the libraries: which versions there are, whether they load, and whether they are what zlora was made for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.requirements import Requirement

from pipeline.doctor.finding import Finding, Group

_GROUP: Group = "Python and libraries"
LOADED = ("torch", "deepspeed", "transformers")
_OLDEST = (3, 10)
_SLOW_S = 30.0
"""From a local disk the three load in 3 s; thousands of small files on a slow file server take minutes, for each rank."""


@dataclass(frozen=True)
class Libraries:
    """What a process of its own found."""

    python: str
    """Its version."""
    required: tuple[str, ...]
    """Requirements of zlora's, as its pyproject.toml has them."""
    versions: dict[str, str]
    """Package -> version, of those that are installed."""
    broken: dict[str, str]
    """Package -> why it cannot be loaded."""
    compiled: tuple[str, ...]
    """Parts of DeepSpeed that were compiled when it was installed."""
    compiled_for: str
    """The torch that they were compiled with; empty where there are none."""
    load_s: float


def judge_libraries(found: Libraries) -> list[Finding]:
    """One finding for each of the libraries that a rank loads, one for all the others."""
    first: dict[str, Finding] = {}
    rest = []
    for line in found.required:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        one = _library(found, requirement)
        if requirement.name in LOADED:
            first[requirement.name] = one
        else:
            rest.append(one)
    wrong = [finding for finding in rest if finding.state != "good"]
    others = wrong or [Finding(_GROUP, "other libraries", f"{len(rest)}, as required")]
    return [_python(found), *(first[name] for name in LOADED if name in first), _compiled(found), *others]


def _python(found: Libraries) -> Finding:
    value = f"{found.python}; libraries loaded in {found.load_s:.1f} s"
    if tuple(int(part) for part in found.python.split(".")[:2]) < _OLDEST:
        return Finding(_GROUP, "python", found.python, "problem", "zlora needs Python 3.10 or later: make setup PYTHON=python3.12.")
    if found.load_s > _SLOW_S:
        repair = "Every rank waits so long at its start. Put the environment on a disk of the node, or into a container image."
        return Finding(_GROUP, "python", value, "warning", repair)
    return Finding(_GROUP, "python", value)


def _library(found: Libraries, requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    install = f'Install it: pip install "{name}{wanted}".'
    if (version := found.versions.get(name)) is None:
        return Finding(_GROUP, name, "not installed", "problem", install)
    if why := found.broken.get(name):
        repair = f"Install it again in its own environment (make setup, or pip install --force-reinstall {name}), and see that it loads."
        return Finding(_GROUP, name, f"{version}, does not load: {why}", "problem", repair)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(_GROUP, name, f"{version}, but zlora needs {wanted}", "problem", install)
    return Finding(_GROUP, name, version)


def _compiled(found: Libraries) -> Finding:
    name = "DeepSpeed's parts"
    if not found.compiled:
        return Finding(_GROUP, name, "none compiled; zlora calls none of them")
    value = f"{', '.join(found.compiled)}, compiled for torch {found.compiled_for}"
    if _short(found.compiled_for) != _short(found.versions.get("torch", "")):
        repair = "Parts of another torch can crash when they load; zlora needs none. Install DeepSpeed again without DS_BUILD_* set."
        return Finding(_GROUP, name, value, "warning", repair)
    return Finding(_GROUP, name, value)


def _short(version: str) -> str:
    """Major and minor: what a compiled part is made for."""
    return ".".join(version.split("+")[0].split(".")[:2])
