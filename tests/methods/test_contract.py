"""The contract of methods: each is asked the same questions on every family."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from pipeline.deltas.merge import merge
from pipeline.evaluate.generate import generate
from pipeline.job.errors import JobError
from pipeline.job.method import Method, trains_tables
from pipeline.job.spec import Base, Decoding, Train
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import Delta, attach
from pipeline.methods.files import restore, store
from pipeline.methods.stored import attach_stored
from pipeline.model.build import checkpointed
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.families import FAMILIES
from pipeline.model.load import LoadedBase, load_base
from pipeline.model.zero3 import gathered, shard_of
from pipeline.tasks.batch import collate
from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Labelled, Sequence
from pipeline.tasks.specials import specials_of
from pipeline.tasks.tokens import Tokens
from pipeline.train.engine import Engine
from pipeline.train.step import Stepper
from pipeline.weights.delta import read_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.manifest import CONFIG
from tests.families import LABELS, TEXTS, UNKNOWN, close, theirs
from tests.model.test_forward import CPU, SEQUENCES, TIGHT

CONFIGS = Path(__file__).parents[2] / "ds_configs"
LORA = {"kind": "lora", "targets": ["q", "v"], "rank": 3, "alpha": 5.0}
PREFIX = {"prefix_tokens": 2, "infix_tokens": 3}
METHODS = {
    "lora": [LORA],
    "full": [{"kind": "full"}],
    "full_top": [{"kind": "full_top", "layers": 1}],
    "bitfit": [{"kind": "bitfit"}],
    "prefix_embed": [{"kind": "prefix_embed", **PREFIX}],
    "prefix_layer": [{"kind": "prefix_layer", **PREFIX}],
    "houlsby": [{"kind": "adapter", "placement": "houlsby", "rank": 4, "train_layernorm": True}],
    "lin": [{"kind": "adapter", "placement": "lin", "rank": 4, "nonlinearity": "gelu"}],
    "pfeiffer": [{"kind": "adapter", "placement": "pfeiffer", "rank": 4}],
    "drop": [{"kind": "adapter", "placement": "drop", "rank": 4, "first_layer": 1, "nonlinearity": "tanh"}],
    "lora+pe": [LORA, {"kind": "prefix_embed", **PREFIX}],
    "lora+pl": [LORA, {"kind": "prefix_layer", **PREFIX}],
    "adapter+lora": [{"kind": "adapter", "rank": 4}, LORA | {"targets": ["o", "v"]}],
}
FOLD = {"lora", "full", "full_top", "bitfit"}
SAME_AT_START = METHODS.keys() - {"prefix_embed", "prefix_layer", "lora+pe", "lora+pl"}
TRAIN = Train(learning_rate=0.01, weight_decay=0.1, clip_norm=0.5, batch_examples=6, adam_eps=1e-3)
"""With that eps a gradient that is rounding alone, as of a key's bias, moves nothing."""
STEPS = 3
NEW_TOKENS = 5


def methods_for(name: str, family: str) -> tuple[Method, ...] | None:
    """None where the family has nothing of the kind."""
    kinds = [dict(method) for method in METHODS[name]]
    if name == "bitfit" and family in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2"):
        return None
    if family in UNKNOWN:
        if name in ("houlsby", "adapter+lora"):
            return None
        for method in kinds:
            if "targets" in method:
                method["targets"] = list(UNKNOWN[family][1])
    return TypeAdapter(tuple[Method, ...]).validate_python(kinds, strict=False)


CELLS = [(family, name) for family in sorted([*FAMILIES, *UNKNOWN]) for name in METHODS if methods_for(name, family)]
EVERY = pytest.mark.parametrize(("family", "name"), CELLS, ids=[f"{family}-{name}" for family, name in CELLS])


