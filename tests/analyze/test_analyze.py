"""`zlora analyze` of trained and written deltas against numpy and scipy on the same files, and at the command line."""

from __future__ import annotations

import json
import shutil
import weakref
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.analyze import walk as walking
from pipeline.analyze.figures import four, middle
from pipeline.analyze.report import analyze
from pipeline.job.errors import JobError
from pipeline.weights.delta import keys_of, write_delta
from pipeline.weights.digest import base_digest, file_digests
from pipeline.weights.index import open_checkpoint
from pipeline.weights.manifest import Module, Replaced
from pipeline.weights.read import Reader
from tests.deltas.conftest import make_delta
from tests.training import trained, write_job

WIDTH = 32
FIGURES = {"spectra", "similarity", "similarity_by_layer", "weight_and_update", "amplification"}


@pytest.fixture(scope="module")
def two(gpt2_base, ranks1, tmp_path_factory) -> tuple[Path, Path]:
    """Trained on GPT-2's fused map at two ranks, from two seeds."""
    folder = tmp_path_factory.mktemp("two")
    job = write_job(folder, gpt2_base)
    for name, rank, seed in (("r3", 3, 1), ("r5", 5, 2)):
        trained(ranks1, job, folder / name, f"methods.0.rank={rank}", f"train.seed={seed}")
    return folder / "r3", folder / "r5"


