"""Deltas of every form that merges, for tiny bases: written as training writes them, without training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM

from pipeline.weights.delta import head_key, keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.index import open_checkpoint
from pipeline.weights.manifest import ADDED_EMBEDDINGS, ADDED_HEAD, Added, Head, Module, Replaced
from tests.bases import VOCABULARY
from tests.families import make_encoder_tokenizer


def make_delta(
    base: Path,
    folder: Path,
    seed: int = 0,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    replaced: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
    tokens: tuple[str, ...] = (),
    scale: float = 0.3,
) -> Path:
    """A random delta for a base that `tests.bases.make_llama` made."""
    checkpoint = open_checkpoint(base)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    modules, tensors = [], {}
    for name, entry in checkpoint.entries.items():
        if name.endswith(tuple(f"{target}.weight" for target in targets)):
            module = Module(name.removesuffix(".weight"), name, False, 2, 4.0)
            a, b = keys_of(module.name)
            tensors[a], tensors[b] = draw(2, entry.shape[1]), draw(entry.shape[0], 2)
            modules.append(module)
    for name in replaced:
        tensors[name] = draw(*checkpoint.entries[name].shape)
    head = added = None
    width = checkpoint.entries["model.norm.weight"].shape[0]
    if labels:
        head = Head(labels, "LlamaForSequenceClassification")
        tensors[head_key("score.weight")] = draw(len(labels), width)
    if tokens:
        rows = {ADDED_EMBEDDINGS: ("model.embed_tokens.weight",), ADDED_HEAD: ("lm_head.weight",)}
        known = len(AutoTokenizer.from_pretrained(base))
        added = Added(tokens, tuple(range(known, known + len(tokens))), rows)
        tensors |= {name: draw(len(tokens), width) for name in rows}
    digests = file_digests(checkpoint.files)
    manifest = {
        "base": str(base),
        "base_digest": base_digest(digests),
        "base_files": digests,
        "job_digest": "",
        "step": 1,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "modules": tuple(modules),
        "replaced": tuple(Replaced(name, (name,)) for name in replaced),
        "head": head,
        "added": added,
    }
    write_delta(folder, tensors, None, manifest)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the certificate, which names paths."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "merge.json"}


@pytest.fixture(scope="session")
def deltas(llama_base, tmp_path_factory) -> dict[str, Path]:
    """Deltas of one base, by what they change."""
    place = tmp_path_factory.mktemp("deltas")
    norms = ("model.norm.weight", "model.layers.0.input_layernorm.weight")
    return {
        "qv": make_delta(llama_base, place / "qv", 1),
        "mlp": make_delta(llama_base, place / "mlp", 2, ("q_proj", "up_proj", "down_proj")),
        "norms": make_delta(llama_base, place / "norms", 3, ("o_proj",), norms),
        "norms2": make_delta(llama_base, place / "norms2", 4, (), norms),
        "labels": make_delta(llama_base, place / "labels", 5, labels=("no", "yes", "perhaps")),
        "tokens": make_delta(llama_base, place / "tokens", 6, tokens=tuple(f"<{number}>" for number in range(16))),
    }


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A folder in main memory, where there is one: for tests whose time would go into waiting for the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="zlora-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def copied(llama_base, tmp_path) -> Path:
    """A copy of the base that a test may damage."""
    shutil.copytree(llama_base, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="session")
def roberta_shaped(tmp_path_factory):
    """Width and layers of RoBERTa base, with a language head as on the hub; vocabulary and MLP, which are not adapted, are small."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCABULARY, intermediate_size=64, max_position_embeddings=66, type_vocab_size=1, initializer_range=0.1
    )
    assert (config.hidden_size, config.num_hidden_layers) == (768, 12)
    folder = tmp_path_factory.mktemp("roberta")
    RobertaForMaskedLM(config).save_pretrained(folder)
    make_encoder_tokenizer(folder, "roberta")
    return folder
