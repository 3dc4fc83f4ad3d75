"""The contract of families: each is asked the same questions, against transformers and PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, MixtralConfig, RobertaConfig, T5Config

from pipeline.deltas.merge import merge
from pipeline.evaluate.generate import generate
from pipeline.job.errors import JobError
from pipeline.job.method import Lora
from pipeline.job.spec import Base, Decoding
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import Delta, attach
from pipeline.methods.files import restore, store
from pipeline.methods.lora import to_peft
from pipeline.model.build import checkpointed
from pipeline.model.causal import Causal
from pipeline.model.config import read_config
from pipeline.model.families import FAMILIES, known_family, refuse_encoder
from pipeline.model.load import LoadedBase, load_base
from pipeline.model.unknown import family_of, refuse_roles
from pipeline.tasks.batch import collate
from pipeline.tasks.encode import Encoder
from pipeline.tasks.example import Labelled
from pipeline.tasks.tokens import Tokens
from pipeline.train.engine import Engine
from pipeline.weights.digest import base_digest, file_digests
from tests.families import LABELS, TEXTS, UNKNOWN, close, theirs
from tests.model.test_forward import CPU, SEQUENCES, TIGHT

NAMES = sorted([*FAMILIES, *UNKNOWN])
ENCODERS = [name for name in FAMILIES if FAMILIES[name].encoder]
CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
PROMPTS = [list(sequence.tokens) for sequence in SEQUENCES[:4]]
NEW_TOKENS = 12


@dataclass
class Ours:
    """A base with LoRA on every role, and a head where it is an encoder; B is not zero."""

    base: LoadedBase
    delta: Delta
    root: Causal
    method: Lora
    sequences: list

    def pass_over(self, packed: bool, chosen: list[int] | None = None) -> tuple[float, dict[str, np.ndarray], torch.Tensor | None]:
        """Summed loss, gradients by name, the head's outputs."""
        chosen = list(range(len(self.sequences))) if chosen is None else chosen
        packed = packed and self.base.family.packs
        for tensor in self.delta.tensors().values():
            tensor.grad = None
        loss, _, *outputs = self.root(batch=collate([self.sequences[i] for i in chosen], chosen, packed, CPU))
        loss.backward()
        gradients = {name: tensor.grad.numpy().copy() for name, tensor in self.delta.tensors().items()}
        return float(loss.detach()), gradients, outputs[0] if outputs else None


def open_ours(folder: Path, config: dict, drawn: bool = True) -> Ours:
    base = load_base(folder, read_config(folder), torch.float32, CPU, config)
    family = base.family
    targets = tuple(family.roles) or UNKNOWN[base.model.config.model_type][1]
    method = Lora(kind="lora", targets=targets, rank=3, alpha=5.0)
    delta = attach(base, (method,), 1, CPU, LABELS if family.encoder else ())
    generator = torch.Generator().manual_seed(3)
    for name, tensor in delta.tensors().items() if drawn else ():
        if not name.endswith(".a"):
            tensor.data.normal_(0.0, 0.2, generator=generator)
    sequences = SEQUENCES
    if family.encoder:
        made = Encoder(Tokens(folder), None, 0, 1 << 30, special=True)
        sequences = [s for s, _ in made.sequences([Labelled(texts, n % 3, "x:1") for n, texts in enumerate(TEXTS)])]
    return Ours(base, delta, Causal(base.model, family, delta.head), method, sequences)


def plain(folder: Path, drawn: bool = True) -> Ours:
    return open_ours(folder, deepspeed_config(CONFIGS / "zero0.json"), drawn)


def write(ours: Ours, folder: Path) -> str:
    """Stores the delta; returns the base's digest."""
    values = {name: tensor.detach().clone() for name, tensor in ours.delta.tensors().items()}
    digests = file_digests(ours.base.checkpoint.files)
    store(ours.delta, values, folder, Base(model="base"), digests, ours.base, "job", 1, (None, False))
    return base_digest(digests)


def outputs_of(model, ours: Ours, folder: Path) -> list[torch.Tensor]:
    """Of every example by itself: logits where something is to be learnt."""
    if ours.base.family.encoder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return [model(**tokenizer(*texts, return_tensors="pt")).logits for texts in TEXTS]
    return [model(torch.tensor([s.tokens])).logits[0, s.spans[0][0] - 1 : -1] for s in ours.sequences]


