"""Against PEFT and transformers: the delta loads there and gives the same logits, and their plain loop trains the same weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from pipeline.tasks.order import Stream
from tests.training import trained, write_job

TARGETS = {
    "gpt2_base": ['["q", "v"]', '["q", "k", "v", "o", "mlp_in", "mlp_out"]', '["v"]', '["attn.c_proj", "k"]'],
    "llama_base": ['["q", "v"]', '["q", "k", "v", "o", "mlp_gate", "mlp_in", "mlp_out"]', '["mlp.down_proj"]'],
}


@pytest.mark.parametrize(("base", "targets"), [(base, targets) for base, several in TARGETS.items() for targets in several])
def test_peft_loads_the_delta_and_gives_our_loss(base, targets, request, ranks2, tmp_path):
    folder = request.getfixturevalue(base)
    job = write_job(tmp_path, folder)
    trained(ranks2, job, tmp_path / "run", f"methods.0.targets={targets}")
    # One more step at a learning rate of nothing: its loss is that of the saved delta.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run" / "delta").eval()
    ours = ranks2.run(logits_of_run, str(tmp_path / "run"))[0]
    with torch.no_grad():
        theirs = model(torch.arange(40)[None] % 300).logits[0].numpy()
        bare = model.get_base_model()
        with model.disable_adapter():
            without = bare(torch.arange(40)[None] % 300).logits[0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.abs(theirs - without).max() > 1e-3


@pytest.mark.parametrize("base", ["gpt2_base", "llama_base"])
@pytest.mark.parametrize(
    "settings",
    [
        ("methods.0.rank={q = 2, v = 5}",),
        ("methods.0.alpha={q = 3.0, v = 20.0}", "methods.0.rank={q = 5, v = 2}"),
        ('methods.0.scaling="sqrt_rank"', "methods.0.rank={q = 5, v = 2}"),
    ],
    ids=["ranks", "alphas", "stabilised"],
)
def test_ranks_and_scales_of_each_target_are_in_what_peft_loads(base, settings, request, ranks2, tmp_path):
    folder = request.getfixturevalue(base)
    trained(ranks2, write_job(tmp_path, folder), tmp_path / "run", *settings)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run" / "delta").eval()
    with torch.no_grad():
        theirs = model(torch.arange(40)[None] % 300).logits[0].numpy()
    np.testing.assert_allclose(ranks2.run(logits_of_run, str(tmp_path / "run"))[0], theirs, atol=1e-5)


def test_rank_stabilised_scaling_is_pefts(llama_base, ranks2, tmp_path):
    """PEFT's own model with `use_rslora`, given our A and B as they are, gives our logits."""
    settings = ('methods.0.scaling="sqrt_rank"', "methods.0.rank=5")
    trained(ranks2, write_job(tmp_path, llama_base), tmp_path / "run", *settings)
    config = LoraConfig(r=5, lora_alpha=12, target_modules=["q_proj", "v_proj"], use_rslora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_base), config).eval()
    told = set_peft_model_state_dict(model, load_file(tmp_path / "run" / "delta" / "adapter_model.safetensors"))
    assert not told.unexpected_keys
    with torch.no_grad():
        theirs = model(torch.arange(40)[None] % 300).logits[0].numpy()
    np.testing.assert_allclose(ranks2.run(logits_of_run, str(tmp_path / "run"))[0], theirs, atol=1e-5)


def logits_of_run(ranks, run: str) -> np.ndarray:
    """Our logits for a fixed text, from the run's delta on the sharded base."""
    import io
    from pathlib import Path

    from transformers import DynamicCache

    from pipeline.job.read import read_job
    from pipeline.methods.files import restore
    from pipeline.model.causal import Decode
    from pipeline.runs.session import open_session
    from pipeline.screen import Screen
    from pipeline.weights.manifest import read_manifest

    session = open_session(read_job(Path(run) / "job.toml"), ranks, Screen(io.StringIO(), shown=False))
    restore(session.delta, Path(run) / "delta", read_manifest(Path(run) / "delta").base_digest)
    session.root.eval()
    cache = DynamicCache(config=session.root.model.config)
    rows = []
    with torch.no_grad():
        for place in range(40):
            (logits,) = session.root(
                decode=Decode(torch.tensor([[place % 300]]), torch.ones(1, place + 1, dtype=torch.long), torch.tensor([[place]]), cache)
            )
            rows.append(logits[0].numpy())
    session.engine.release()
    return np.stack(rows)


@pytest.mark.parametrize("base", ["gpt2_base", "llama_base"])
def test_a_plain_peft_loop_trains_the_same(base, request, ranks2, tmp_path):
    folder = request.getfixturevalue(base)
    job = write_job(tmp_path, folder)
    settings = ("train.warmup_steps=2", "train.weight_decay=0.05", "train.steps=6")
    start = trained(ranks2, job, tmp_path / "start", *settings, "train.steps=1")  # the first step has no learning rate
    ours = trained(ranks2, job, tmp_path / "run", *settings)

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "start" / "delta", is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.01, weight_decay=0.05)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
    losses = []
    for step in range(6):
        total, count = torch.zeros(()), 0
        for index in Stream((len(rows),), 1).examples(6 * step, 6):
            prompt = tokenizer(rows[index]["prompt"] + " ->")["input_ids"]
            target = tokenizer(rows[index]["completion"])["input_ids"] + [tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
            count += len(target)
        (total / count).backward()
        if base == "gpt2_base":
            _keep_blocks(model)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(total.detach() / count))
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    theirs = {name.replace(".default", ""): p.detach().numpy() for name, p in model.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.tensors.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours.tensors[name], tensor, atol=3e-5, err_msg=name)
    assert any(np.abs(ours.tensors[name] - start.tensors[name]).max() > 1e-3 for name in theirs)


def _keep_blocks(model) -> None:
    """PEFT's fused pair has one block per role in ours; outside the blocks B is zero and, for this comparison, stays so."""
    width, rank = model.config.n_embd, 3
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            keep = torch.zeros_like(parameter)
            keep[:width, :rank] = 1
            keep[2 * width :, rank:] = 1
            parameter.grad *= keep


def test_the_fused_pair_is_exact(gpt2_base, ranks1, tmp_path):
    run = tmp_path / "run"
    trained(ranks1, write_job(tmp_path, gpt2_base), run)
    config = json.loads((run / "delta" / "adapter_config.json").read_text())
    tensors = load_file(run / "delta" / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    assert (config["r"], config["lora_alpha"]) == (6, 24.0)
    assert b.shape == (96, 6)
    assert not b[32:64].any(), "rows of k must be zero"
    assert b[:32, :3].any()
    assert not b[:32, 3:].any()
    assert b[64:, 3:].any()
    assert not b[64:, :3].any()
