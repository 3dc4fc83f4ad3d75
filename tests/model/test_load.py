"""The sharded base is transformers' base, bit for bit; a rank reads its share and nothing else; what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from pathlib import Path

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pipeline.job.errors import JobError
from pipeline.job.read import read_job
from pipeline.job.zero import deepspeed_config
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.load import LoadedBase, load_base
from pipeline.model.zero3 import Partitioner, shard_bytes
from pipeline.runs.session import open_session
from pipeline.screen import Screen
from pipeline.tasks.batch import collate
from pipeline.train.engine import Engine
from tests.bases import VOCABULARY, make_gpt2, make_llama
from tests.tasks.making import learnt_from
from tests.training import write_job

CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
ZERO0, ZERO3 = (deepspeed_config(CONFIGS / name) for name in ("zero0.json", "zero3.json"))
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BASES = ("gpt2", "gpt2_hub_names", "gpt2_head_stored_too", "llama", "llama_tied", "llama_stored_under_head", "llama_bf16")
POOLS = ("ranks2", "ranks3")


@pytest.fixture(scope="module")
def base(request, tmp_path_factory, gpt2_base, llama_base):
    """Makes a base by name, once."""
    made = {"gpt2": gpt2_base, "llama": llama_base}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = _make(name, tmp_path_factory.mktemp("base") / name)
        return made[name]

    return make


def _make(name: str, folder: Path) -> Path:
    match name:
        case "gpt2_hub_names":
            make_gpt2(folder)
            tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
            for layer in range(3):
                tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
                tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
            assert "wte.weight" in tensors
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        case "gpt2_head_stored_too":
            make_gpt2(folder)
            change(folder, lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()})
        case "llama_tied":
            make_llama(folder, tie_word_embeddings=True)
        case "llama_stored_under_head":
            make_llama(folder, tie_word_embeddings=True)
            one_file(folder)
            change(folder, lambda tensors: {"lm_head.weight": tensors.pop("model.embed_tokens.weight"), **tensors})
        case "llama_bf16":
            make_llama(folder)
            one_file(folder)
            change(folder, lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    return folder


def change(folder: Path, how) -> Path:
    save_file(how(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def one_file(folder: Path) -> None:
    """Puts the shards of a small base together."""
    index = folder / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values())
    tensors = {key: tensor for file in files for key, tensor in load_file(folder / file).items()}
    for file in (index, *(folder / file for file in files)):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().copy()


def theirs(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every parameter as transformers loads it, tied ones under all their names."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def load(folder: Path, dtype: torch.dtype, zero: dict) -> LoadedBase:
    return load_base(Path(folder), read_config(Path(folder)), dtype, CPU, zero)


# On ranks.


def gathered(ranks, folder, dtype):
    """Of every rank: all parameters gathered, this rank's shards, and what was counted."""
    base = load(folder, DTYPES[dtype], ZERO3)
    parameters = dict(base.model.named_parameters(remove_duplicate=False))
    whole = {}
    for name, parameter in parameters.items():
        assert parameter.numel() == 0, "a frozen parameter must start without data"
        with deepspeed.zero.GatheredParameters([parameter]):
            whole[name] = (tuple(parameter.shape), bits(parameter))
    shards = {name: bits(parameter.ds_tensor) for name, parameter in base.model.named_parameters()}
    return {
        "whole": whole,
        "shards": shards,
        "shard_bytes": shard_bytes(base.model),
        "read": base.bytes_read,
        "parameters": base.parameters,
    }


