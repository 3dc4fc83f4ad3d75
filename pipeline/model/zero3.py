"""The one place that knows partitioned parameters: makes them from shapes alone, fills them, releases them.

A ZeRO-3 parameter of n elements on W ranks is W equal runs of ceil(n / W) elements of the flattened tensor; rank r holds run r
in `ds_tensor`, the last runs padded with zeros. A table of the vocabulary is cut between rows, so that ranks can use their runs as
they are (pipeline/model/vocabulary.py), and DeepSpeed never gathers it.
Written against deepspeed 0.19.8: `_convert_to_deepspeed_param` is private.

W is all ranks, or a group of consecutive ones (`zero_hpz_partition_size`), each group with a copy of the base. DeepSpeed's own way
keeps a second, finer partition over all ranks, for weights that change; these are frozen, so what a group holds never leaves it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import Init, MultipleAllGatherHandles, PartitionedParamStatus, ZeroParamStatus
from pydantic import ValidationError
from torch import nn

from pipeline.job.errors import JobError
from pipeline.job.zero import for_deepspeed, group_of, int8_gathers, nvme_path_of
from pipeline.model.int8 import Int8
from pipeline.plan.prefetch import prefetch_of
from pipeline.weights.mapped import mapped

Fill = Callable[[int, torch.Tensor], None]
"""(first element, destination 1-D tensor) -> writes the elements from there on into the destination."""
_EVER = timedelta(days=1)
"""The watchdog gives up first (pipeline/train/engine.py)."""
_NEXT = -1
"""In place of a module's number among a parameter's users: the next micro-batch."""


class Partitioner:
    """Makes ZeRO-3 parameters that were never whole. All ranks make one together.

    Raises:
        JobError: DeepSpeed does not know a key of the memory configuration, or not its value; groups that do not divide the ranks.
    """

    def __init__(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        # Constructed, not entered: entering would hook every module's constructor.
        try:
            self._init = Init(config_dict_or_path=for_deepspeed(config), dtype=dtype, data_parallel_group=_group(group_of(config)))
            self._int8 = Int8(self._init.num_partitions, self._init.local_device) if int8_gathers(config) else None
            # Its own would compile CUDA kernels.
            self._init.quantizer_module = self._int8
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise JobError(f"memory.config: zero_optimization.{key}: {problem['msg']}. Mend that key of the file.") from None
        self._dtype = dtype
        self._nvme_path = nvme_path_of(config)

    def parameter(self, shape: tuple[int, ...], fill: Fill, by_rows: bool = False) -> nn.Parameter:
        """A frozen partitioned parameter; `fill` is asked for this rank's run only.

        Args:
            by_rows: of [V, D], each rank has whole rows; whoever uses it knows that (`rows.own_rows`).
        """
        numel = torch.Size(shape).numel()
        # Any: DeepSpeed hangs its own attributes on parameters and shards.
        parameter: Any = nn.Parameter(torch.empty(0, dtype=self._dtype, device=self._init.local_device), requires_grad=False)
        self._init._convert_to_deepspeed_param(parameter)
        if self._int8:
            parameter.int8 = self._int8
            parameter.all_gather_coalesced = _in_int8(parameter.all_gather_coalesced, self._int8)
        ranks = parameter.ds_zero_partition_world_size
        parameter.ds_shape = torch.Size(shape)
        parameter.ds_numel = numel
        if by_rows:
            parameter.row_elements = shape[1]
        first, held = run_of(parameter)
        run = _run_elements(parameter)
        remote = "cpu" if self._nvme_path else self._init.remote_device
        shard: Any = torch.empty(run, dtype=self._dtype, device=str(getattr(remote, "value", remote)))
        if shard.device != parameter.device and self._init.pin_memory and not self._nvme_path:
            shard = shard.pin_memory()
        fill(first, shard[:held])
        shard[held:].zero_()
        if self._nvme_path:
            shard = mapped(shard, self._nvme_path)
        shard.ds_numel = run
        shard.status = PartitionedParamStatus.AVAILABLE
        shard.final_location = None
        parameter.ds_numel_aligned = run * ranks
        parameter.ds_tensor = shard
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return parameter


def _in_int8(gather: Any, int8: Int8) -> Any:
    """DeepSpeed's gather of several parameters, matrices in 8 bits. Norms and biases are few, and come as they are."""

    def gathered(parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
        del quantize  # DeepSpeed knows nothing of it
        matrices: list[Any] = []
        vectors: list[Any] = []
        for parameter in parameters:
            (matrices if len(parameter.ds_shape) > 1 and not int8.resting else vectors).append(parameter)
        handles = [gather(each, safe_mode, quantize=each is matrices) for each in (vectors, matrices) if each]
        return handles[0] if len(handles) == 1 else MultipleAllGatherHandles(handles)

    return gathered


def _group(count: int | None) -> dist.ProcessGroup | None:
    """This rank's group of so many; None: all ranks."""
    ranks = dist.get_world_size()
    if count is None or count == ranks:
        return None
    if ranks % count:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise JobError(
            f"memory.config: zero_optimization.zero_hpz_partition_size = {count}: groups of that many do not divide {ranks} ranks. "
            f"Use one of {fitting}.",
            everywhere=True,
        )
    return dist.new_subgroups(count, timeout=_EVER)[0]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def numel_of(parameter: nn.Parameter) -> int:
    """Elements of the whole tensor, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shard_of(parameter: nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter between steps."""
    return getattr(parameter, "ds_tensor", parameter.data)


def run_of(parameter: nn.Parameter) -> tuple[int, int]:
    """First element and number of elements of the flattened whole tensor that this rank's shard holds, padding not counted."""
    numel, run = numel_of(parameter), _run_elements(parameter)
    rank: int = getattr(parameter, "ds_zero_partition_rank", 0)
    first = min(run * rank, numel)
    return first, min(run, numel - first)


def _run_elements(parameter: nn.Parameter) -> int:
    ranks: int = getattr(parameter, "ds_zero_partition_world_size", 1)
    row: int = getattr(parameter, "row_elements", 1)
    return -(-numel_of(parameter) // row // ranks) * row


class _Parameters(ZeROOrderedDict):
    """DeepSpeed's own dict of a module's parameters gathers what is read from it."""

    __getitem__ = OrderedDict.__getitem__


def release_rows(root: nn.Module) -> None:
    """Takes ZeRO's hooks from modules that use their rows as they are, so that nothing gathers these."""
    for module in root.modules():
        if any(hasattr(p, "row_elements") for p in module.parameters(recurse=False)):
            module._parameters = _Parameters(module, module._parameters.items())
            module._forward_pre_hooks, module._forward_hooks = _not_zero_s(module._forward_pre_hooks), _not_zero_s(module._forward_hooks)


class Keeping:
    """Weights that a micro-batch leaves gathered for the next one of the step, where the memory configuration lets all of them be at once.

    The plan reckons with it: pipeline/plan/gathering.py.
    """

    def __init__(self, root: nn.Module, zero: dict[str, Any]) -> None:
        # Any: see Partitioner.
        parameters: list[Any] = [p for p in root.parameters() if hasattr(p, "ds_tensor") and not hasattr(p, "row_elements")]
        self._parameters = parameters if prefetch_of(zero).keeps(sum(map(numel_of, parameters))) else []

    def before_backward(self, again: bool) -> None:
        """Args:
        again: another micro-batch follows. What is gathered now stays behind the backward pass.
        """
        for parameter in self._parameters:
            # DeepSpeed releases no parameter that a module is using.
            users: set[int] = parameter.ds_active_sub_modules
            if again and parameter.ds_status is ZeroParamStatus.AVAILABLE:
                users.add(_NEXT)
            else:
                users.discard(_NEXT)


@torch.no_grad()
def fill(parameter: nn.Parameter, whole: torch.Tensor) -> None:
    """Gives a parameter other values, in its own dtype; of a partitioned one, this rank's run."""
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(whole)
        return
    first, held = run_of(parameter)
    parameter.ds_tensor.view(-1)[:held].copy_(whole.detach().reshape(-1)[first : first + held])
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
        # A small one that stays gathered.
        parameter.data.copy_(whole)


@torch.no_grad()
def fill_run(parameter: Any, run: torch.Tensor) -> None:
    """Gives a partitioned parameter other values.

    Args:
        run: this rank's, with the padding.
    """
    parameter.ds_tensor.copy_(run)
    if parameter.ds_status is ZeroParamStatus.AVAILABLE:
        # Gathered from the old runs; the next use gathers it again.
        parameter.partition()


def shard_bytes(model: nn.Module) -> int:
    """Bytes of the base that this rank holds between steps."""
    return sum(shard_of(p).numel() * shard_of(p).element_size() for p in model.parameters())


def held(model: nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What this rank has of the base at this moment: parameters that are gathered, and its shards."""
    sharded: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_tensor")]
    whole = [p.data for p in sharded if p.ds_status is ZeroParamStatus.AVAILABLE]
    return whole, [shard_of(p) for p in model.parameters()]


def whole_bytes(model: nn.Module) -> int:
    """Bytes of the whole base."""
    return sum(numel_of(p) * p.element_size() for p in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "ds_tensor") for p in model.parameters())


@contextmanager
def exact(root: nn.Module) -> Iterator[None]:
    """Gathers bring the base as it is while the block runs, in 8 bits or not. Nothing may be gathered when it begins or ends."""
    # Any: see Partitioner. One for all parameters.
    found: Any = next((p.int8 for p in root.parameters() if hasattr(p, "int8")), None)
    if found is None:
        yield
        return
    found.resting = True
    try:
        yield
    finally:
        found.resting = False


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """Every parameter whole on every rank while the block runs, and no hooks of ZeRO's: passes are plain ones, and the ranks independent.

    One all-gather a parameter at the beginning. The trace of training is not touched.
    """
    hooks = [(module, module._forward_pre_hooks, module._forward_hooks) for module in root.modules()]
    # Any: see Partitioner.
    parameters: list[Any] = [p for p in root.parameters() if getattr(p, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE]
    try:
        for parameter in parameters:
            whole = shard = parameter.ds_tensor.to(parameter.device)
            if parameter.ds_zero_partition_world_size > 1:
                whole = shard.new_empty(shard.numel() * parameter.ds_zero_partition_world_size)
                dist.all_gather_into_tensor(whole, shard, group=parameter.ds_process_group)
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = _not_zero_s(before), _not_zero_s(after)
        yield
    finally:
        for module, before, after in hooks:
            module._forward_pre_hooks, module._forward_hooks = before, after
        for parameter in parameters:
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def _not_zero_s(hooks: dict[int, Any]) -> Any:
    """Those that methods have put on a module."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not str(hook.__module__).startswith("deepspeed"))
