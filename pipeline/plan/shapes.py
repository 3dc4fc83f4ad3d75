"""The shapes of a base from its config.json alone: every parameter, in the order in which a pass uses it. No torch, no transformers.

In: a config.json (with weights beside it or not). Out: `Shape`. One entry of `_FAMILIES` adds a family; it mirrors
pipeline/model/families.py and transformers' model code, and tests hold it to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pipeline.job.errors import JobError
from pipeline.job.method import Lora

Norm = Literal["layer", "rms"]
Activation = Literal["new_gelu", "gated_silu"]


@dataclass(frozen=True)
class Part:
    """A module, as ZeRO-3 meets it. Those without parameters count too: at each, it looks ahead."""

    name: str
    sizes: tuple[int, ...] = ()
    """Elements of each of its parameters."""
    inputs: int = 0
    outputs: int = 0
    """Of a linear map."""
    roles: tuple[str, ...] = ()
    """What equal runs of its output rows are called."""
    stage: int = 0
    """Parts of a layer that read the same input have the same number; a higher one reads what a lower one made."""
    inside: int = 0
    """So many of the parts after it are inside it."""


@dataclass(frozen=True)
class Shape:
    family: str
    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    norm: Norm
    activation: Activation
    tied: bool
    """The head is the token embedding."""
    embeddings: tuple[Part, ...]
    """The token embedding first."""
    layer: tuple[Part, ...]
    end: Part
    """The norm after the last layer."""
    head: Part

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of every parameter, a tied one once."""
        layer = tuple(chain.from_iterable(part.sizes for part in self.layer))
        embeddings = tuple(chain.from_iterable(part.sizes for part in self.embeddings))
        return embeddings + layer * self.layers + self.end.sizes + (() if self.tied else self.head.sizes)

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def learns_positions(self) -> bool:
        return sum(bool(part.sizes) for part in self.embeddings) > 1

    @property
    def matmul_parameters(self) -> int:
        """Elements that every token is multiplied with: those of the layers' linear maps."""
        return self.layers * sum(part.inputs * part.outputs for part in self.layer)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.sizes)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for part in self.layer for role in part.roles)


