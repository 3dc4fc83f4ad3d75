"""The modules that architectures are made of, each with its parameters and what it keeps for the backward pass.

A frozen linear map keeps nothing (pipeline/model/linear.py), so only norms, attention and the activation function do. What each keeps
is what autograd saves of transformers' code; benchmarks/plan_accuracy.py holds it to measurement.

Stages of a layer: 0 norm, 1 q, k, v, 2 their norms, 3 o, 4 and 5 norms, 6 mlp_in, 7 mlp_out, 8 norm, 9 the whole.
"""

from __future__ import annotations

from dataclasses import replace

from pipeline.job.errors import JobError
from pipeline.plan.shapes import Kept, Part

FACTORS = {"gelu": 1, "gelu_pytorch_tanh": 1, "relu": 1, "silu": 1, "gelu_new": 1, "gelu_fast": 1, "quick_gelu": 3}
"""Tensors of the FFN's width that an activation function keeps, as pipeline/model/build.py has it computed."""


def linear(name: str, inputs: int, outputs: int, bias: bool, roles: tuple[str, ...], stage: int, lane: int = 0) -> Part:
    sizes = (inputs * outputs, outputs) if bias else (inputs * outputs,)
    return Part(name, sizes, inputs, outputs, roles, stage, lane)


def layer_norm(name: str, width: int, stage: int, affine: bool = True, lane: int = 0, shares: bool = False) -> Part:
    """Args:
    shares: its input is kept already.
    """
    kept = Kept(f"{name}", "8 N" if shares else "N D e + 8 N", 0 if shares else width, 2)
    return Part(name, (width, width) if affine else (), stage=stage, lane=lane, keeps=(kept,), backward=(_moment(2 * width),))


def rms_norm(name: str, width: int, stage: int, heads: int = 1) -> Part:
    """Keeps an fp32 copy of its input. Args:
    heads: it normalises each of so many by itself."""
    kept = Kept(name, "N D 4, in fp32" if heads == 1 else "N H Dh 4, in fp32", 0, heads * (width + 1))
    normed = Kept(f"{name}, before its weight", "N D e" if heads == 1 else "N H Dh e", heads * width)
    # Five fp32 tensors as large as its input.
    return Part(name, (width,), stage=stage, keeps=(kept,), backward=(_moment(fp32=5 * heads * width),), trained=(normed,))


def scaled(part: Part) -> Part:
    """Gemma's norm, which multiplies in fp32: one tensor more in the forward pass."""
    trained = tuple(replace(kept, formula=kept.formula[:-1] + "4", elements=0, fp32=kept.elements) for kept in part.trained)
    return replace(part, forward=(_moment(fp32=2 * sum(part.sizes)),), trained=trained)


def attends(part: Part, heads: int, kv_heads: int, head_width: int, window_share: float = 0.0) -> Part:
    """The part that reads attention's output, with what attention keeps.

    Args:
        window_share: of the layers, those that look back over a window only: a mask has keys and values repeated for every head.
    """
    wide, narrow = heads * head_width, kv_heads * head_width
    keeps = [
        Kept("queries, keys, values", "P (H + 2 Hkv) Dh e", wide + 2 * narrow, of="padded"),
        Kept("attention's output", "P H Dh e + 4 P H", wide, heads, of="padded"),
    ]
    if window_share:
        repeated = 2 * (wide - narrow) * window_share
        keeps += [
            Kept("keys and values for every head", "2 P (H - Hkv) Dh e", repeated, of="windowed"),
            Kept("the window's mask", "L^2 (1 + e)", window_share, bytes=window_share, of="windowed square"),
        ]
    # Unpadded and padded, and the gradients of both.
    both = 2 * (wide + 2 * narrow)
    return replace(
        part, keeps=tuple(keeps), forward=(_moment(wide + 2 * narrow),), alone=(_moment(both),), backward=(_moment(both, of="padded"),)
    )


def scores(part: Part, heads: int, head_width: int) -> Part:
    """As `attends`, where scores are bent before the softmax (Gemma 2): no fused kernel, and all of them are kept."""
    wide = heads * head_width
    keeps = (
        Kept("queries, keys, values for every head", "3 P H Dh e", 3 * wide, of="padded"),
        Kept("scores' tanh and softmax, for fp32", "8 S H", bytes=8 * heads, of="pair"),
    )
    # Scores in the base's dtype and twice in fp32; the gradient of the weights and of the scores, in fp32.
    alone, backward = _moment(heads, 2 * heads, of="pair"), _moment(fp32=2 * heads, of="pair")
    return replace(part, keeps=keeps, forward=(_moment(fp32=heads, of="pair"),), alone=(alone,), backward=(backward,))


def disentangled(part: Part, width: int, heads: int, span: int, kinds: int, shared: bool) -> Part:
    """As `attends`, for DeBERTa: scores of every pair by content, and by `kinds` ways of relative position, up to `span` apart.

    Args:
        shared: positions go through the projections of tokens, which may be trained, so the gradient needs the keys as they were too.
    """
    tensors = 4 if shared else 3
    keeps = (
        Kept("queries, scaled keys, values, keys", f"{tensors} P H Dh e", tensors * width, of="padded"),
        Kept("softmax of scores", "S H e", heads, of="pair"),
        Kept("the mask", "S", bytes=1, of="pair"),
        Kept("indices of relative positions", "8 L^2 each way", bytes=8 * kinds, of="square"),
        Kept("scores by position, before they are picked", "2 span P H e each way", kinds * 2 * span * heads, of="padded"),
        Kept("positions' keys and queries", "2 span D e an example, each way", kinds * 2 * span * width, of="example"),
    )
    moment = _moment(4 * heads, of="pair")
    return replace(part, keeps=keeps, forward=(moment,), backward=(moment,))


def activation(name: str, function: str, ffn: int, gated: bool, where: str, lane: int = 0) -> Part:
    """Raises:
    JobError: a function that is not in the table."""
    if function not in FACTORS:
        raise JobError(f'{where}: activation "{function}" is not known to the plan. Known are {", ".join(FACTORS)}.')
    # Of f(x) y: what f keeps, f(x) and y.
    factors = FACTORS[function] + (2 if gated else 0)
    backward = 3 if gated else 2
    return Part(
        name, stage=7, lane=lane, keeps=(Kept("activation function", f"{factors} N F e", factors * ffn),),
        forward=(_moment(2 * ffn),), backward=(_moment(backward * ffn),),
    )  # fmt: skip


def rotations(width: int) -> Kept:
    """By position, of so many elements of a head."""
    return Kept("cos and sin", "2 N Dh e", 2 * width)


def _moment(elements: float = 0, fp32: float = 0, of: str = "token") -> Kept:
    return Kept("", "", elements, fp32, of=of)  # type: ignore[arg-type]
