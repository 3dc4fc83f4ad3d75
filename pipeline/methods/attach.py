"""What is trained: each method of the job put onto the model, and its tensors by name.

Saving, counting, optimising and resuming read `Delta` and need no method-specific code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.job.method import Adapter, Lora, Method, PrefixEmbed, PrefixLayer
from pipeline.methods.adapter import Bottleneck, attach_adapters
from pipeline.methods.added import attach_added
from pipeline.methods.dropout import DropoutClock
from pipeline.methods.head import TaskHead, draw_head
from pipeline.methods.lora import AdaptedLinear, attach_lora
from pipeline.methods.overlay import Overlay
from pipeline.methods.prefix import attach_prefix
from pipeline.methods.subset import BaseParameter, train_base
from pipeline.model.load import LoadedBase
from pipeline.model.routing import OnRows, every_row
from pipeline.tasks.tokens import NewTokens, vocabulary_with
from pipeline.weights.manifest import Added


@dataclass(frozen=True)
class Delta:
    """The trained tensors: fp32, outside ZeRO's hands, whole and equal on every rank but for matrices of a sharded base."""

    methods: tuple[Method, ...]
    adapted: tuple[AdaptedLinear, ...]
    """LoRA's."""
    adapters: tuple[Bottleneck, ...]
    prefix: Overlay | None
    new_tokens: Overlay | None
    """The job's added tokens."""
    added: Added | None
    """What is written of them."""
    base: tuple[BaseParameter, ...]
    """The base's own parameters that are trained."""
    head: TaskHead | None
    """Where the task has labels."""
    clock: DropoutClock

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> trained tensor that is whole on every rank, in model order."""
        found = {
            f"{branch.name}.{key}": tensor
            for adapted in self.adapted
            for branch in adapted.branches
            for key, tensor in (("a", branch.a), ("b", branch.b))
        }
        for adapter in self.adapters:
            found |= adapter.tensors()
        for overlay in (self.prefix, self.new_tokens):
            found |= overlay.rows if overlay else {}
        found |= {one.name: one.master for one in self.base if not one.sharded}
        return found | (self.head.tensors if self.head else {})

    def shards(self) -> dict[str, BaseParameter]:
        """Name -> trained matrix of a sharded base, of which every rank has its run."""
        return {one.name: one for one in self.base if one.sharded}

    def publish(self) -> None:
        """Makes the model compute with the trained values of its own parameters, once they have changed."""
        for one in self.base:
            one.publish()

    @property
    def parameters(self) -> int:
        """Trained elements."""
        whole = sum(tensor.numel() for tensor in self.tensors().values())
        return whole + sum(torch.Size(one.shape).numel() for one in self.shards().values())

    @property
    def base_parameters(self) -> int:
        """Those of them that are the base's own."""
        return sum(torch.Size(one.shape).numel() for one in self.base)

    @property
    def held(self) -> int:
        """Trained elements on this rank."""
        return sum(tensor.numel() for tensor in self.tensors().values()) + sum(one.master.numel() for one in self.shards().values())


def attach(
    base: LoadedBase,
    methods: tuple[Method, ...],
    seed: int,
    device: torch.device,
    labels: tuple[str, ...] | None = (),
    head_dropout: float = 0.0,
    train: bool = True,
    new: NewTokens | None = None,
    on_rows: OnRows = every_row,
    first_special: int | None = None,
) -> Delta:
    """Puts the job's methods onto the base.

    Args:
        labels: of the classes that a head tells apart; None: it puts out a number. Without any there is no head.
        train: the methods' share of the base's own parameters too.
        new: tokens that the base does not know.
        on_rows: of a batch that the methods are meant for.
        first_special: id of the first special token; None: what comes after the vocabulary.

    Raises:
        JobError: a target, a place or a layer that is not there.
    """
    model, family, clock = base.model, base.family, DropoutClock(seed)
    head = None if labels == () else draw_head(model.config, family.head, labels, seed, head_dropout, clock, device)
    adapted: list[AdaptedLinear] = []
    adapters: list[Bottleneck] = []
    prefix = None
    new_tokens, added = attach_added(base, new, device) if new else (None, None)
    # An adapter reads what a linear map puts out with LoRA's share.
    for place, method in sorted(enumerate(methods), key=lambda item: isinstance(item[1], Adapter)):
        match method:
            case Lora():
                adapted = attach_lora(model, family, method, place, clock, seed, device)
            case Adapter():
                adapters = attach_adapters(model, family, method, place, seed, device, on_rows)
            case PrefixEmbed() | PrefixLayer():
                first = vocabulary_with(model.config.vocab_size, new) if first_special is None else first_special
                prefix = attach_prefix(base, method, first, seed, device)
    trained = train_base(base, methods, device) if train else ()
    return Delta(methods, tuple(adapted), tuple(adapters), prefix, new_tokens, added, trained, head, clock)
