"""Adapters: a bottleneck h + up(f(down(h))) in each layer, up zero at the start, so that nothing changes before training.

houlsby (Houlsby et al. 2019): on what attention and the MLP put out, before their residuals. lin (Lin et al. 2020): on what the layer puts
out, behind a LayerNorm of the adapter's own. pfeiffer (Pfeiffer et al. 2021) and drop (AdapterDrop, Rueckle et al. 2020): behind the MLP's
norm where the sum of MLP and residual is normed, LN(s + up(f(down(LN(s))))); else on what the layer puts out.

Shapes: h [..., D], down [R, D], up [D, R].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from pipeline.job.errors import JobError
from pipeline.job.method import Adapter
from pipeline.methods.draw import generator_of
from pipeline.model.families import Family
from pipeline.model.linear import BaseLinear
from pipeline.model.routing import OnRows, every_row

_STANDARD_DEVIATION = 0.02
_NORM_EPS = 1e-5


@dataclass(frozen=True)
class Bottleneck:
    """Its tensors are not registered with a module: ZeRO-3 must not shard them."""

    name: str
    down: torch.Tensor
    down_bias: torch.Tensor
    up: torch.Tensor
    up_bias: torch.Tensor
    norm: tuple[torch.Tensor, torch.Tensor] | None
    """Weight and bias of a LayerNorm on its input."""
    nonlinearity: Callable[[torch.Tensor], torch.Tensor]

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {"down.weight": self.down, "down.bias": self.down_bias, "up.weight": self.up, "up.bias": self.up_bias}
        if self.norm:
            own |= {"norm.weight": self.norm[0], "norm.bias": self.norm[1]}
        return {f"{self.name}.{key}": tensor for key, tensor in own.items()}

    def of(self, h: torch.Tensor) -> torch.Tensor:
        """up(f(down(h))), without h."""
        if self.norm:
            h = nn.functional.layer_norm(h, h.shape[-1:], self.norm[0].to(h.dtype), self.norm[1].to(h.dtype), _NORM_EPS)
        inner = self.nonlinearity(nn.functional.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return nn.functional.linear(inner, self.up.to(h.dtype), self.up_bias.to(h.dtype))

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """As a linear map's last branch."""
        return output + self.of(output)


def attach_adapters(
    model: PreTrainedModel,
    family: Family,
    method: Adapter,
    place: int,
    seed: int,
    device: torch.device,
    on_rows: OnRows = every_row,
) -> list[Bottleneck]:
    """Puts adapters into the layers. `down` is drawn from (seed, name), so every rank draws the same.

    Args:
        on_rows: of a batch that they are meant for, behind layers and norms; a linear map's branches are routed by who collects them.

    Raises:
        JobError: the base has no such places, or not so many layers.
    """
    count, width = model.config.num_hidden_layers, model.config.hidden_size
    first = method.first_layer or 0
    if first >= count:
        raise JobError(f"methods[{place}].first_layer = {first}: the last layer is {count - 1}. Use a lower one.", everywhere=True)
    if method.rank > width:
        raise JobError(f"methods[{place}].rank = {method.rank}: the base is {width} wide. Use a smaller rank.", everywhere=True)

    def draw(name: str) -> Bottleneck:
        down = torch.empty(method.rank, width).normal_(0.0, _STANDARD_DEVIATION, generator=generator_of(seed, name))
        own_norm = (torch.ones(width), torch.zeros(width)) if method.placement == "lin" and method.layernorm else ()
        vectors = (down, torch.zeros(method.rank), torch.zeros(width, method.rank), torch.zeros(width), *own_norm)
        down, down_bias, up, up_bias, *norm = (tensor.to(device).requires_grad_() for tensor in vectors)
        return Bottleneck(name, down, down_bias, up, up_bias, (norm[0], norm[1]) if norm else None, ACT2FN[method.nonlinearity])

    made = []
    for number in range(first, count):
        layer = f"{family.layers}.{number}"
        if method.placement == "houlsby":
            for path in _outputs(family, model, place):
                linear = model.get_submodule(f"{layer}.{path}")
                assert isinstance(linear, BaseLinear)
                made.append(draw(f"{layer}.{path}.adapter"))
                linear.branches.append(made[-1])
            continue
        made.append(draw(f"{layer}.adapter"))
        norm = family.norm_behind_mlp(model.config)
        if norm and method.placement != "lin":
            model.get_submodule(f"{layer}.{norm}").register_forward_hook(_behind_norm(made[-1], on_rows))
        else:
            model.get_submodule(layer).register_forward_hook(_behind_layer(made[-1], on_rows))
    return made


def _outputs(family: Family, model: PreTrainedModel, place: int) -> tuple[str, str]:
    """Paths in a layer of the maps that end attention and the MLP."""
    if not family.roles:
        raise JobError(
            f'methods[{place}].placement = "houlsby": where attention and MLP end in a "{model.config.model_type}" is not known. '
            'Use "lin" or "pfeiffer".',
            everywhere=True,
        )
    return family.roles["o"].module, family.roles["mlp_out"].module


def _behind_layer(adapter: Bottleneck, on_rows: OnRows) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return on_rows(adapter.add_to, output, output)
        return (on_rows(adapter.add_to, output[0], output[0]), *output[1:])

    return hook


def _behind_norm(adapter: Bottleneck, on_rows: OnRows) -> Callable[..., torch.Tensor]:
    def hook(norm: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return on_rows(lambda normed, total: norm.forward(total + adapter.of(normed)), output, inputs[0])

    return hook