class Seen(TorchDispatchMode):
    """Counts collectives where torch dispatches them, and the bytes of the largest real storage that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append(str(func))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


def watched(ranks, folder, dtype):
    """Collectives, largest storage and bytes through the kernel's read calls during a load, and a control for the first."""
    load(folder, DTYPES[dtype], ZERO3)  # Imports and caches of the first load are not the loader's.
    before = bytes_through_read()
    with Seen() as seen:

        def built(names):
            # Building on `meta` passes through whole tensors that are never touched; reading must not.
            seen.largest = 0
            return names

        base = load_base(Path(folder), read_config(Path(folder)), DTYPES[dtype], CPU, ZERO3, progress=built)
    through_read = bytes_through_read() - before
    largest_run = max(p.ds_tensor.numel() for p in base.model.parameters())
    with Seen() as control:
        dist.all_reduce(torch.ones(1))
    return seen.collectives, seen.largest, largest_run, through_read, base.bytes_read, control.collectives


def bytes_through_read() -> int:
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def refusal(ranks, folder):
    try:
        load(folder, torch.float32, ZERO3)
    except JobError as error:
        return str(error)
    return None


def pieces(ranks, numel):
    """What a rank is asked to fill of a tensor 0, 1, 2, ..., and what it then holds."""
    asked = []

    def fill(first, out):
        asked.append((first, out.numel()))
        out.copy_(torch.arange(first, first + out.numel()))

    parameter = Partitioner(ZERO3, torch.float32).parameter((numel,), fill)
    with deepspeed.zero.GatheredParameters([parameter]):
        whole = parameter.tolist()
    return asked, parameter.ds_tensor.tolist(), whole


def session_refusal(ranks, job):
    try:
        open_session(read_job(Path(job)), ranks, Screen(io.StringIO(), shown=False)).training_set()
    except JobError as error:
        return str(error)
    return None


def used(ranks, folder):
    """Digests of this rank's shards before and after passes forward and backward, and whether a gradient came out of them."""
    base = load(folder, torch.float32, ZERO3)
    before = {name: bits(p.ds_tensor) for name, p in base.model.named_parameters()}
    root = Causal(base.model, base.family)
    inputs = []

    def leaf(module, args, output):
        inputs.append(output.requires_grad_())

    base.model.get_input_embeddings().register_forward_hook(leaf)
    engine = Engine(root, ZERO3)
    for _ in range(2):
        batch = collate([learnt_from((5, 6, 7, 8, 9, 10), 2), learnt_from((11, 12, 13), 1)], [0, 1], True, CPU)
        root(batch=batch)[0].backward()
        engine.after_backward()
    engine.release()
    after = {name: bits(p.ds_tensor) for name, p in base.model.named_parameters()}
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    return changed, len(before), [float(x.grad.abs().max()) for x in inputs], [p.grad is None for p in base.model.parameters()]


# Equal to transformers.


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", BASES)
def test_every_parameter_is_bit_equal_to_transformers(name, pool, base, request):
    folder = base(name)
    dtype = "bf16" if name == "llama_bf16" else "fp32"
    reference = theirs(folder, DTYPES[dtype])
    assert len(reference) == (41 if name.startswith("gpt2") else 30)
    for answer in request.getfixturevalue(pool).run(gathered, folder, dtype):
        assert answer["whole"].keys() == reference.keys()
        for key, tensor in reference.items():
            shape, value = answer["whole"][key]
            assert shape == tuple(tensor.shape), key
            assert np.array_equal(value, bits(tensor)), key


def test_the_bases_are_what_they_claim(base):
    assert len(list(base("llama").glob("*.safetensors"))) > 2
    assert {"lm_head.weight", "transformer.wte.weight"} <= load_file(base("gpt2_head_stored_too") / "model.safetensors").keys()
    assert "lm_head.weight" not in load_file(base("gpt2") / "model.safetensors")
    assert "h.2.attn.bias" in load_file(base("gpt2_hub_names") / "model.safetensors")
    assert "model.embed_tokens.weight" not in load_file(base("llama_stored_under_head") / "model.safetensors")
    untied = theirs(base("llama"), torch.float32)
    assert not torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_change_of_dtype_is_to(name, dtype, pool, base, request):
    reference = theirs(base(name), torch.float32)
    for answer in request.getfixturevalue(pool).run(gathered, base(name), dtype):
        for key, tensor in reference.items():
            assert np.array_equal(answer["whole"][key][1], bits(tensor.to(DTYPES[dtype]))), key