def loss_of(outputs: list[torch.Tensor], ours: Ours) -> torch.Tensor:
    wanted = [[int(s.label)] if s.label is not None else s.tokens[s.spans[0][0] :] for s in ours.sequences]
    return sum(torch.nn.functional.cross_entropy(o, torch.tensor(w), reduction="sum") for o, w in zip(outputs, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_transformers_model_and_trains_as_in_peft(name, families, tmp_path):
    folder = families(name)
    ours = plain(folder)
    encoder = ours.base.family.encoder
    loss, gradients, outputs = ours.pass_over(packed=True)
    assert all(gradient.any() for gradient in gradients.values()), "every tensor is reached"
    write(ours, tmp_path / "delta")
    model = PeftModel.from_pretrained(theirs(folder, encoder), tmp_path / "delta", is_trainable=True).eval()
    found = outputs_of(model, ours, folder)
    their_loss = loss_of(found, ours)
    assert loss == pytest.approx(float(their_loss.detach()), rel=1e-6)
    if outputs is not None:
        np.testing.assert_allclose(outputs.numpy(), torch.cat(found).detach().numpy(), atol=1e-5)
    their_loss.backward()
    # Our gradients in PEFT's form: where a projection is fused, one pair with zeros outside the blocks.
    values = {key: torch.from_numpy(gradient) for key, gradient in gradients.items()}
    ones = {key: torch.ones_like(value) for key, value in values.items()}
    by_name = {key.replace(".default", ""): p.grad for key, p in model.named_parameters() if p.grad is not None}
    for adapted in ours.delta.adapted:
        pair, blocks = to_peft(adapted, values), to_peft(adapted, ones)
        a, b = (by_name.pop(f"base_model.model.{adapted.module}.lora_{key}.weight") for key in "AB")
        close({"a": pair.a.numpy(), "b": pair.b.numpy()}, {"a": a.numpy(), "b": (b * blocks.b).numpy()})
    head = {f"base_model.model.{path}": values[path] for path in (ours.delta.head.tensors if encoder else ())}
    saved = {key.replace("modules_to_save.", ""): gradient.numpy() for key, gradient in by_name.items()}
    close({key: value.numpy() for key, value in head.items()}, saved)


@pytest.mark.parametrize("name", NAMES)
def test_packed_padded_and_recomputed_are_the_same(name, families):
    ours = plain(families(name))
    packed = ours.pass_over(packed=True)
    padded = ours.pass_over(packed=False)
    assert padded[0] == pytest.approx(packed[0], rel=1e-6)
    close(padded[1], packed[1])
    checkpointed(ours.base.model, ours.base.family)
    ours.root.train()
    again = ours.pass_over(packed=True)
    assert again[0] == pytest.approx(packed[0], rel=1e-6)
    close(again[1], packed[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_delta_goes_through_its_files_and_merges(name, families, tmp_path):
    folder = families(name)
    ours, fresh = plain(folder), plain(folder, drawn=False)
    digest = write(ours, tmp_path / "delta")
    restore(fresh.delta, tmp_path / "delta", digest)
    for key, tensor in fresh.delta.tensors().items():
        assert torch.equal(tensor, ours.delta.tensors()[key]), key
    merge(folder, tmp_path / "delta", tmp_path / "merged")
    encoder = ours.base.family.encoder
    merged = theirs(tmp_path / "merged", encoder)
    with torch.no_grad():
        loss = loss_of(outputs_of(merged, ours, folder), ours)
    assert ours.pass_over(packed=True)[0] == pytest.approx(float(loss), rel=2e-6)
    if encoder:
        # A base that has a head already gets the new one in its place.
        merged.save_pretrained(tmp_path / "judge")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "judge")
        again = plain(tmp_path / "judge")
        write(again, tmp_path / "again")
        merge(tmp_path / "judge", tmp_path / "again", tmp_path / "twice")
        with torch.no_grad():
            loss = loss_of(outputs_of(theirs(tmp_path / "twice", True), again, folder), again)
        assert again.pass_over(packed=True)[0] == pytest.approx(float(loss), rel=2e-6)


def on_shards(ranks, folder: str) -> tuple[float, dict[str, np.ndarray], list[list[int]]]:
    """This rank's share of loss and gradients on a sharded base, twice so that the recorded trace is used; and texts."""
    config = deepspeed_config(CONFIGS / "zero3.json")
    config["zero_optimization"] |= TIGHT
    ours = open_ours(Path(folder), config)
    engine = Engine(ours.root, config)
    mine = list(range(ranks.rank, len(ours.sequences), ranks.count))
    for packed in (False, True):
        loss, gradients, _ = ours.pass_over(packed, mine)
        engine.after_backward()
    texts = []
    if not ours.base.family.encoder:
        ours.root.eval()
        engine.release()
        texts = generate(ours.root, PROMPTS, ranks, Decoding(max_new_tokens=NEW_TOKENS), (), ours.root.context, sharded=True)
    engine.release()
    return loss, gradients, texts


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_of_shards_compute_and_generate_the_same(name, families, ranks2, tmp_path):
    ours = plain(families(name))
    shares = ranks2.run(on_shards, str(families(name)))
    loss, gradients, _ = ours.pass_over(packed=True)
    assert sum(share[0] for share in shares) == pytest.approx(loss, rel=1e-6)
    close({key: sum(share[1][key] for share in shares) for key in gradients}, gradients)
    if ours.base.family.encoder:
        return
    write(ours, tmp_path / "delta")
    model = PeftModel.from_pretrained(theirs(families(name), False), tmp_path / "delta").eval()
    for prompt, text in zip(PROMPTS, shares[0][2], strict=True):
        wanted = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert text == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_table_names_every_linear_map_and_norm_of_a_layer(name, families):
    base = plain(families(name)).base
    family, modules = base.family, dict(base.model.named_modules())
    inside = f"{family.layers}.0."
    norms = {path for path, module in modules.items() if "norm" in type(module).__name__.lower()}
    assert {path.removeprefix(inside) for path in norms if path.startswith(inside)} == set(family.norms)
    assert {path for path in norms if not path.startswith(f"{family.layers}.")} <= set(family.outer_norms)
    linears = {path.removeprefix(inside) for path, module in modules.items() if path.startswith(inside) and hasattr(module, "branches")}
    assert linears == {role.module for role in family.roles.values()}


@pytest.mark.parametrize("name", ENCODERS)
def test_long_pairs_are_cut_as_transformers_cuts_them(name, families):
    from pipeline.tasks.sequences import truncate

    ours, tokenizer = plain(families(name)), AutoTokenizer.from_pretrained(families(name))
    for limit in range(4, 24):
        for sequence, texts in zip(ours.sequences, TEXTS, strict=True):
            wanted = tokenizer(*texts, truncation="longest_first", max_length=limit)
            cut = truncate(sequence, limit)
            assert list(cut.tokens) == wanted["input_ids"], (limit, texts)
            types = collate([cut], [0], True, CPU).types[0].tolist()
            assert types == wanted.get("token_type_ids", types)


def test_roberta_s_context_begins_behind_its_padding(families):
    config = read_config(families("roberta"))
    assert FAMILIES["roberta"].context(config) == config.max_position_embeddings - config.pad_token_id - 1


def test_old_names_prefixes_and_heads_for_other_tasks_are_matched_or_left_aside(families, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, file = families("bert"), "model.safetensors"
    tensors = load_file(folder / file)
    old = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in old.items()}
    old |= {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(66)[None]}
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(old, tmp_path / file)
    assert plain(tmp_path).pass_over(packed=True)[0] == plain(folder).pass_over(packed=True)[0]
    save_file(old | {"bert.more.weight": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(JobError, match=r'"bert\.more\.weight" has no place in a bert'):
        plain(tmp_path)


def test_what_cannot_be_trained_rightly_is_refused_by_name(families):
    with pytest.raises(JobError, match=r'"mixtral" is a mixture of experts \(num_local_experts = 8\)'):
        known_family(MixtralConfig())
    with pytest.raises(JobError, match="makes a decoder of a roberta"):
        known_family(RobertaConfig(is_decoder=True))
    with pytest.raises(JobError, match='"t5" is not known, and is no decoder of text'):
        family_of(T5Config(num_layers=1, d_model=8, d_ff=8, vocab_size=9))
    with pytest.raises(JobError, match=r'bert is an encoder, which generates no text; task\.kind = "e2e" needs a decoder'):
        refuse_encoder(read_config(families("bert")), 'task.kind = "e2e"')
    unknown = read_config(families("olmo2"))
    refuse_roles(unknown, ("self_attn.q_proj", "down_proj"))
    with pytest.raises(JobError) as caught:
        refuse_roles(unknown, ("q",))
    assert "self_attn.q_proj, self_attn.k_proj" in str(caught.value)
    assert 'targets = ["self_attn.q_proj", "self_attn.k_proj"]' in str(caught.value)


def test_dropout_on_deberta_s_shared_keys_does_not_depend_on_the_deal(families):
    """Its relative positions pass through the adapted maps too, and belong to no example."""
    ours = plain(families("deberta-v2"))
    for adapted in ours.delta.adapted:
        adapted.linear.branches[:] = [_with_dropout(branch) for branch in adapted.branches]
    losses = []
    for parts in ([range(6)], [range(3), range(3, 6)], [[0, 5], [1, 4], [2, 3]]):
        total = 0.0
        for part in map(list, parts):
            batch = collate([ours.sequences[i] for i in part], part, False, CPU)
            ours.delta.clock.keys = batch.keys
            total += float(ours.root(batch=batch)[0].detach())
        losses.append(total)
    ours.delta.clock.keys = None
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert losses[0] != pytest.approx(ours.pass_over(packed=False)[0], rel=1e-3)


def _with_dropout(branch):
    from dataclasses import replace

    return replace(branch, dropout=0.3)


def test_the_page_of_models_has_every_family():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    for name, family in FAMILIES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}`"))
        for role in family.roles:
            assert role in row, (name, role)