def read_shape(folder: Path) -> Shape:
    """The shape that a folder's config.json describes.

    Raises:
        JobError: no such file, not readable, or an architecture that is not in the table.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{file}: cannot be read ({error}). Fetch the base again, or name a folder with a config.json.") from None
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in _FAMILIES:
        raise JobError(
            f'{file}: architecture "{family}" is not known to the plan. Known are {", ".join(sorted(_FAMILIES))}; '
            "one entry in pipeline/plan/shapes.py adds another."
        )
    try:
        return _FAMILIES[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise JobError(f"{file}: has no usable {error}. Fetch the base again.") from None


def _linear(name: str, inputs: int, outputs: int, bias: bool, roles: tuple[str, ...], stage: int) -> Part:
    return Part(name, (inputs * outputs, outputs) if bias else (inputs * outputs,), inputs, outputs, roles, stage)


def _gpt2(config: dict[str, Any]) -> Shape:
    # transformers' own defaults, which a config.json may leave out.
    width = _first(config, "n_embd", "hidden_size", default=768)
    layers, heads = _first(config, "n_layer", default=12), _first(config, "n_head", default=12)
    vocabulary, context = _first(config, "vocab_size", default=50257), _first(config, "n_positions", default=1024)
    ffn = config.get("n_inner") or 4 * width
    activation = config.get("activation_function", "gelu_new")
    if activation != "gelu_new":
        raise KeyError(f'activation "{activation}"')
    norm = (width, width)
    layer = (
        Part("", inside=10, stage=6),
        Part("ln_1", norm, stage=0),
        Part("attn", inside=3, stage=3),
        _linear("attn.c_attn", width, 3 * width, True, ("q", "k", "v"), 1),
        _linear("attn.c_proj", width, width, True, ("o",), 2),
        Part("attn.resid_dropout", stage=3),
        Part("ln_2", norm, stage=3),
        Part("mlp", inside=4, stage=6),
        _linear("mlp.c_fc", width, ffn, True, ("mlp_in",), 4),
        Part("mlp.act", stage=5),
        _linear("mlp.c_proj", ffn, width, True, ("mlp_out",), 5),
        Part("mlp.dropout", stage=6),
    )
    table = Part("wte", (vocabulary * width,))
    return Shape(
        "gpt2", layers, width, ffn, heads, heads, width // heads, vocabulary, context, "layer", "new_gelu",
        tied=config.get("tie_word_embeddings", True),
        embeddings=(table, Part("wpe", (context * width,)), Part("drop")),
        layer=layer,
        end=Part("ln_f", norm),
        head=Part("lm_head", (vocabulary * width,), width, vocabulary),
    )  # fmt: skip


def _llama(config: dict[str, Any]) -> Shape:
    family = config["model_type"]
    width, ffn = _first(config, "hidden_size", default=4096), _first(config, "intermediate_size", default=11008)
    layers, heads = _first(config, "num_hidden_layers", default=32), _first(config, "num_attention_heads", default=32)
    kv_heads = config.get("num_key_value_heads") or {"mistral": 8}.get(family, heads)
    head_width = config.get("head_dim") or width // heads
    bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    # Qwen2 has biases on q, k and v, always.
    bias_in = bias or family == "qwen2"
    vocabulary, context = _first(config, "vocab_size", default=32000), _first(config, "max_position_embeddings", default=2048)
    if config.get("hidden_act", "silu") != "silu":
        raise KeyError(f'activation "{config["hidden_act"]}"')
    layer = (
        Part("", inside=12, stage=6),
        Part("input_layernorm", (width,), stage=0),
        Part("self_attn", inside=4, stage=3),
        _linear("self_attn.q_proj", width, heads * head_width, bias_in, ("q",), 1),
        _linear("self_attn.k_proj", width, kv_heads * head_width, bias_in, ("k",), 1),
        _linear("self_attn.v_proj", width, kv_heads * head_width, bias_in, ("v",), 1),
        _linear("self_attn.o_proj", heads * head_width, width, bias, ("o",), 2),
        Part("post_attention_layernorm", (width,), stage=3),
        Part("mlp", inside=4, stage=6),
        _linear("mlp.gate_proj", width, ffn, mlp_bias, ("mlp_gate",), 4),
        Part("mlp.act_fn", stage=5),
        _linear("mlp.up_proj", width, ffn, mlp_bias, ("mlp_in",), 4),
        _linear("mlp.down_proj", ffn, width, mlp_bias, ("mlp_out",), 5),
    )
    return Shape(
        family, layers, width, ffn, heads, kv_heads, head_width, vocabulary, context, "rms", "gated_silu",
        tied=config.get("tie_word_embeddings", False),
        embeddings=(Part("embed_tokens", (vocabulary * width,)), Part("rotary_emb")),
        layer=layer,
        end=Part("norm", (width,)),
        head=Part("lm_head", (vocabulary * width,), width, vocabulary),
    )  # fmt: skip


def _first(config: dict[str, Any], *names: str, default: int) -> int:
    """The first of these keys that the config has."""
    return int(next((config[name] for name in names if config.get(name) is not None), default))


_FAMILIES: dict[str, Callable[[dict[str, Any]], Shape]] = {"gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen2": _llama}


@dataclass(frozen=True)
class Branch:
    """B A beside some rows of one part: A [R, K], B [P, R]."""

    part: str
    rank: int
    rows: int


@dataclass(frozen=True)
class Adapted:
    """What a method puts on each layer."""

    branches: tuple[Branch, ...]
    dropout: float

    def of(self, part: Part) -> tuple[Branch, ...]:
        return tuple(branch for branch in self.branches if branch.part == part.name)

    def layer_parameters(self, shape: Shape) -> int:
        """Trained elements of a layer."""
        return sum(branch.rank * (part.inputs + branch.rows) for part in shape.layer for branch in self.of(part))

    @property
    def layer_outputs(self) -> int:
        """Elements of a layer's Bs."""
        return sum(branch.rank * branch.rows for branch in self.branches)


def adapt(shape: Shape, method: Lora) -> Adapted:
    """A method's branches on each layer. Targets are roles, or module names as pipeline/methods/lora.py takes them.

    Raises:
        JobError: a target that the base does not have.
    """
    branches: list[Branch] = []
    for target in method.targets:
        found = [
            Branch(part.name, method.rank_of(target), part.outputs // (len(part.roles) if target in part.roles else 1))
            for part in shape.layer
            if part.outputs and (target in part.roles or f".{part.name}".endswith(f".{target}"))
        ]
        if not found:
            raise JobError(f'methods[0].targets: "{target}" is not a target of this base. It has {", ".join(shape.roles)}.')
        branches += found
    return Adapted(tuple(branches), method.dropout)


def shard(sizes: tuple[int, ...], ranks: int) -> int:
    """Elements that a rank holds: of each parameter ceil(n / ranks), as ZeRO-3 pads it (pipeline/model/zero3.py)."""
    return sum(-(-size // ranks) for size in sizes)