@pytest.mark.parametrize("name", BASES)
def test_stage_0_holds_whole_tensors(name, base):
    dtype = torch.bfloat16 if name == "llama_bf16" else torch.float32
    loaded = load(base(name), dtype, ZERO0)
    reference = theirs(base(name), dtype)
    ours = dict(loaded.model.named_parameters(remove_duplicate=False))
    assert ours.keys() == reference.keys()
    for key, tensor in reference.items():
        assert torch.equal(ours[key], tensor), key
    stored = sum(entry.bytes for key, entry in loaded.checkpoint.entries.items() if ".attn.bias" not in key and "masked" not in key)
    assert loaded.bytes_read == stored


# A share, and nothing else.


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "fp32"), ("llama", "bf16")])
def test_shards_are_one_nth_and_padding(name, dtype, pool, base, request):
    pool = request.getfixturevalue(pool)
    reference = theirs(base(name), torch.float32)
    answers = pool.run(gathered, base(name), dtype)
    runs = {key: math.ceil(reference[key].numel() / pool.count) for key in answers[0]["shards"]}
    if pool.count == 3:
        assert any(reference[key].numel() % 3 for key in runs), "nothing here would be padded"
    for rank, answer in enumerate(answers):
        assert answer["parameters"] == sum(reference[key].numel() for key in runs)
        assert answer["shard_bytes"] == sum(runs.values()) * DTYPES[dtype].itemsize
        for key, run in runs.items():
            padded = torch.zeros(run * pool.count, dtype=DTYPES[dtype])
            padded[: reference[key].numel()] = reference[key].flatten()
            assert np.array_equal(answer["shards"][key], bits(padded[rank * run : (rank + 1) * run])), key


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize(("name", "dtype"), [("gpt2", "fp32"), ("llama", "bf16"), ("gpt2_head_stored_too", "fp32")])
def test_a_rank_reads_its_share_of_the_file(name, dtype, pool, base, request):
    pool = request.getfixturevalue(pool)
    tensors = {key: tensor for file in base(name).glob("*.safetensors") for key, tensor in load_file(file).items()}
    stored = sum(tensor.numel() * 4 for tensor in tensors.values())
    answers = pool.run(gathered, base(name), dtype)
    assert sum(answer["read"] for answer in answers) == stored
    for answer in answers:
        assert answer["read"] - stored / pool.count <= 4 * len(tensors), "more than one element a tensor above the share"


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loading_uses_no_collective_no_whole_tensor_and_no_other_read(dtype, pool, base, request):
    pool = request.getfixturevalue(pool)
    for collectives, largest, largest_run, through_read, counted, control in pool.run(watched, base("llama"), dtype):
        assert collectives == []
        assert control
        assert largest <= largest_run * 4
        assert largest_run < VOCABULARY * 32
        # Headers, config.json and the index are read too.
        small = sum(file.stat().st_size for file in base("llama").glob("*.json")) + 20_000
        assert counted <= through_read <= counted + small


@pytest.mark.parametrize(
    ("pool", "numel", "held"), [("ranks3", 2, [1, 1, 0]), ("ranks3", 4, [2, 2, 0]), ("ranks2", 1, [1, 0]), ("ranks3", 7, [3, 3, 1])]
)
def test_tensors_smaller_than_the_ranks(pool, numel, held, request):
    pool = request.getfixturevalue(pool)
    run = math.ceil(numel / pool.count)
    for rank, (asked, shard, whole) in enumerate(pool.run(pieces, numel)):
        first = min(rank * run, numel)
        assert asked == [(first, held[rank])]
        assert shard == [*range(first, first + held[rank]), *[0] * (run - held[rank])]
        assert whole == list(range(numel))