@dataclass
class Ours:
    base: LoadedBase
    delta: Delta
    root: Causal
    sequences: list[Sequence]

    def loss(self, chosen: list[int], packed: bool = True) -> torch.Tensor:
        batch = collate([self.sequences[i] for i in chosen], chosen, packed and self.base.family.packs, CPU)
        return self.root(batch=batch)[0]

    def gradients(self) -> dict[str, np.ndarray]:
        for tensor in self.delta.tensors().values():
            tensor.grad = None
        self.loss(list(range(len(self.sequences)))).backward()
        return {name: tensor.grad.numpy().copy() for name, tensor in self.delta.tensors().items()}


def open_ours(folder: Path, family: str, name: str | None, config: dict) -> Ours:
    methods = methods_for(name, family) if name else ()
    base = load_base(folder, read_config(folder), torch.float32, CPU, config, trains_tables=trains_tables(methods))
    encoder = base.family.encoder
    delta = attach(base, methods, 1, CPU, LABELS if encoder else ())
    sequences = SEQUENCES
    if encoder:
        made = Encoder(Tokens(folder), None, 0, 1 << 30, special=True)
        sequences = [s for s, _ in made.sequences([Labelled(texts, n % 3, "x:1") for n, texts in enumerate(TEXTS)])]
    if specials := specials_of(methods, base.model.config.vocab_size):
        sequences = [specials.around(sequence) for sequence in sequences]
    return Ours(base, delta, Causal(base.model, base.family, delta.head), sequences)


def plain(families, family: str, name: str | None) -> Ours:
    return open_ours(families(family), family, name, deepspeed_config(CONFIGS / "zero0.json"))


