"""Parameters of the base itself that are trained: all (`full`), those of the last layers (`full_top`), biases (`bitfit`), norms.

Each has a master copy in fp32, read from the checkpoint in its own precision. Under ZeRO-3 a matrix's master, gradient and moments
are sharded as the matrix is: this rank has its run of elements, and a gradient is summed into the runs as soon as it is there.
Vectors are few bytes: their masters are whole on every rank, and their gradients go with the delta's one all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter, BitFit, Full, FullTop, Method
from pipeline.model.families import Family
from pipeline.model.head import Head
from pipeline.model.load import LoadedBase
from pipeline.model.zero3 import fill, fill_run, run_of, shape_of
from pipeline.weights.read import Reader


@dataclass(frozen=True)
class BaseParameter:
    """One trained parameter of the base."""

    name: str
    parameter: Any
    """Any: DeepSpeed hangs its own attributes on it."""
    master: torch.Tensor
    """fp32. Sharded: this rank's run of the flattened tensor, with zeros where the last runs are padded. Else whole."""
    sharded: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.parameter)

    def collect(self, gradient: torch.Tensor) -> None:
        """Adds a gradient of the whole tensor to the master's. Sharded: a collective."""
        flat = gradient.detach().float().reshape(-1)
        if self.sharded:
            flat = self._summed_run(flat)
        if self.master.grad is None:
            self.master.grad = torch.zeros_like(self.master)
        self.master.grad.view(-1).add_(flat)

    def publish(self) -> None:
        """Puts the master's values into the model, in its dtype."""
        if self.sharded:
            fill_run(self.parameter, self.master)
        else:
            fill(self.parameter, self.master)

    def _summed_run(self, flat: torch.Tensor) -> torch.Tensor:
        ranks, group = self.parameter.ds_zero_partition_world_size, self.parameter.ds_process_group
        run = self.master.numel()
        if flat.numel() < run * ranks:
            flat = nn.functional.pad(flat, (0, run * ranks - flat.numel()))
        summed = torch.empty_like(self.master)
        dist.reduce_scatter_tensor(summed, flat, group=group)
        return summed


def train_base(base: LoadedBase, methods: tuple[Method, ...], device: torch.device) -> tuple[BaseParameter, ...]:
    """Makes the methods' share of the base trainable.

    Raises:
        JobError: the base has no such parameters.
    """
    wanted = {name for place, method in enumerate(methods) for name in _names(base, method, place)}
    if not wanted:
        return ()
    found, model = [], base.model
    with Reader() as reader:
        for name in base.tensors:
            if name not in wanted:
                continue
            parameter = model.get_parameter(name)
            sharded = hasattr(parameter, "ds_tensor") and len(shape_of(parameter)) > 1
            found.append(_trained(name, parameter, sharded, base, reader, device))
    heads = [module for module in model.modules() if isinstance(module, Head)]
    for one in found:
        one.parameter.requires_grad_(True)
        one.parameter.register_post_accumulate_grad_hook(_taking(one.collect))
        for head in heads:
            if head.weight is one.parameter:
                head.collect = one.collect
    return tuple(found)


def _trained(name: str, parameter: nn.Parameter, sharded: bool, base: LoadedBase, reader: Reader, device: torch.device) -> BaseParameter:
    entry = base.tensors[name]
    if not sharded:
        master = torch.empty(entry.shape, device=device)
        reader.read(entry, 0, master.view(-1))
    else:
        first, held = run_of(parameter)
        ranks: int = parameter.ds_zero_partition_world_size  # type: ignore[attr-defined]
        master = torch.zeros(-(-entry.numel // ranks), device=device)
        reader.read(entry, first, master[:held])
    return BaseParameter(name, parameter, master.requires_grad_(), sharded)


def _taking(collect: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    def take(parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        collect(gradient)

    return take


def _names(base: LoadedBase, method: Method, place: int) -> Iterable[str]:
    """Of the parameters that a method trains."""
    family, names = base.family, base.tensors
    match method:
        case Full():
            return names
        case FullTop(layers=layers):
            count = base.model.config.num_hidden_layers
            if layers > count:
                raise JobError(f"methods[{place}].layers = {layers}: the base has {count} layers. Use fewer.", everywhere=True)
            tops = tuple(f"{family.layers}.{number}." for number in range(count - layers, count))
            return [name for name in names if name.startswith(tops)]
        case BitFit():
            if biases := [name for name in names if name.endswith(".bias")]:
                return biases
            kind = base.model.config.model_type
            raise JobError(f'methods[{place}].kind = "bitfit": this {kind} has no bias vectors. Use another method.', everywhere=True)
        case Adapter(placement=placement, layernorm=True) if placement != "lin":
            # Those below the first adapter would have the backward pass go through layers that it need not.
            having = tuple(f"{family.layers}.{number}." for number in range(method.first_layer or 0, base.model.config.num_hidden_layers))
            return [name for name in names if name.startswith(having) and _is_norm(name, family)]
        case _:
            return ()


def _is_norm(name: str, family: Family) -> bool:
    """Whether a parameter in the layers is a norm's."""
    inside = name.removeprefix(f"{family.layers}.").partition(".")[2]
    return inside.rpartition(".")[0] in family.norms