@pytest.fixture(scope="module")
def report(two, gpt2_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "analysis"
    found = analyze(two, str(gpt2_base), out=out, limit=4)
    assert json.loads((out / "analysis.json").read_text()) == json.loads(json.dumps(found))
    return found, out


def tensors(folder) -> dict[str, np.ndarray]:
    return {name: tensor.astype(np.float64) for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def phi(one, other, i, j) -> float:
    """By scipy's principal angles."""
    return float(np.mean(np.cos(scipy.linalg.subspace_angles(one[:, :i], other[:, :j])) ** 2))


def same_phi(found, one, other, grid=None, limit=None):
    grid = grid or range(1, min(limit or len(found), one.shape[1]) + 1)
    count = min(limit or other.shape[1], other.shape[1])
    assert np.shape(found) == (len(grid), count)
    wanted = [[phi(one, other, i, j) for j in range(1, count + 1)] for i in grid]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def same_update(found, w, dw, r):
    """Spectrum, projections of W and figure 8's similarities, from W [D, K] and dW."""
    u, s, vh = np.linalg.svd(dw, full_matrices=False)
    np.testing.assert_allclose(found["singular_values"][:r], s[:r], rtol=1e-5)
    assert found["norm"] == pytest.approx(np.linalg.norm(dw), rel=1e-5)
    assert found["stable_rank"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
    assert found["effective_rank"] == pytest.approx(np.exp(scipy.stats.entropy(s)), rel=1e-4)
    assert found["directions_for_90_percent"] == 1 + int((np.cumsum(s**2) < 0.9 * (s**2).sum()).sum())
    wu, _, wvh = np.linalg.svd(w, full_matrices=False)
    row = found["amplification"]
    assert row["directions"] == found["directions"] == r
    assert row["w_in_dw"] == pytest.approx(np.linalg.norm(u[:, :r].T @ w @ vh[:r].T), rel=1e-5)
    assert row["w_in_w"] == pytest.approx(np.linalg.norm(wu[:, :r].T @ w @ wvh[:r].T), rel=1e-5)
    assert row["factor"] == pytest.approx(np.linalg.norm(s[:r]) / row["w_in_dw"], rel=1e-5)
    # One draw of a chance that is r ||W|| / sqrt(D K).
    assert 0 < row["w_in_random"] < 3 * r * np.linalg.norm(w) / np.sqrt(w.size)
    same = found["w_similarity"]
    same_phi(same["right"], wvh.T, vh[:r].T, same["i"])
    same_phi(same["left"], wu, u[:, :r], same["i"])


def test_each_part_of_a_fused_map_is_what_scipy_finds(report, two, gpt2_base):
    found, _ = report
    base, deltas = tensors(gpt2_base), [tensors(run / "delta") for run in two]
    assert [(row["layer"], row["role"]) for row in found["maps"]] == [(layer, role) for layer in range(3) for role in "qv"]
    for row in found["maps"]:
        module, part = f"transformer.h.{row['layer']}.attn.c_attn", "qkv".index(row["role"])
        assert (row["module"], row["shape"]) == (module, [WIDTH, WIDTH])
        rows = slice(WIDTH * part, WIDTH * (part + 1))
        w = base[f"{module}.weight"].T[rows]
        assert row["w"]["norm"] == pytest.approx(np.linalg.norm(w), rel=1e-6)
        pairs = []
        for place, (delta, r) in enumerate(zip(deltas, (3, 5), strict=True)):
            a, b = (delta[key] for key in keys_of(module))
            own = slice(0, r) if part == 0 else slice(r, 2 * r)
            pairs.append((a[own], b[rows, own]))
            same_update(row["deltas"][place], w, (b @ a)[rows] * 12 / r, r)
            assert row["deltas"][place]["rank"] == r
        svds = [[np.linalg.svd(m, full_matrices=False) for m in (a, b, b @ a)] for a, b in pairs]
        for which, bases in (
            ("a", [each[0][2].T for each in svds]),
            ("b", [each[1][0] for each in svds]),
            ("right", [each[2][2].T[:, :r] for each, r in zip(svds, (3, 5), strict=True)]),
            ("left", [each[2][0][:, :r] for each, r in zip(svds, (3, 5), strict=True)]),
        ):
            same_phi(row["similarity"][which], *bases, limit=4)
        assert np.shape(row["similarity"]["random"]) == (3, 4)


def test_the_summary_is_of_the_rows(report):
    found, _ = report
    (entry,) = (entry for entry in found["summary"] if entry["role"] == "v")
    norms = [row["deltas"][1]["norm"] for row in found["maps"] if row["role"] == "v"]
    told = entry["deltas"][1]["norm"]
    assert (told["mean"], told["least"], told["most"]) == pytest.approx((np.mean(norms), min(norms), max(norms)))
    assert (told["least_layer"], told["most_layer"]) == (int(np.argmin(norms)), int(np.argmax(norms)))
    assert (entry["layers"], entry["deltas"][1]["ranks"]) == (3, [5])
    firsts = [row["similarity"]["a"][0][0] for row in found["maps"] if row["role"] == "v"]
    assert entry["similarity"]["a"]["first"]["mean"] == pytest.approx(np.mean(firsts))


def test_the_pictures_are_there_and_show_something(report):
    _, out = report
    assert {file.name for file in out.iterdir() if not file.name.startswith("events.")} == {
        "analysis.json",
        *(f"{name}.{form}" for name in FIGURES for form in ("png", "svg")),
    }
    for name in FIGURES:
        picture = matplotlib.image.imread(out / f"{name}.png")[..., :3]
        assert min(picture.shape[:2]) > 200
        assert (picture.min(-1) < 0.9).mean() > 0.02, "no blank page"
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")
    (events,) = out.glob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    assert set(board.Tags()["images"]) == FIGURES
    assert [event.step for event in board.Scalars("delta_2_factor/q")] == [0, 1, 2]


def test_the_papers_layers():
    assert (middle(range(1, 97)), four(range(1, 97))) == (48, [1, 32, 64, 96])
    assert (middle([5]), four([5])) == (5, [5])


def test_a_delta_beside_itself_is_the_same_everywhere(two):
    found = analyze([two[0], two[0] / "delta"])
    for row in found["maps"]:
        assert all(np.diag(row["similarity"][which]) == pytest.approx(1) for which in ("a", "b", "right", "left"))
        assert row["deltas"][0] == row["deltas"][1]
        assert (row["w"], row["deltas"][0]["amplification"], row["deltas"][0]["w_similarity"]) == (None, None, None)


def test_one_alone_is_compared_with_chance(two, gpt2_base):
    found = analyze(two[:1], str(gpt2_base), targets=("v",), layers=(0, 2))
    assert [(row["layer"], row["role"]) for row in found["maps"]] == [(0, "v"), (2, "v")]
    assert found["compared"][1] == "random"
    for row in found["maps"]:
        assert np.shape(row["similarity"]["a"]) == (3, 3)
        # E phi(3, 3) = 3 / 32.
        assert 0.01 < row["similarity"]["a"][2][2] < 0.3


def test_maps_that_are_not_square_and_shared_by_heads(llama_base, tmp_path):
    delta = make_delta(llama_base, tmp_path / "delta", 1, ("v_proj", "down_proj"))
    found, base, own = analyze([delta], str(llama_base)), tensors(llama_base), tensors(delta)
    assert [(row["role"], row["shape"]) for row in found["maps"][:2]] == [("v", [16, 32]), ("mlp_out", [32, 56])]
    for row in found["maps"]:
        a, b = (own[key] for key in keys_of(row["module"]))
        same_update(row["deltas"][0], base[f"{row['module']}.weight"], 2 * b @ a, 2)


def written(base, folder, pairs=(), copies=()) -> Path:
    """A delta with given pairs (module, A, B; alpha = R) and trained copies of the base's tensors."""
    digests = file_digests(open_checkpoint(base).files)
    stored = {key: torch.as_tensor(value) for module, *pair in pairs for key, value in zip(keys_of(module), pair, strict=True)}
    stored |= {name: torch.as_tensor(value) for name, value in dict(copies).items()}
    manifest = {
        "base": str(base),
        "base_digest": base_digest(digests),
        "base_files": digests,
        "job_digest": "",
        "step": 1,
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "modules": tuple(Module(name, f"{name}.weight", "c_" in name, a.shape[0], float(a.shape[0])) for name, a, _ in pairs),
        "replaced": tuple(Replaced(name, (name,)) for name in dict(copies)),
    }
    write_delta(folder, {name: tensor.float().contiguous() for name, tensor in stored.items()}, None, manifest)
    return folder


def test_what_was_trained_whole_is_compared_with_the_base(gpt2_base, two, tmp_path):
    base, rng = tensors(gpt2_base), np.random.default_rng(0)
    names = [f"transformer.h.1.{name}" for name in ("attn.c_attn.weight", "mlp.c_fc.weight", "attn.c_attn.bias")]
    names += ["transformer.wte.weight", "transformer.h.2.attn.c_proj.weight"]
    copies = {name: (base[name] + 0.1 * rng.standard_normal(base[name].shape)).astype(np.float32) for name in names[:4]}
    copies[names[4]] = base[names[4]].astype(np.float32)
    delta = written(gpt2_base, tmp_path / "full", copies=copies)
    found = analyze([delta, two[0]], str(gpt2_base), limit=6)
    rows = {(row["layer"], row["role"]): row for row in found["maps"]}
    assert [key for key, row in rows.items() if row["deltas"][0]] == [(1, "q"), (1, "k"), (1, "v"), (1, "mlp_in")]
    for role, module, rows_of in (("k", "attn.c_attn", slice(32, 64)), ("mlp_in", "mlp.c_fc", slice(None))):
        name, row = f"transformer.h.1.{module}.weight", rows[1, role]
        assert row["deltas"][0]["rank"] is None
        same_update(row["deltas"][0], base[name].T[rows_of], (copies[name].astype(np.float64) - base[name]).T[rows_of], 6)
        assert len(row["deltas"][0]["singular_values"]) == WIDTH
    similar = rows[1, "q"]["similarity"]
    assert (similar["a"], np.shape(similar["right"])) == (None, (6, 3)), "a copy has no A"
    whys = {one["name"]: one["why"] for one in found["deltas"][0]["left_out"]}
    assert set(whys) == {names[2], names[3], "transformer.h.2.attn.c_proj (o)"}
    assert "vector" in whys[names[2]]
    assert "base's own" in whys["transformer.h.2.attn.c_proj (o)"]
    with pytest.raises(JobError, match=r"has no dW to analyse: .*c_attn.weight.*Give --base"):
        analyze([delta])
    with pytest.raises(JobError, match="a vector, which has no singular directions"):
        analyze([written(gpt2_base, tmp_path / "bitfit", copies={names[2]: base[names[2]]})])


def test_parts_that_lie_head_by_head(families, tmp_path):
    base, rng = families("gpt_neox"), np.random.default_rng(0)
    module = "gpt_neox.layers.1.attention.query_key_value"
    a, b = rng.standard_normal((2, WIDTH)), rng.standard_normal((3 * WIDTH, 2))
    delta = written(base, tmp_path / "delta", [(module, a, b)])
    w = tensors(base)[f"{module}.weight"].reshape(4, 3, 8, WIDTH)
    for row in analyze([delta], str(base))["maps"]:
        part = "qkv".index(row["role"])
        own = b.reshape(4, 3, 8, 2)[:, part].reshape(WIDTH, 2)
        same_update(row["deltas"][0], w[:, part].reshape(WIDTH, WIDTH), own @ a, 2)
    (row,) = analyze([delta])["maps"]
    assert (row["role"], row["shape"]) == ("q+k+v", [3 * WIDTH, WIDTH]), "how many heads, the base alone knows"


def test_one_weight_of_the_base_at_a_time_and_none_that_is_not_asked_for(two, gpt2_base, monkeypatch):
    alive, most, readers = weakref.WeakSet(), [0], []
    read, made = walking.read_weight, walking.Reader

    def reading(*arguments):
        most[0] = max(most[0], len(alive) + 1)
        weight = read(*arguments)
        alive.add(weight)
        assert weight.numel() == WIDTH * WIDTH
        return weight

    monkeypatch.setattr(walking, "read_weight", reading)
    monkeypatch.setattr(walking, "Reader", lambda: readers.append(made()) or readers[-1])
    analyze(two, str(gpt2_base))
    assert most == [1]
    # Stored [K, D]: the rows of q, k and v lie side by side.
    assert readers[0].bytes_read == 6 * 3 * WIDTH * WIDTH * 4
    checkpoint = open_checkpoint(gpt2_base)
    assert readers[0].bytes_read < checkpoint.bytes
    assert isinstance(readers[0], Reader)


def test_the_randomised_svd_is_said_to_be_one(two, gpt2_base, monkeypatch):
    exact = analyze(two[:1], str(gpt2_base))["maps"][0]
    monkeypatch.setattr(walking, "EXACT_SIDE", 16)
    fast = analyze(two[:1], str(gpt2_base))["maps"][0]
    assert (exact["w"]["svd"], fast["w"]["svd"]) == ("exact, fp64", "randomised, fp32")
    assert fast["deltas"][0]["amplification"] == pytest.approx(exact["deltas"][0]["amplification"], rel=1e-3)
    np.testing.assert_allclose(fast["deltas"][0]["w_similarity"]["right"], exact["deltas"][0]["w_similarity"]["right"], atol=1e-3)
    assert analyze(two[:1], str(gpt2_base), exact=True)["maps"][0] == exact


def damaged(delta, folder, change) -> Path:
    shutil.copytree(delta, folder)
    change(folder)
    return folder


def test_what_does_not_fit_is_said(two, gpt2_base, llama_base, tmp_path):
    llama = make_delta(llama_base, tmp_path / "llama", 1)

    def refused(said, *arguments, **options):
        with pytest.raises(JobError, match=said):
            analyze(*arguments, **options)

    refused("its digest is .*, the delta .* was trained on", two[:1], str(llama_base))
    refused("were trained on different bases", [two[0], llama])
    refused("--layers: 9 is not changed .* There are 0, 1, 2", two[:1], layers=(9,))
    refused("--targets: o is not changed .* There are q, v", two[:1], targets=("o",))
    refused("change no map in common", [llama, make_delta(llama_base, tmp_path / "other", 1, ("o_proj",))])
    refused("no manifest.json here", [tmp_path / "nowhere"])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    refused("not empty", two[:1], out=tmp_path / "there")
    zero = ("transformer.h.0.attn.c_proj", np.ones((2, WIDTH)), np.zeros((WIDTH, 2)))
    refused(r"its B is zero: it adds nothing yet", [written(gpt2_base, tmp_path / "zero", [zero])])
    odd = ("transformer.h.0.attn.c_attn", np.ones((2, WIDTH)), np.ones((31, 2)))
    refused("31 rows, which are not 3 equal parts", [written(gpt2_base, tmp_path / "odd", [odd])])
    bad = ("transformer.h.0.attn.c_proj", np.full((2, WIDTH), np.nan), np.ones((WIDTH, 2)))
    refused("value that is not finite", [written(gpt2_base, tmp_path / "bad", [bad])])
    good = ("transformer.h.0.attn.c_proj", np.ones((2, WIDTH)), np.ones((WIDTH, 2)))
    wide = (good[0], np.ones((2, 2 * WIDTH)), good[2])
    pair = [written(gpt2_base, tmp_path / name, [one]) for name, one in (("good", good), ("wide", wide))]
    refused("of different sizes in the two deltas", pair)
    refused(r"adapts tensor .*, which in .* is of shape", pair[1:], str(gpt2_base))
    file = "adapter_model.safetensors"
    refused("cannot be read", [damaged(two[0] / "delta", tmp_path / "cut", lambda f: (f / file).write_bytes(b"cut"))])
    refused("sha256 is not the manifest's", [damaged(two[0] / "delta", tmp_path / "turned", lambda f: turn(f / file))])


def turn(file: Path) -> None:
    save_file({name: -tensor for name, tensor in load_file(file).items()}, file)


def test_a_base_that_is_not_finite_is_refused(gpt2_base, tmp_path):
    base = shutil.copytree(gpt2_base, tmp_path / "base")
    file = base / "model.safetensors"
    values = load_file(file)
    values["transformer.h.0.attn.c_proj.weight"][3, 4] = np.inf
    save_file(values, file, {"format": "pt"})
    pair = ("transformer.h.0.attn.c_proj", np.ones((2, WIDTH)), np.ones((WIDTH, 2)))
    with pytest.raises(JobError, match=r'tensor "transformer.h.0.attn.c_proj.weight" has values that are not finite'):
        analyze([written(base, tmp_path / "delta", [pair])], str(base), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_have_no_update(gpt2_base, ranks1, tmp_path):
    job = write_job(tmp_path, gpt2_base)
    adapter = ("methods=[{kind='adapter', placement='lin', rank=2}]", "train.steps=1")
    trained(ranks1, job, tmp_path / "run", *adapter)
    with pytest.raises(JobError, match=r"has no dW to analyse: .*of an adapter or of special tokens.* trained by lora, full or full_top"):
        analyze([tmp_path / "run"])


def test_at_the_command_line(two, gpt2_base, zlora, tmp_path):
    code, out, error = zlora("analyze", *two, "--base", gpt2_base, "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    for entry in found["summary"]:
        for told in entry["deltas"]:
            assert f"{told['factor']['mean']:.3g} ({told['factor']['least']:.3g} in {told['factor']['least_layer']} ..." in out
    assert "phi of the two" in out
    code, out, error = zlora("analyze", *two, "--base", gpt2_base, "--json")
    assert (code, error) == (0, "")
    assert json.loads(out) == found
    assert set(found) == {"schema_version", "deltas", "base", "asked", "compared", "summary", "maps"}
    code, out, error = zlora("analyze", two[0], "--layers", "0", "--directions", 1)
    assert (code, error) == (0, "")
    assert "without --base: what needs W is left out" in out
    code, out, error = zlora("analyze", two[0], "--layers", "first", "--json")
    assert (code, out) == (2, "")
    assert '--layers: "first" is no number' in error