def stirred(ours: Ours) -> Ours:
    """No trained tensor as it was at the start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in ours.delta.tensors().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    ours.delta.publish()
    return ours


def write(ours: Ours, folder: Path) -> str:
    values = {name: tensor.detach().clone() for name, tensor in ours.delta.tensors().items()}
    digests = file_digests(ours.base.checkpoint.files)
    store(ours.delta, values, folder, Base(model="base"), digests, ours.base, "job", 1, (None, False))
    return base_digest(digests)


@EVERY
def test_at_the_start_the_output_is_the_base_s_where_the_method_promises_it(family, name, families):
    ours, base = plain(families, family, name), plain(families, family, None)
    with torch.no_grad():
        loss, wanted = (float(one.loss(list(range(6)))) for one in (ours, base))
    assert (loss == pytest.approx(wanted, rel=1e-6)) == (name in SAME_AT_START)


def expected(family: str, name: str, folder: Path) -> int:
    """The closed forms of the paper's section 5.1, from transformers' own model."""
    config = read_config(folder)
    model = theirs(folder, FAMILIES[family].encoder if family in FAMILIES else False)
    if family in FAMILIES and FAMILIES[family].encoder:
        model = model.base_model
    d, layers = config.hidden_size, config.num_hidden_layers
    layer = "encoder.layer." if family in FAMILIES and FAMILIES[family].encoder else "layers." if family != "gpt2" else "h."
    numel = {key: p.numel() for key, p in model.named_parameters()}
    inside = {key: count for key, count in numel.items() if f"{layer}" in key}
    norms = sum(count for key, count in inside.items() if "norm" in key.lower() or ".ln_" in key)
    adapter = 2 * d * 4 + 4 + d
    special = PREFIX["prefix_tokens"] + PREFIX["infix_tokens"]
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or d // heads
    kv = heads if family == "gpt_neox" else getattr(config, "num_key_value_heads", None) or heads
    lora_q, lora_v, lora_o = 3 * (d + heads * width), 3 * (d + kv * width), 3 * (heads * width + d)
    lora = layers * (lora_q + lora_v)
    if family in UNKNOWN:
        lora += layers * 3 * (d + config.intermediate_size)
    return {
        "lora": lora,
        "full": sum(numel.values()),
        "full_top": sum(count for key, count in inside.items() if f"{layer}{layers - 1}." in key),
        "bitfit": sum(count for key, count in numel.items() if key.endswith(".bias")),
        "prefix_embed": getattr(config, "word_embed_proj_dim", d) * special,
        "prefix_layer": layers * d * special,
        "houlsby": 2 * layers * adapter + norms,
        "lin": layers * (adapter + 2 * d),
        "pfeiffer": layers * adapter,
        "drop": (layers - 1) * adapter,
        "lora+pe": lora + getattr(config, "word_embed_proj_dim", d) * special,
        "lora+pl": lora + layers * d * special,
        "adapter+lora": 2 * layers * adapter + layers * (lora_o + lora_v),
    }[name]


@EVERY
def test_only_what_is_declared_has_gradients_and_it_is_as_much_as_the_closed_form_says(family, name, families):
    ours = plain(families, family, name)
    ours.loss(list(range(6))).backward()
    head = sum(tensor.numel() for tensor in ours.delta.head.tensors.values()) if ours.delta.head else 0
    assert ours.delta.parameters - head == expected(family, name, families(family))
    for key, tensor in ours.delta.tensors().items():
        assert tensor.grad is not None, key
    trained = {one.name for one in ours.delta.base}
    for key, parameter in ours.base.model.named_parameters():
        assert parameter.requires_grad == (key in trained), key
        assert parameter.grad is None, key


@EVERY
def test_recomputing_changes_no_gradient(family, name, families):
    ours = stirred(plain(families, family, name))
    wanted = ours.gradients()
    checkpointed(ours.base.model, ours.base.family)
    ours.root.train()
    close(ours.gradients(), wanted)


@pytest.mark.parametrize(("family", "name"), [cell for cell in CELLS if cell[1] in ("full", "full_top", "bitfit")])
def test_gradients_of_the_base_are_those_of_transformers(family, name, families):
    ours = plain(families, family, name)
    gradients = ours.gradients()
    encoder = ours.base.family.encoder
    model = theirs(families(family), encoder)
    if encoder:
        for key, tensor in ours.delta.head.tensors.items():
            model.get_parameter(key).data.copy_(tensor.detach())
    total = torch.zeros(())
    for sequence in ours.sequences:
        tokens = torch.tensor([sequence.tokens])
        if encoder:
            types = collate([sequence], [0], True, CPU).types
            takes = {"token_type_ids": types} if family != "roberta" else {}
            total = total + torch.nn.functional.cross_entropy(model(tokens, **takes).logits, torch.tensor([int(sequence.label)]))
        else:
            start = sequence.spans[0][0]
            total = total + torch.nn.functional.cross_entropy(model(tokens).logits[0, start - 1 : -1], tokens[0, start:], reduction="sum")
    total.backward()
    close(gradients, {key: model.get_parameter(key).grad.numpy() for key in gradients}, 5e-5)


def after_steps(ranks, folder: str, family: str, name: str) -> tuple[dict, list, list, bool]:
    """Three steps over a sharded base; what is trained then, and texts by it, cached and not."""
    config = deepspeed_config(CONFIGS / "zero3.json")
    config["zero_optimization"] |= TIGHT | {"stage3_param_persistence_threshold": 40}
    ours = open_ours(Path(folder), family, name, config)
    engine = Engine(ours.root, config)
    stepper = Stepper(engine, ours.root, ours.delta, TRAIN, ranks, fp16=False)
    trained = {one.name for one in ours.delta.base}
    frozen = {key: shard_of(p).clone() for key, p in ours.base.model.named_parameters() if key not in trained}
    packed = ours.base.family.packs
    for step in range(STEPS):
        # The last step leaves a rank without examples.
        mine = list(range(ranks.rank, 6, ranks.count)) if step < STEPS - 1 else [0, 1] if ranks.first else []
        batch = collate([ours.sequences[i] for i in mine], mine, packed, CPU)
        stepper(step, [batch], targets(ours, range(6) if step < STEPS - 1 else range(2)), TRAIN.learning_rate)
    captured = {key: tensor.numpy() for key, tensor in stepper.capture_weights().items()}
    untouched = all(torch.equal(shard_of(ours.base.model.get_parameter(key)), shard) for key, shard in frozen.items())
    if ours.base.family.encoder:
        return captured, [], [], untouched
    ours.root.eval()
    engine.release()
    prompts = [list(sequence.tokens[: sequence.spans[0][0]]) for sequence in ours.sequences[:3]]
    with gathered(ours.root), torch.no_grad():
        cached = generate(ours.root, prompts, ranks, Decoding(max_new_tokens=NEW_TOKENS), (), ours.root.context, sharded=False)
        again = [recomputed(ours, prompt) for prompt in prompts]
    engine.release()
    return captured, cached, again, untouched


def recomputed(ours: Ours, prompt: list[int]) -> list[int]:
    """Greedy, each token from a pass over all before it."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(ours.base.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def targets(ours: Ours, chosen) -> int:
    return sum(ours.sequences[i].targets for i in chosen)


