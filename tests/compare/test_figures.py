"""The pictures: what is drawn where, and that something is seen."""

from __future__ import annotations

import math

import matplotlib.image
import numpy as np
import pytest

from pipeline.compare import figures
from pipeline.compare.collect import collect
from pipeline.compare.group import compare
from pipeline.job.errors import JobError
from tests.compare.folders import ADAPTER, LORA, spread_of, write_run

BLEU = {1: (0.50, 0.54), 16: (0.60, 0.66)}
PAPER = '[published]\nsource = "a table"\nparameters = 350_000\nscores = { "valid BLEU" = 0.704 }\n'


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    for rank, scores in BLEU.items():
        for seed, bleu in enumerate(scores, 1):
            job = (LORA, f"methods.0.rank={rank}", f"train.seed={seed}")
            write_run(folder / f"{rank}-{seed}", *job, more=PAPER, scores={"BLEU": bleu, "perplexity": 9.0}, parameters=1000 * rank)
    write_run(folder / "adapter", ADAPTER, scores={"BLEU": 0.4, "perplexity": 8.0}, parameters=5000)
    write_run(folder / "half", LORA, "train.seed=9", finished=False, scores={"BLEU": 0.4})
    return compare(collect([folder]))


@pytest.fixture
def kept(monkeypatch):
    """The figure beside its file."""
    found = []
    save = figures._save

    def keep(figure, handles, file):
        found.append(figure)
        save(figure, handles, file)

    monkeypatch.setattr(figures, "_save", keep)
    return found


def axes_of(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_scores_stand_against_the_logarithm_of_what_is_trained(study, kept, tmp_path):
    file = tmp_path / "made" / "scores.png"
    figures.draw_scores(study, file)
    (figure,) = kept
    assert [*axes_of(figure)] == ["valid BLEU", "valid perplexity"]
    assert legend_of(figure) == ["lora", "adapter lin", "published"]
    lora, adapter, published = axes_of(figure)["valid BLEU"].containers
    assert lora[0].get_xdata().tolist() == pytest.approx([3.0, math.log10(16000)])
    assert lora[0].get_ydata().tolist() == pytest.approx([0.52, 0.63])
    for segment, values in zip(lora[2][0].get_segments(), BLEU.values(), strict=True):
        low, high = segment[:, 1]
        assert high - low == pytest.approx(2 * spread_of(*values))
    assert published[0].get_xdata().tolist() == pytest.approx([math.log10(350_000)])
    assert published[0].get_ydata().tolist() == [0.704]
    assert (published[0].get_markerfacecolor(), published[0].get_color()) == ("none", lora[0].get_color())
    assert adapter[0].get_xdata().tolist() == pytest.approx([math.log10(5000)])
    seen = matplotlib.image.imread(file)[..., :3]
    assert seen.std() > 0.05
    for colour in ("#5e81ac", "#bf616a"):
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
        assert (np.abs(seen - wanted).max(axis=-1) < 0.02).sum() > 50, colour


def test_curves_are_means_over_seeds_with_a_band(study, kept, tmp_path):
    file = tmp_path / "curves.svg"
    figures.draw_curves(study, file, ("BLEU",))
    (figure,) = kept
    panels = axes_of(figure)
    assert [*panels] == ["train loss, mean of 4 steps", "valid BLEU"]
    assert legend_of(figure) == ["lora q+v r=1", "lora q+v r=16", "adapter lin r=6", "lora q+v r=4", "not counted"]
    lines = panels["valid BLEU"].get_lines()
    assert lines[0].get_xdata().tolist() == [100, 200, 400]
    assert lines[0].get_ydata().tolist() == pytest.approx([0.52 / 4, 0.52 / 2, 0.52])
    assert [line.get_linestyle() for line in lines] == ["-", "-", "-", "--"]
    band = panels["valid BLEU"].collections[0].get_paths()[0].get_extents()
    assert band.y1 == pytest.approx(0.52 + spread_of(*BLEU[1]))
    loss = panels["train loss, mean of 4 steps"].get_lines()[0]
    assert loss.get_xdata()[:2].tolist() == [4, 8]
    assert loss.get_ydata()[0] == pytest.approx(3.0 - 2.0 * 2.5 / 400)
    assert "<svg" in file.read_text()


def test_tasks_have_panels_of_their_own_and_settings_lines(tmp_path, kept):
    for name in ("rte", "mrpc"):
        for rate in ("1e-3", "1e-4"):
            job = ('task={kind="glue", name="' + name + '"}', f"train.learning_rate={rate}")
            write_run(tmp_path / f"{name}{rate}", *job, scores={"accuracy": 0.7})
    figures.draw_scores(compare(collect([tmp_path])), tmp_path / "scores.pdf")
    assert {*axes_of(kept[0])} == {"valid accuracy\nname=rte", "valid accuracy\nname=mrpc"}
    assert legend_of(kept[0]) == ["lora, learning_rate=0.001", "lora, learning_rate=0.0001"]
    assert (tmp_path / "scores.pdf").read_bytes().startswith(b"%PDF")


def test_what_cannot_be_drawn_is_said(study, tmp_path):
    with pytest.raises(JobError, match=r"scores.jpg: the name of a picture ends in .png, .svg, .pdf"):
        figures.refuse_ending(tmp_path / "scores.jpg")
    half = write_run(tmp_path / "half", LORA, finished=False)
    with pytest.raises(JobError, match=r"--plot .* no run here has a score"):
        figures.draw_scores(compare(collect([half])), tmp_path / "scores.png")
    (half / "metrics.jsonl").unlink()
    with pytest.raises(JobError, match=r"--curves .* no run here has taken a step"):
        figures.draw_curves(compare(collect([half])), tmp_path / "curves.png")
    assert not (tmp_path / "scores.png").exists()
