"""What TensorBoard is given: curves that say something, settings beside scores in the run's own folder, texts as they are."""

from __future__ import annotations

import re
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from pipeline.evaluate.score import Prediction
from pipeline.job.read import read_job
from pipeline.methods.spectrum import singular_values
from pipeline.runs.report import comparable, markdown
from pipeline.train.board import Board
from tests.training import write_job

STEP = {
    **dict.fromkeys(("loss", "learning_rate", "grad_norm", "target_tokens_per_s", "examples_per_s", "step_s", "data_s"), 0.5),
    "loss_scale": 1.0, "skipped_steps": 0, "padding_share": 0.0, "peak_memory_bytes": 3 << 29,
}  # fmt: skip


def written(folder):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_a_curve_begins_where_it_says_something_and_goes_on_in_the_next_sitting(tmp_path):
    board = Board(tmp_path, 0)
    board.step(1, STEP)
    board.step(2, {**STEP, "padding_share": 0.25})
    board.close()
    board = Board(tmp_path, 2)
    board.step(3, STEP)
    board.close()
    events = written(tmp_path)
    assert [event.value for event in events.Scalars("speed/padding_share")] == [0.25, 0.0]
    assert not {"train/loss_scale", "train/skipped_steps"} & set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("memory/peak_GiB")] == [1.5] * 3


def test_settings_stand_beside_scores_in_the_same_run(tmp_path, gpt2_base):
    job = read_job(write_job(tmp_path / "run", gpt2_base))
    board = Board(tmp_path / "run", 0)
    board.settings(comparable(job), "valid", ("BLEU", "loss"))
    board.close()
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    plugin = written(tmp_path / "run").PluginTagToContent("hparams")
    head = metadata.parse_experiment_plugin_data(plugin["_hparams_/experiment"])
    assert [info.name.tag for info in head.metric_infos] == ["train/loss", "valid/BLEU", "valid/loss"]
    asked = metadata.parse_session_start_info_plugin_data(plugin["_hparams_/session_start_info"]).hparams
    assert (asked["method.rank"].number_value, asked["method.targets"].string_value) == (3, "q, v")
    assert asked["learning_rate"].number_value == 0.01
    layout = written(tmp_path / "run").Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert layout.index(b"valid/loss") < layout.index(b"valid/BLEU")
    assert b"train/loss" in layout


@pytest.mark.filterwarnings("ignore:html5lib:DeprecationWarning")
def test_samples_are_shown_as_they_are():
    from tensorboard.plugin_util import markdown_to_safe_html

    said = "# no heading\n*a* | b <b>c</b> & `d` [e](f) \\g _h_ 1. i\n- j"
    shown = markdown(SimpleNamespace(parts=[SimpleNamespace(predictions=[Prediction("p", said, ()), Prediction("q", "", ("r",))])]))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", markdown_to_safe_html(shown), re.DOTALL)
    assert [unescape(re.sub(r"<br ?/?>", "\n", cell)) for cell in cells] == ["p", said, "(withheld)", "q", "", "r"]


@pytest.mark.parametrize(("outputs", "rank"), [(24, 4), (24, 1), (3, 8)])
def test_singular_values_are_those_of_the_update(outputs, rank):
    """Beside numpy's of the whole product."""
    generator = torch.Generator().manual_seed(0)
    values = {"m.0.a": torch.randn(rank, 40, generator=generator), "m.0.b": torch.randn(outputs, rank, generator=generator)}
    branch = SimpleNamespace(name="m.0", target="q", scale=2.5)
    adapted = tuple(SimpleNamespace(module=f"h.{layer}.attn", branches=[branch]) for layer in (2, 10))
    found = singular_values(adapted, values)
    assert list(found) == ["layer_02.q", "layer_10.q"]
    whole = np.linalg.svd((2.5 * values["m.0.b"] @ values["m.0.a"]).numpy(), compute_uv=False)[: min(rank, outputs)]
    np.testing.assert_allclose(found["layer_02.q"].numpy()[: len(whole)], whole, rtol=1e-5)


def test_values_out_of_range_give_no_histogram(tmp_path):
    values = {"m.0.a": torch.full((2, 4), float("inf")), "m.0.b": torch.ones(4, 2)}
    adapted = (SimpleNamespace(module="h.0.attn", branches=[SimpleNamespace(name="m.0", target="q", scale=1.0)]),)
    found = singular_values(adapted, values)
    board = Board(tmp_path, 0)
    board.singular_values(1, found)
    board.close()
    assert written(tmp_path).Tags()["histograms"] == []
