"""The one DeepSpeed dict: what a memory configuration may hold, and what is always set."""

from __future__ import annotations

import json
import re

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.job.errors import JobError
from pipeline.job.files import memory_config, shipped
from pipeline.job.read import read_job
from pipeline.job.zero import complete, deepspeed_config, for_deepspeed, nvme_path_of, one_by_one, zero_stage
from pipeline.job.zero_keys import ZERO_KEYS
from tests.training import write_job

SHIPPED = sorted(path.name for path in shipped("ds_configs").glob("*.json"))


def write(folder, value):
    file = folder / "memory.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def test_a_sharded_and_a_whole_configuration_are_shipped():
    assert {"zero0.json", "zero3.json"} <= set(SHIPPED)
    assert zero_stage(deepspeed_config(memory_config("zero0.json"))) == 0
    assert zero_stage(deepspeed_config(memory_config("zero3.json"))) == 3


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_is_passed_on_but_for_groups_and_files_and_deepspeed_knows_its_keys(name):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    written = json.loads(memory_config(name).read_text())["zero_optimization"]
    told = for_deepspeed(deepspeed_config(memory_config(name), "/scratch"))["zero_optimization"]
    ours = {"zero_hpz_partition_size"} | ({"offload_param"} if name == "zero3_nvme.json" else set())
    assert {key for key in written if told.get(key) != written[key]} == ours & set(written)
    known = {text for key, field in DeepSpeedZeroConfig.model_fields.items() for text in (key, field.alias)}
    assert set(written) <= known
    DeepSpeedZeroConfig(**written)
    asked = DeepSpeedZeroConfig(**told)
    assert asked.zero_hpz_partition_size == 1
    assert asked.offload_param is None or asked.offload_param.device == "cpu"


@pytest.mark.parametrize("name", SHIPPED)
def test_clipping_and_accumulation_are_never_left_to_deepspeeds_defaults(name):
    config = deepspeed_config(memory_config(name), "/scratch")
    assert config["gradient_clipping"] == 0.0
    assert config["gradient_accumulation_steps"] == 1
    assert not {"optimizer", "scheduler", "fp16", "bf16"} & set(config)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("gradient_clipping", "train.clip_norm"),
        ("train_batch_size", "train.batch_examples"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_tokens"),
        ("optimizer", "train.learning_rate"),
        ("scheduler", "train.schedule"),
        ("fp16", "base.dtype"),
        ("bf16", "base.dtype"),
        ("steps_per_print", "Leave it out"),
        ("zero_optimisation", "Did you mean zero_optimization?"),
        ("frobnicate", "DeepSpeed does not know it and would ignore it. Leave it out."),
    ],
)
def test_a_key_that_has_no_place_is_refused_with_what_to_do_instead(tmp_path, key, instead):
    file = write(tmp_path, {"zero_optimization": {"stage": 3}, key: "auto"})
    with pytest.raises(JobError, match=re.escape(f"{file}: {key}: ")) as caught:
        deepspeed_config(file)
    assert instead in str(caught.value)
    assert key not in deepspeed_config(file, lenient=True) or key in complete({"zero_optimization": {"stage": 3}})


def test_all_such_keys_are_named_at_once(tmp_path):
    file = write(tmp_path, {"zero_optimization": {"stage": 3, "stage3_max_live_parameter": 1}, "fp16": {}, "optimizer": {}})
    with pytest.raises(JobError) as caught:
        deepspeed_config(file)
    for text in ("fp16: ", "optimizer: ", "zero_optimization.stage3_max_live_parameter: ", "Did you mean stage3_max_live_parameters?"):
        assert text in str(caught.value)


def test_the_keys_are_deepspeed_s_own():
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {text for key, field in DeepSpeedZeroConfig.model_fields.items() for text in (key, field.alias) if text}
    assert known == ZERO_KEYS
    # One of those is refused by DeepSpeed too, one at the top is not.
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        DeepSpeedZeroConfig(stage3_max_live_parameter=1)
    DeepSpeedConfig({"train_batch_size": 1, "frobnicate": 1})


