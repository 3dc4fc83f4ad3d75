"""A sweep's members: which there are, what they are called, what is refused."""

from __future__ import annotations

import pytest

from pipeline.job.errors import JobError
from pipeline.job.read import job_digest, job_toml, read_job, read_members
from tests.training import write_job

BASE = '[base]\nmodel = "gpt2"\n[[methods]]\nkind = "lora"\n[task]\nkind = "e2e"\n'


def members(tmp_path, text, overrides=()):
    job = tmp_path / "job.toml"
    job.write_text(BASE + text)
    return read_members(job, overrides)


def names(tmp_path, text, overrides=()):
    return [member.name for member, _ in members(tmp_path, text, overrides)]


def refused(tmp_path, text):
    with pytest.raises(JobError) as caught:
        members(tmp_path, text)
    return str(caught.value).removeprefix(f"{tmp_path / 'job.toml'}: ")


def test_a_grid_is_every_combination_typed_and_named_by_its_settings(tmp_path):
    found = members(tmp_path, '[sweep.grid]\n"methods.0.rank" = [4, 8]\ntrain.seed = [1, 2]\n"train.learning_rate" = [1e-4]\n')
    assert [member.name for member, _ in found] == [f"rank={r},seed={s},learning_rate=0.0001" for r in (4, 8) for s in (1, 2)]
    assert [(job.methods[0].rank, job.train.seed) for _, job in found] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert all(job.sweep is None for _, job in found)
    single = tmp_path / "single.toml"
    single.write_text(BASE + "[train]\nseed = 2\nlearning_rate = 1e-4\n".replace("[train]", "[train]"))
    assert job_digest(read_job(single, ("methods.0.rank=8",))) == job_digest(found[3][1]), "as if written alone"


def test_settings_one_by_one_and_crossed_with_a_grid(tmp_path):
    text = '[[sweep.settings]]\nmethods = [{kind = "bitfit"}]\n[[sweep.settings]]\ntrain.steps = 7\n[sweep.grid]\n"train.seed" = [1, 2]\n'
    assert names(tmp_path, text) == ["methods=bitfit,seed=1", "methods=bitfit,seed=2", "steps=7,seed=1", "steps=7,seed=2"]
    found = members(tmp_path, "[train]\nepochs = 2\n" + text, ("train.batch_examples=3",))
    assert [type(job.methods[0]).__name__ for _, job in found] == ["BitFit", "BitFit", "Lora", "Lora"]
    assert [(job.train.epochs, job.train.steps, job.train.batch_examples) for _, job in found[1:3]] == [(2, None, 3), (None, 7, 3)]


def test_names_are_plain_and_tell_members_apart(tmp_path):
    assert names(tmp_path, '[sweep.grid]\n"train.seed" = [1]\n"evaluate.seed" = [3]\n') == ["train.seed=1,evaluate.seed=3"]
    assert names(tmp_path, '[sweep.grid]\n"methods.0.targets" = [["q", "v"], ["q"]]\n') == ["targets=q+v", "targets=q"]
    assert names(tmp_path, '[sweep.grid]\n"base.model" = ["org/a b%j", "x"]\n'.replace("a b%j", "ab")) == ["model=ab", "model=x"]
    long = ", ".join(f'"{letter * 200}"' for letter in "ab")
    found = names(tmp_path, f'[sweep.grid]\n"base.revision" = [{long}]\n')
    assert len(set(found)) == 2
    assert max(map(len, found)) == 120
    (one, other) = names(tmp_path, '[sweep.grid]\n"base.model" = ["a/x", "b/x"]\n')
    assert one != other
    assert one.startswith("model=x-")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[sweep.grid]\n"train.sede" = [1]\n', 'sweep (sede=1): train.sede: unknown key. Did you mean "seed"?'),
        ('[sweep.grid]\n"train.seed" = [1, "two"]\n', 'sweep (seed=two): train.seed = "two": input should be a valid integer.'),
        ('[sweep.grid]\n"train.seed" = []\n', "sweep.grid.train.seed = []: empty. Give at least one."),
        ('[sweep.grid]\n"train.seed" = 1\n', "sweep.grid.train.seed = 1: not a list."),
        ("[sweep]\nmax_parallel = 2\n", "sweep: neither grid nor settings."),
        ("[sweep]\nmax_paralel = 2\n", 'sweep.max_paralel: unknown key. Did you mean "max_parallel"?'),
        ('[sweep.grid]\n"cluster.nodes" = [1, 2]\n', "sweep: cluster.nodes: the members of a sweep differ in what they train."),
        ('[sweep.grid]\n"train.seed" = [1, 1]\n', "two members have the same settings (seed=1)"),
        ('[sweep.grid]\n"train.seed" = [1]\n[[sweep.settings]]\ntrain.seed = 2\n', "sweep: train.seed: is in grid and in settings."),
        ('[sweep.grid]\n"methods.1.rank" = [4]\n', "sweep: methods.1.rank: 1 is not one of the 1 entries"),
    ],
)
def test_what_is_refused_is_named(text, says, tmp_path):
    assert says in refused(tmp_path, text)


def test_a_sweep_of_too_many_members_is_refused_at_once(tmp_path):
    values = list(range(200))
    text = "".join(f'"{key}" = {values}\n' for key in ("train.seed", "evaluate.seed", "train.save_every_steps"))
    assert "8,000,000 members. Make it 1,000 at most" in refused(tmp_path, f"[sweep.grid]\n{text}")


def test_a_job_with_a_sweep_survives_its_own_text(tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    plain = job_digest(read_job(job))
    job.write_text(job.read_text() + '[sweep]\nmax_parallel = 2\n[sweep.grid]\n"train.seed" = [1, 2]\nmethods.0.rank = [1, 2]\n')
    again = tmp_path / "again.toml"
    again.write_text(job_toml(read_job(job)))
    assert read_job(again) == read_job(job)
    assert [own for _, own in read_members(again)] == [own for _, own in read_members(job)]
    assert job_digest(read_job(job)) == plain