# The base stays as it is.


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_use_changes_nothing_on_disk_or_in_memory(name, base, ranks2):
    def digests():
        return {file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns) for file in base(name).iterdir()}

    before = digests()
    for changed, count, gradients, no_gradients in ranks2.run(used, base(name)):
        assert count > 20
        assert min(gradients) > 0
        assert all(no_gradients)
        assert changed == []
    assert digests() == before
    assert any(file.endswith(".safetensors") for file in before)


# What does not fit.


def without(key):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key}


def with_tensor(key, tensor):
    return lambda tensors: {**tensors, key: tensor}


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), ['"transformer.h.1.mlp.c_fc.bias"', "no tensor"]),
        (without("transformer.wte.weight"), ['"transformer.wte.weight"', "no tensor"]),
        (with_tensor("transformer.h.7.ln_1.weight", torch.ones(32)), ['"transformer.h.7.ln_1.weight"', "no place"]),
        (with_tensor("score.weight", torch.ones(2, 32)), ['"score.weight"', "no place"]),
        (with_tensor("transformer.h.0.attn.c_attn.weight", torch.ones(96, 32)), ["c_attn.weight", "[96, 32]", "[32, 96]"]),
        (with_tensor("lm_head.weight", torch.ones(VOCABULARY, 32)), ['"lm_head.weight"', '"transformer.wte.weight"', "differ"]),
        (with_tensor("lm_head.weight", torch.ones(VOCABULARY, 16)), ['"lm_head.weight"', '"transformer.wte.weight"', "differ"]),
    ],
    ids=["missing", "missing embeddings", "unexpected layer", "unexpected head", "wrong shape", "tied but different", "tied but misshapen"],
)
def test_what_does_not_fit_is_refused_by_name(how, words, tmp_path):
    folder = change(make_gpt2(tmp_path / "base"), how)
    with pytest.raises(JobError) as refused:
        load(folder, torch.float32, ZERO0)
    for word in [*words, str(folder)]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", 64, ["model.embed_tokens.weight", "[320, 32]", "[320, 64]"]),
        ("num_hidden_layers", 4, ['"model.layers.3.', "no tensor"]),
        ("num_hidden_layers", 2, ['"model.layers.2.', "no place"]),
        ("num_key_value_heads", 4, ["k_proj.weight", "[16, 32]", "[32, 32]"]),
        ("tie_word_embeddings", True, ['"lm_head.weight"', '"model.embed_tokens.weight"', "tie_word_embeddings"]),
    ],
)
def test_a_config_of_other_weights_is_refused(key, value, words, tmp_path):
    folder = make_llama(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(JobError) as refused:
        load(folder, torch.float32, ZERO0)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("row", [0, 101, 219, 319])
def test_one_different_element_of_a_tied_tensor_is_found(row, base, ranks2, tmp_path):
    folder = make_gpt2(tmp_path / "base")

    def spoil(tensors):
        head = tensors["transformer.wte.weight"].clone()
        head[row, 7] += 1e-3
        return {**tensors, "lm_head.weight": head}

    change(folder, spoil)
    with pytest.raises(JobError, match=r'"lm_head.weight" to "transformer.wte.weight"'):
        load(folder, torch.float32, ZERO0)
    refusals = ranks2.run(refusal, folder)
    assert [text is not None for text in refusals] == [row < 160, row >= 160]


def test_a_truncated_shard_is_refused(tmp_path):
    folder = make_llama(tmp_path / "base")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(JobError, match="truncated") as refused:
        load(folder, torch.float32, ZERO0)
    assert str(file) in str(refused.value)


def test_a_tokenizer_of_another_base_is_refused(ranks2, tmp_path):
    folder = make_llama(tmp_path / "base", vocab_size=VOCABULARY - 20)
    job = write_job(tmp_path / "job", folder)
    for text in ranks2.run(session_refusal, job):
        assert text
        assert re.search(r"train\.jsonl:\d+: token \d+ is not among the model's 300 embeddings", text)
