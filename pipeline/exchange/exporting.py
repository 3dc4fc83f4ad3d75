"""`zlora export`: a delta, and its base or run where a form needs them -> a folder that other tools read; what vLLM would say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pipeline.deltas.card import card, hub_id
from pipeline.deltas.dense import DENSE, write_dense
from pipeline.deltas.export import put_peft, refuse_inexpressible, write_loralib, write_peft
from pipeline.deltas.mixture import mix
from pipeline.deltas.origin import origin_of
from pipeline.deltas.product import made_of
from pipeline.job.errors import JobError
from pipeline.job.task import titled
from pipeline.plan.vllm import Served, Verdict, judge
from pipeline.tasks.open import hub_copies, sources_of
from pipeline.weights.atomic import new_folder, refuse_filled, write_text
from pipeline.weights.delta import read_delta
from pipeline.weights.hub import local_base, model_type_of
from pipeline.weights.manifest import Manifest, delta_folder, read_manifest

SCHEMA_VERSION = 1
Form = Literal["peft", "loralib", "dense", "hub"]
CARD = "README.md"


def export(given: Path, form: Form, out: Path, base: str | None, revision: str | None) -> dict[str, Any]:
    """Writes the folder.

    Args:
        base: of the delta, for the dense difference.

    Returns:
        What was written.

    Raises:
        JobError: what the form cannot express, no base where it is needed; `out` is there already.
    """
    refuse_filled(out)
    folder = delta_folder(given)
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "delta": str(folder.resolve()), "format": form, "out": str(out.resolve())}
    if form == "dense":
        if base is None:
            raise JobError(f"{folder}: a difference is to the base's own tensors. Give --base.")
        write_dense(mix(local_base(base, revision), [(folder, 1.0)]), out)
        return found | {"files": [DENSE]}
    stored = read_delta(folder)
    match form:
        case "peft":
            write_peft(stored, folder, out)
        case "loralib":
            found["settings"] = write_loralib(stored, folder, out)
        case "hub":
            refuse_inexpressible(stored, folder, "PEFT's LoRA")
            origin = origin_of(folder, stored.manifest)
            tasks = sources_of(origin.job.task) if origin.job else ()
            copies = {titled(task): copy.name for task in tasks for copy in hub_copies(task)}
            with new_folder(out) as partial:
                put_peft(stored, partial, hub_id(stored.manifest.base) or Path(stored.manifest.base).name)
                write_text(partial / CARD, card(out.name, stored.manifest, origin, copies, made_of(folder)))
    return found | {"files": sorted(file.name for file in out.iterdir())}


def check_vllm(given: Path, base: str | None, revision: str | None) -> Verdict:
    """What vLLM would say of a delta. Neither vLLM nor a model is needed."""
    manifest = read_manifest(delta_folder(given))
    return judge(_served(manifest, model_type_of(base or manifest.base, revision)))


def _served(manifest: Manifest, model_type: str | None) -> Served:
    others = [str(method.get("kind")) for method in manifest.methods if method.get("kind") != "lora"]
    if not others and manifest.replaced:
        others = ["parameters of the base"]
    # Of the same alpha / rank, as far as dividing and multiplying keep it.
    scales = tuple(float(f"{module.alpha / module.rank:.9g}") for module in manifest.modules)
    ranks = tuple(module.rank for module in manifest.modules)
    return Served(model_type, tuple(others), ranks, scales, manifest.head is not None, manifest.added is not None)
