"""How the base is adapted: each method the LoRA paper compares, as its section `[[methods]]` describes it. Several make a combination."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.job.section import Section, Text

Nonlinearity = Literal["relu", "gelu", "silu", "tanh"]
Count = Annotated[int, Field(ge=0)]


class Lora(Section):
    """Low-rank adaptation, W + (alpha / rank) B A (Hu et al. 2021, section 4)."""

    kind: Literal["lora"]
    targets: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] = ("q", "v")
    """Roles (q k v o mlp_in mlp_out ...) or module paths such as "attn.c_proj"."""
    rank: PositiveInt | dict[str, PositiveInt] = 8
    """Rows of A, for all targets or for each: { q = 4, v = 8 }."""
    alpha: PositiveFloat | dict[str, PositiveFloat] = 16.0
    """The update is scaled by alpha / rank; for all targets or for each."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """sqrt_rank: by alpha / sqrt(rank) instead, rank-stabilised (Kalajdzievski 2023)."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """On the input of A only. Keyed by example, so it does not depend on ranks or packing."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Of A. B starts at zero. The authors' code and PEFT draw Kaiming-uniform; the paper's text says Gaussian."""
    start: Text | None = None
    """As for every method: begin from the delta of another run, of the same base and method."""

    @model_validator(mode="after")
    def _for_each_target(self) -> Lora:
        for key in ("rank", "alpha"):
            given = getattr(self, key)
            if isinstance(given, dict) and set(given) != set(self.targets):
                raise ValueError(
                    f"{key} is given for {', '.join(given)}, but the targets are {', '.join(self.targets)}. Name each of them once."
                )
        return self

    def rank_of(self, target: str) -> int:
        return self.rank[target] if isinstance(self.rank, dict) else self.rank

    def scale_of(self, target: str) -> float:
        """What B A is multiplied by."""
        alpha, rank = self.alpha[target] if isinstance(self.alpha, dict) else self.alpha, self.rank_of(target)
        return alpha / (rank if self.scaling == "rank" else math.sqrt(rank))


class Full(Section):
    """All parameters of the base: the paper's FT. Master weights, gradients and both moments are sharded with the base."""

    kind: Literal["full"]
    start: Text | None = None


class FullTop(Section):
    """The last layers and nothing else: the paper's FT-Top2 (Li and Liang 2021)."""

    kind: Literal["full_top"]
    layers: PositiveInt = 2
    """So many of the last."""
    start: Text | None = None


class BitFit(Section):
    """All bias vectors, those of norms included (Zaken et al. 2021)."""

    kind: Literal["bitfit"]
    start: Text | None = None


class _Prefix(Section):
    prefix_tokens: Count = 8
    """Special tokens before the prompt."""
    infix_tokens: Count = 8
    """Special tokens after the prompt; of labelled texts, at their end."""
    start: Text | None = None

    @model_validator(mode="after")
    def _some(self) -> _Prefix:
        if not self.prefix_tokens + self.infix_tokens:
            raise ValueError("prefix_tokens and infix_tokens are both 0. Give at least one token.")
        return self


class PrefixEmbed(_Prefix):
    """Trained embeddings of special tokens: the paper's PreEmbed."""

    kind: Literal["prefix_embed"]


class PrefixLayer(_Prefix):
    """What special tokens bring into every layer is trained, and replaces what was computed: the paper's PreLayer."""

    kind: Literal["prefix_layer"]


class Adapter(Section):
    """A bottleneck h + up(f(down(h))) in each layer, with up zero at the start."""

    kind: Literal["adapter"]
    placement: Literal["houlsby", "lin", "pfeiffer", "drop"] = "houlsby"
    """houlsby: behind attention and behind the MLP, before their residuals (Houlsby et al. 2019). lin: behind the layer, with a norm
    of its own (Lin et al. 2020). pfeiffer: behind the MLP and its norm (Pfeiffer et al. 2021). drop: the same, without the lower
    layers (AdapterDrop, Rueckle et al. 2020)."""
    rank: PositiveInt = 16
    """Width of the bottleneck."""
    nonlinearity: Nonlinearity = "relu"
    """f."""
    train_layernorm: bool | None = None
    """lin: each adapter has a LayerNorm of its own, on by default. Others: the layers' own norms are trained too, off by default."""
    first_layer: PositiveInt | None = None
    """drop: the first layer that has an adapter, counted from 0."""
    start: Text | None = None

    @property
    def layernorm(self) -> bool:
        return self.placement == "lin" if self.train_layernorm is None else self.train_layernorm

    @model_validator(mode="after")
    def _drops(self) -> Adapter:
        if (self.placement == "drop") != (self.first_layer is not None):
            raise ValueError(
                f'placement = "{self.placement}", first_layer = {self.first_layer}: "drop", and only "drop", needs a first_layer.'
            )
        return self


Method: TypeAlias = Annotated[Lora | Full | FullTop | BitFit | PrefixEmbed | PrefixLayer | Adapter, Field(discriminator="kind")]


def merges(methods: tuple[Method, ...]) -> bool:
    """Whether what they train has a place in an ordinary checkpoint."""
    return not any(isinstance(method, Adapter | PrefixEmbed | PrefixLayer) for method in methods)


def trains_matrices(methods: tuple[Method, ...]) -> str | None:
    """The kind that trains matrices of the base, whose masters are sharded as the base is; None: the base's matrices stay frozen."""
    return next((method.kind for method in methods if isinstance(method, Full | FullTop)), None)


def trains_tables(methods: tuple[Method, ...]) -> bool:
    """Whether the token embedding and the head are trained, all rows of them."""
    return any(isinstance(method, Full) for method in methods)


def refuse_together(methods: tuple[Method, ...]) -> None:
    """Raises:
    ValueError: methods that do not make a combination."""
    kinds = Counter(method.kind for method in methods)
    for kind, count in kinds.items():
        if count > 1:
            hint = ", with all its targets" if kind == "lora" else ""
            raise ValueError(f"methods: {kind} is listed {count} times. List it once{hint}.")
    if "full" in kinds and (rest := [kind for kind in kinds if kind in ("lora", "full_top", "bitfit", "adapter")]):
        raise ValueError(f"methods: full trains the whole base already, so {rest[0]} adds nothing that is its own. Keep one of them.")
    if "full_top" in kinds and "bitfit" in kinds:
        raise ValueError("methods: full_top and bitfit both train the biases of the last layers. Keep one of them.")
    if "prefix_embed" in kinds and "prefix_layer" in kinds:
        raise ValueError("methods: prefix_embed and prefix_layer both place special tokens. Keep one of them.")
