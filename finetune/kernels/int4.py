"""Whole numbers in 4 bits with a scale and a zero for each group of a row, as GPTQ and AWQ leave them.

w = (code - zero) · scale (Frantar et al. 2022, section 2; Lin et al. 2023, equation 1). A difference has 5 bits and a
16-bit scale 11 or fewer: their product in fp32 is exact, and is rounded once to the dtype that is asked for. In fp16
that is what the libraries compute which made these bases.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

_PIECE_CPU, _PIECE = 7 * 4096, 1 << 24
"""Values worked on at a time: on a CPU they stay in the cache and below the count from which torch splits an operation
between threads, which costs more than it brings here (``four_bit``); elsewhere a launch should pay."""


@dataclass(frozen=True, kw_only=True)
class Int4:
    """A matrix [out, in]. codes: uint8 [out, in / 2], the first of two in the lower half; zeros: uint8 [out, groups];
    scales: [out, groups] as stored; groups: int32 [in], whose group each column is of, None where they follow each
    other in equal runs."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor | None = None

    slow = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], 2 * self.codes.shape[1]

    def rows(self, start: int, stop: int) -> Int4:
        """Some rows of it."""
        codes, zeros, scales = (one[start:stop] for one in (self.codes, self.zeros, self.scales))
        return replace(self, codes=codes, zeros=zeros, scales=scales)

    def to(self, device: torch.device | str) -> Int4:
        codes, zeros, scales = (one.to(device) for one in (self.codes, self.zeros, self.scales))
        return Int4(
            codes=codes,
            zeros=zeros,
            scales=scales,
            groups=None if self.groups is None else self.groups.to(device),
        )

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, number by number rounded once to ``dtype``."""
        out, inside = self.shape
        made = torch.empty(out, inside, dtype=dtype, device=self.codes.device)
        step = max(1, (_PIECE_CPU if made.device.type == "cpu" else _PIECE) // inside)
        for start in range(0, out, step):
            stop = min(start + step, out)
            made[start:stop] = self._numbers(slice(start, stop))
        return made

    def _numbers(self, at: slice) -> torch.Tensor:
        """Rows in fp32."""
        # One look-up gives both numbers of a byte, ten times as fast as shifting and masking them.
        pairs = _pairs(self.codes.device).index_select(0, self.codes[at].reshape(-1).int())
        numbers = pairs.view(torch.float32).view(len(self.codes[at]), -1)
        zeros, scales = self.zeros[at].float(), self.scales[at].float()
        if self.groups is not None:
            order = self.groups.int()
            return numbers.sub_(zeros.index_select(1, order)).mul_(scales.index_select(1, order))
        grouped = numbers.view(len(numbers), zeros.shape[1], -1)
        return grouped.sub_(zeros[..., None]).mul_(scales[..., None]).view(numbers.shape)


@functools.cache
def _pairs(device: torch.device) -> torch.Tensor:
    """[256]: the two fp32 numbers that a byte of two codes stands for, as the bits of one int64."""
    codes = torch.arange(256, device="cpu")
    both = torch.stack([codes & 15, codes >> 4], dim=1).float().contiguous()
    return both.view(torch.int64).reshape(-1).to(device)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [..., words] → uint8 [..., words, 8], the lowest four bits first."""
    octets = words.contiguous().view(torch.uint8)  # the lowest eight bits first, on every machine that torch runs on
    halves = torch.stack([octets & 15, octets >> 4], dim=-1)
    return halves.view(*words.shape, 8)


def in_halves(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] below 16 → [out, in / 2], the first of two in the lower half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def reference(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The same by its definition. codes: [out, in] whole numbers; zeros, scales: [out, groups]; groups: [in]."""
    at = groups.long()
    return ((codes.double() - zeros.double()[:, at]) * scales.double()[:, at]).to(dtype)