@EVERY
def test_two_ranks_of_shards_are_one_plain_process_after_three_steps_and_its_texts(family, name, families, ranks2):
    shares = ranks2.run(after_steps, str(families(family)), family, name)
    ours = plain(families, family, name)
    tensors = list(ours.delta.tensors().values())
    adam = torch.optim.AdamW(tensors, lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay, eps=TRAIN.adam_eps)
    for step in range(STEPS):
        chosen = list(range(6)) if step < STEPS - 1 else [0, 1]
        adam.zero_grad()
        # One example at a time, padded.
        for i in chosen:
            (ours.loss([i], packed=False) / targets(ours, chosen)).backward()
        torch.nn.utils.clip_grad_norm_(tensors, TRAIN.clip_norm)
        adam.step()
        ours.delta.publish()
    captured, cached, again, untouched = shares[0]
    close(captured, {key: tensor.detach().numpy() for key, tensor in ours.delta.tensors().items()})
    assert not shares[1][0]
    assert untouched
    assert cached == again


@EVERY
def test_a_delta_goes_through_its_files_and_merges_where_it_folds(family, name, families, tmp_path):
    folder = families(family)
    before = file_digests(sorted(folder.glob("*.safetensors")))
    ours, fresh = stirred(plain(families, family, name)), plain(families, family, name)
    digest = write(ours, tmp_path / "delta")
    restore(fresh.delta, tmp_path / "delta", digest)
    chosen = list(range(6))
    with torch.no_grad():
        loss = float(ours.loss(chosen))
        assert float(fresh.loss(chosen)) == loss
    for key, tensor in fresh.delta.tensors().items():
        assert torch.equal(tensor, ours.delta.tensors()[key]), key
    assert (tmp_path / "delta" / CONFIG).exists() == (name == "lora")
    with pytest.raises(JobError, match="Name the base it was trained on"):
        restore(fresh.delta, tmp_path / "delta", "another")
    if not ours.base.family.encoder:
        # As it lies in its files, without the job.
        bare = open_ours(folder, family, None, deepspeed_config(CONFIGS / "zero0.json"))
        attach_stored(bare.base, read_delta(tmp_path / "delta"), tmp_path / "delta", CPU)
        bare.sequences = ours.sequences
        with torch.no_grad():
            assert float(bare.loss(chosen)) == pytest.approx(loss, rel=1e-6)
    if name not in FOLD:
        with pytest.raises(JobError, match=r"what no ordinary checkpoint has a place for.*a method that merges"):
            merge(folder, tmp_path / "delta", tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
        return
    merge(folder, tmp_path / "delta", tmp_path / "merged")
    merged = open_ours(tmp_path / "merged", family, None, deepspeed_config(CONFIGS / "zero0.json"))
    if merged.delta.head:
        for key, tensor in merged.delta.head.tensors.items():
            tensor.data.copy_(ours.delta.head.tensors[key])
    with torch.no_grad():
        assert float(merged.loss(chosen)) == pytest.approx(loss, rel=2e-6)
    assert file_digests(sorted(folder.glob("*.safetensors"))) == before
    assert math.isfinite(loss)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt", "bert"])
def test_special_tokens_begin_as_tokens_of_the_vocabulary(family, families):
    ours = plain(families, family, "prefix_embed")
    embedding = ours.base.model.get_submodule(ours.base.family.body).get_input_embeddings()
    known = embedding(torch.arange(embedding.weight.shape[0]))
    for row in ours.delta.prefix.rows["prefix.embeddings"]:
        assert (known == row).all(-1).any()
