"""Weights on their way between ranks in 8 bits: symmetric, a scale for each run of elements (ZeRO++, Wang et al. 2023, qwZ).

A matrix of n elements on W ranks comes as n int8 and W x ceil(ceil(n / W) / GROUP) scales in fp32. Shards stay in the base's dtype, so what
is quantised is the same in every pass of every step, and what is stored, merged and exported is exact.
DeepSpeed calls this in the place of its own CUDA kernels, which compile at the first use and round by way of fp16.
"""

from __future__ import annotations

import torch

from pipeline.plan.prefetch import INT8_GROUP as GROUP

_MOST = 127


class Int8:
    """What DeepSpeed calls a quantizer module.

    Args:
        ranks: that share a copy of the base.
        device: that computes; shards may lie elsewhere.
    """

    def __init__(self, ranks: int, device: torch.device | str = "cpu") -> None:
        self._ranks, self._device = ranks, device
        self.resting = False
        """Gathers bring everything as it is."""

    def quantize(self, shard: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A rank's run of elements [n] -> int8 [n], fp32 scales [ceil(n / GROUP)]."""
        groups = -(-shard.numel() // GROUP)
        # At least as wide as the scale, so that a quotient is rounded once.
        padded = torch.zeros(groups * GROUP, dtype=torch.float32, device=self._device)
        # Moved in its own dtype: to another one it would be turned where it lies.
        padded[: shard.numel()] = shard.to(self._device)
        by_group = padded.view(groups, GROUP)
        least, most = by_group.aminmax(dim=1)
        scales = torch.maximum(most, -least).div_(_MOST)
        # A group of zeros stays one.
        by_group.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_().clamp_(-_MOST, _MOST)
        return padded[: shard.numel()].to(torch.int8), scales

    def dequantize(self, quantized: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """
        Args:
            quantized: the whole matrix, int8.
            scales: of every rank's run, one behind the other.
        """
        whole = torch.empty(quantized.shape, dtype=dtype, device=quantized.device)
        source, target = quantized.reshape(-1), whole.view(-1)
        run = -(-source.numel() // self._ranks)
        if run % GROUP == 0 and source.numel() == run * self._ranks:
            torch.mul(source.view(-1, GROUP), scales[:, None], out=target.view(-1, GROUP))
            return whole
        for taken, rows, own in zip(source.split(run), target.split(run), scales.view(self._ranks, -1), strict=False):
            full = taken.numel() // GROUP
            torch.mul(taken[: full * GROUP].view(full, GROUP), own[:full, None], out=rows[: full * GROUP].view(full, GROUP))
            if full * GROUP < taken.numel():
                torch.mul(taken[full * GROUP :], own[full], out=rows[full * GROUP :])
        return whole
