"""Many deltas on one base, mixed in one batch: each row is what its delta alone gives, on every family and method, and PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, DynamicCache

from pipeline.job.errors import JobError
from pipeline.job.method import Method
from pipeline.job.spec import Base
from pipeline.job.zero import deepspeed_config
from pipeline.methods.attach import attach
from pipeline.methods.files import store
from pipeline.methods.mixed import attach_many, refuse_unmixable
from pipeline.methods.stored import attach_stored, methods_of
from pipeline.model.causal import Causal, Decode
from pipeline.model.config import read_config
from pipeline.model.load import load_base
from pipeline.model.routing import BASE, Routing
from pipeline.tasks.specials import specials_of
from pipeline.weights.delta import StoredDelta, read_delta
from pipeline.weights.digest import file_digests
from tests.methods.test_contract import CONFIGS, METHODS
from tests.model.test_forward import CPU

KINDS = METHODS | {"wide": [{"kind": "lora", "targets": ["q", "o", "mlp_in"], "rank": 5, "alpha": 2.0}]}
PROMPTS = [[5, 9, 3], [7, 8], [30, 31, 32, 33, 34], [5, 9, 3], [11]]
NEXT = [17, 4, 28, 17, 60]


def make_delta(base: Path, name: str, folder: Path, seed: int) -> StoredDelta:
    """A delta of no training: its tensors are moved at random."""
    loaded = load_base(base, read_config(base), torch.float32, CPU, deepspeed_config(CONFIGS / "zero0.json"))
    delta = attach(loaded, TypeAdapter(tuple[Method, ...]).validate_python(KINDS[name], strict=False), 1, CPU)
    generator = torch.Generator().manual_seed(seed)
    values = {key: tensor.detach() + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in delta.tensors().items()}
    files = file_digests(loaded.checkpoint.files)
    store(delta, values, folder, Base(model=str(base), dtype="fp32"), files, loaded, "", 1, (" ->", False))
    return read_delta(folder)


def logits(root: Causal, prompts: list[list[int]], following: list[int], owners: tuple[int, ...] = ()) -> torch.Tensor:
    """[B, 2, V] behind prompts of unlike lengths, and behind one more token each, from the cache."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=root.model.config)
    with torch.no_grad():
        (first,) = root(decode=Decode(tokens, mask, positions, cache, owners))
        more = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        (second,) = root(decode=Decode(torch.tensor(following)[:, None], more, positions[:, -1:] + 1, cache, owners))
    return torch.stack([first, second], 1)


def open_base(folder: Path):
    return load_base(folder, read_config(folder), torch.float32, CPU, deepspeed_config(CONFIGS / "zero0.json"))


FAMILY_METHODS = {
    "gpt2": [
        "lora",
        "wide",
        "bitfit",
        "prefix_embed",
        "prefix_layer",
        "houlsby",
        "lin",
        "pfeiffer",
        "drop",
        "lora+pl",
        "adapter+lora",
        "lora",
    ],
    "llama": ["lora", "wide", "houlsby", "prefix_layer", "pfeiffer", "lora+pe"],
    "opt": ["lora", "wide", "bitfit", "houlsby", "prefix_embed", "lin"],
    "gpt_neox": ["lora", "wide", "bitfit", "houlsby"],
    "gemma3_text": ["lora", "wide", "houlsby", "prefix_embed"],
}


@pytest.mark.parametrize("family", FAMILY_METHODS)
def test_a_row_of_a_mixed_batch_is_what_its_delta_alone_gives(family, families, tmp_path):
    names, base = FAMILY_METHODS[family], families(family)
    stored = [make_delta(base, name, tmp_path / str(n), n) for n, name in enumerate(names)]
    mixed = open_base(base)
    routing, specials = attach_many(mixed, [(tmp_path / str(n), one) for n, one in enumerate(stored)], CPU)
    owners = tuple(sorted([BASE, *range(len(names)), 0, 1]))
    prompts = [PROMPTS[place % 5] for place in range(len(owners))]
    following = [NEXT[place % 5] for place in range(len(owners))]
    around = [specials[owner].prompt(p) if owner != BASE and specials[owner] else p for owner, p in zip(owners, prompts, strict=True)]
    root = Causal(mixed.model, mixed.family, routing=routing)
    found = logits(root, around, following, owners)
    for owner in set(owners):
        alone = open_base(base)
        own = None
        if owner != BASE:
            attach_stored(alone, stored[owner], tmp_path / str(owner), CPU)
            own = specials_of(methods_of(stored[owner].manifest, tmp_path), alone.model.config.vocab_size)
        rows = [row for row, one in enumerate(owners) if one == owner]
        wanted = logits(
            Causal(alone.model, alone.family),
            [own.prompt(prompts[row]) if own else prompts[row] for row in rows],
            [following[row] for row in rows],
        )
        torch.testing.assert_close(found[rows], wanted, atol=2e-5, rtol=1e-5)
        others = [row for row, one in enumerate(owners) if one != owner and prompts[row] == prompts[rows[0]]]
        assert not any(torch.allclose(found[row], found[rows[0]], atol=1e-2) for row in others), names[owner]
    # Nobody's rows are the base's, whatever hangs on it; and a batch of one delta is that delta's.
    bare = Causal(open_base(base).model, mixed.family)
    torch.testing.assert_close(logits(root, PROMPTS, NEXT), logits(bare, PROMPTS, NEXT), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(root, around[1:2], following[1:2], owners[1:2]), found[1:2], atol=2e-5, rtol=1e-5)


def test_logits_of_a_mixed_batch_are_peft_s_own(gpt2_base, tmp_path):
    names = ["lora", "wide", "lora"]
    stored = [make_delta(gpt2_base, name, tmp_path / str(n), n) for n, name in enumerate(names)]
    mixed = open_base(gpt2_base)
    routing, _ = attach_many(mixed, [(tmp_path / str(n), one) for n, one in enumerate(stored)], CPU)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_base), str(tmp_path / "0"), adapter_name="0").eval()
    for n in (1, 2):
        theirs.load_adapter(str(tmp_path / str(n)), str(n))
    owners = (BASE, 0, 0, 1, 2)
    asked = ["__base__" if owner == BASE else str(owner) for owner in owners]
    prompts = [[5, 9, 3, 7]] * 5
    found = logits(Causal(mixed.model, mixed.family, routing=routing), prompts, NEXT, owners)
    with torch.no_grad():
        wanted = theirs(torch.tensor([[*p, n] for p, n in zip(prompts, NEXT, strict=True)]), adapter_names=asked).logits[:, -2:]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[1], found[3], atol=1e-2)


def test_tensors_are_laid_together_for_a_batch_and_not_for_each_text_that_ends():
    routing = Routing()
    seen = []
    for owners in ((0, 0, 1, 2, 3), (0, 1, 2, 3), (0, 2), (2,), (), (BASE, 5, 5)):
        routing.set(owners, CPU)
        seen.append(routing.together)
    assert seen == [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), (2,), (), (5,)]
    assert list(routing.runs(torch.empty(6, 2))) == [(5, slice(2, 6))]


@pytest.mark.parametrize(("name", "part"), [("full", "takes the place of the base's"), ("full_top", "zlora deltas extract")])
def test_what_does_not_mix_is_refused_with_the_way_out(name, part, gpt2_base, tmp_path):
    stored = make_delta(gpt2_base, name, tmp_path / "big", 1)
    with pytest.raises(JobError, match=part):
        refuse_unmixable(stored, tmp_path / "big")