@pytest.mark.parametrize("stage", [1, 2, 4, -1, None, "3"])
def test_a_stage_that_shards_nothing_here_is_refused_with_the_two_that_work(tmp_path, stage):
    with pytest.raises(JobError) as caught:
        deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": stage}}))
    assert f"zero_optimization.stage = {json.dumps(stage)}" in str(caught.value)
    assert "Use 3" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"zero_optimization": 3}', '{"zero_optimization": null}'])
def test_a_file_of_another_form_is_refused_by_name(tmp_path, text):
    with pytest.raises(JobError, match=r"memory\.json: not a"):
        deepspeed_config(write(tmp_path, text))


def test_a_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    file = tmp_path / "memory.json"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match=r"memory\.json: not a readable JSON file"):
        deepspeed_config(file)


def test_a_missing_stage_is_refused(tmp_path):
    with pytest.raises(JobError, match="stage = null"):
        deepspeed_config(write(tmp_path, {"zero_optimization": {}}))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights: .*Set memory.int8_gathers = true in the job"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights: .*Set memory.int8_gathers = true in the job"),
        ({"zero_hpz_partition_size": "many"}, 'zero_hpz_partition_size = "many": not a number of ranks'),
        ({"zero_hpz_partition_size": -1}, "zero_hpz_partition_size = -1: not a number of ranks"),
        ({"offload_param": "cpu"}, 'offload_param = "cpu": not an object'),
        ({"offload_param": {"device": "disk"}}, 'offload_param.device = "disk": not a place for shards'),
        ({"offload_param": {"device": "nvme"}}, "offload_param.nvme_path: missing.*memory.nvme_path"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/a", "pin_memory": True}}, "offload_param.pin_memory: .*cannot be pinned"),
    ],
)
def test_where_shards_cannot_be_is_refused(extra, says, tmp_path):
    with pytest.raises(JobError, match=f"memory.json: zero_optimization.{says}"):
        deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": 3, **extra}}))


def test_the_folder_for_shards_on_disk_is_named_once(tmp_path):
    def folder(of_file, of_job):
        place = {"device": "nvme"} | ({"nvme_path": of_file} if of_file else {})
        return nvme_path_of(deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": 3, "offload_param": place}}), of_job))

    assert (folder("/a", None), folder(None, "/b"), folder("/a", "/a")) == ("/a", "/b", "/a")
    with pytest.raises(JobError, match=r'nvme_path = "/a", but the job has memory.nvme_path = "/b"'):
        folder("/a", "/b")


def test_a_job_with_a_file_that_names_no_folder_is_refused_when_it_is_read(tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    with pytest.raises(JobError, match=r"zero3_nvme.json: .*nvme_path: missing"):
        read_job(job, ("memory.config=zero3_nvme.json",))
    read_job(job, ("memory.config=zero3_nvme.json", "memory.nvme_path=/scratch"))


@pytest.mark.parametrize("kind", ["full", "full_top"])
def test_groups_do_not_train_the_base_itself(kind, tmp_path, gpt2_base):
    job = write_job(tmp_path, gpt2_base)
    job.write_text(re.sub(r'kind = "lora"\n.*?\n\[task\]', f'kind = "{kind}"\n[task]', job.read_text(), flags=re.DOTALL))
    with pytest.raises(JobError, match=f'zero_hpz_partition_size = 8: .*"{kind}" trains it. Use zero3.json'):
        read_job(job, ("memory.config=zero3_node.json",))
    read_job(job)


@pytest.mark.parametrize("key", ["stage3_allgather_sequential", "allgather_sequential"])
def test_parameters_are_gathered_one_by_one_unless_the_file_says_otherwise(tmp_path, key):
    plain = deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": 3}}))
    assert DeepSpeedZeroConfig(**plain["zero_optimization"]).allgather_sequential is True
    assert one_by_one(plain)
    asked = deepspeed_config(write(tmp_path, {"zero_optimization": {"stage": 3, key: False}}))
    assert DeepSpeedZeroConfig(**asked["zero_optimization"]).allgather_sequential is False
    assert not one_by_one(asked)
