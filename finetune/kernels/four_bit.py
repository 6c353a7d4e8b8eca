"""NF4 and FP4 in plain torch: the same bytes from every device, and bitsandbytes' own layers take them.

bitsandbytes packs a weight differently on each device: its CUDA kernels are built with fast math and cut FP4 at other
numbers than its CPU path, its CPU kernel for double quantisation rounds loosely near midpoints, and its mean depends on
the number of threads. Here are only comparisons, table look-ups, sums in a stated order, and products and quotients
that IEEE rounds once; so a base packed on one machine is the base replayed on another, bit for bit.

A block is ``blocksize`` consecutive values of the flat weight, the last one may be shorter. Its scale is its largest
magnitude; each value times the inverse of that becomes the nearest of 16 numbers (Dettmers et al. 2023, section 3),
of two equally near the lower; the first of two values goes into the high half of a byte. Double quantisation holds the
scales, less their mean, in 8 bits, in blocks of 256.

Whole tensors: ``quantize``, ``dequantize``, ``round_trip``. In row blocks, where each holds whole quantisation blocks:
``block_maxima`` of every row block first, then ``scales_of`` all of them together, which alone see the mean, then
``round_trip`` of every row block with its part of the scales: the bits of the whole tensor's round trip.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.errors import ModelError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NESTED_BLOCK, BLOCK = 256, 64

# A block below this is zero. With a scale this large no product of scale and number is subnormal, and subnormal
# products are where bitsandbytes differs from itself: some of its kernels flush them to zero (CUDA's fast math, bf16
# on CPUs with AVX-512-bf16), others do not.
_SMALLEST = 2.0**-64

# Values worked on at a time: whole blocks of any size. On a CPU they stay in the cache, and below the count from which
# torch splits an operation between threads, which costs more than it brings here; elsewhere a launch should pay.
_PIECE_CPU, _PIECE = 7 * 4096, 1 << 24

# The quantiles of a normal distribution, by code.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of fraction, in twelfths, by code. 8 would be minus zero, and is never written.
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Block scales in 8 bits. codes: uint8 [blocks]; absmax: fp32 [blocks / 256, rounded up]; offset: fp32 scalar."""

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    def decoded(self) -> torch.Tensor:
        """The scales as they act: fp32 [blocks]. The product is rounded, then the sum; never both at once."""
        numbers = _code("dynamic", self.codes.device).numbers.index_select(0, self.codes.int())
        return numbers.mul_(_spread(self.absmax, NESTED_BLOCK, len(numbers))).add_(self.offset)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight in 4 bits. data: uint8 [values / 2, rounded up]; scales: fp32 [blocks], or nested."""

    data: torch.Tensor
    scales: torch.Tensor | Nested
    shape: torch.Size
    dtype: torch.dtype
    kind: str
    blocksize: int

    def with_decoded_scales(self) -> Packed:
        """The same weight with its block scales in fp32: 5 MB more for 100 million weights, and never decoded again."""
        return replace(self, scales=self.scales.decoded()) if isinstance(self.scales, Nested) else self


def quantize(weight: torch.Tensor, kind: str, *, double: bool, blocksize: int = BLOCK) -> Packed:
    """A weight of any shape in fp32, bf16 or fp16, packed. ``kind``: nf4 or fp4.

    Raises:
        ModelError: NaN or infinity in the weight, or a dtype or blocksize that is not offered.
    """
    maxima = block_maxima(weight, blocksize)
    flat, code, inverse = weight.detach().reshape(-1), _code(kind, weight.device), _inverse(maxima)
    data = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    for start, stop, blocks in _pieces(flat, blocksize):
        data[start // 2 : (stop + 1) // 2] = _pack(flat[start:stop], inverse[blocks], code, blocksize)
    scales = nest(maxima) if double else maxima
    return Packed(data=data, scales=scales, shape=weight.shape, dtype=weight.dtype, kind=kind, blocksize=blocksize)


def dequantize(packed: Packed, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as it acts, in ``dtype`` or the dtype that it had: number times scale in fp32, rounded once."""
    scales = packed.scales.decoded() if isinstance(packed.scales, Nested) else packed.scales
    code = _code(packed.kind, packed.data.device)
    flat = torch.empty(packed.shape.numel(), dtype=dtype or packed.dtype, device=packed.data.device)
    for start, stop, blocks in _pieces(flat, packed.blocksize):
        half = packed.data[start // 2 : (stop + 1) // 2]
        flat[start:stop] = _unpack(half, scales[blocks], code, packed.blocksize)[: stop - start]
    return flat.view(packed.shape)


def round_trip(
    weight: torch.Tensor, kind: str, *, double: bool, blocksize: int = BLOCK, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """``dequantize(quantize(weight, …))`` without holding the packed form; the same bits, in the weight's dtype.

    For rows of a larger weight, ``scales`` are their blocks' part of ``scales_of`` the whole.

    Raises:
        ModelError: as ``quantize``.
    """
    maxima = block_maxima(weight, blocksize)
    scales = scales_of(maxima, double=double) if scales is None else scales
    flat, code, inverse = weight.detach().reshape(-1), _code(kind, weight.device), _inverse(maxima)
    out = torch.empty_like(flat)
    for start, stop, blocks in _pieces(flat, blocksize):
        half = _pack(flat[start:stop], inverse[blocks], code, blocksize)
        out[start:stop] = _unpack(half, scales[blocks], code, blocksize)[: stop - start]
    return out.view(weight.shape)


def block_maxima(weight: torch.Tensor, blocksize: int = BLOCK) -> torch.Tensor:
    """The largest magnitude of each block, fp32 [blocks]; zero where it is below 2^-64.

    Raises:
        ModelError: NaN or infinity in the weight, or a dtype or blocksize that is not offered.
    """
    if weight.dtype not in DTYPES or blocksize not in BLOCKSIZES:
        what = f"4-bit packing takes no {weight.dtype} in blocks of {blocksize}"
        raise ModelError(what, "quantize", f"one of {', '.join(map(str, DTYPES))}, blocks of {BLOCKSIZES}")
    flat = weight.detach().reshape(-1)
    maxima = torch.empty(-(-flat.numel() // blocksize), dtype=torch.float32, device=weight.device)
    for start, stop, blocks in _pieces(flat, blocksize):
        maxima[blocks] = _blocked(flat[start:stop], blocksize).float().abs().amax(dim=1)
    if not bool(torch.isfinite(maxima).all()):
        raise ModelError("a weight to be packed holds NaN or infinity", "quantize", "fetch the base again")
    return maxima.masked_fill_(maxima < _SMALLEST, 0.0)


def scales_of(maxima: torch.Tensor, *, double: bool) -> torch.Tensor:
    """The scales that a whole weight with these ``block_maxima`` acts with: fp32 [blocks]."""
    return nest(maxima).decoded() if double else maxima


def nest(maxima: torch.Tensor) -> Nested:
    """Double quantisation of the ``block_maxima`` of a whole weight."""
    offset = _mean(maxima)
    centred = maxima - offset
    absmax = block_maxima(centred, NESTED_BLOCK)
    scaled = centred.mul_(_spread(_inverse(absmax), NESTED_BLOCK, len(centred)))
    return Nested(codes=_code("dynamic", maxima.device).nearest(scaled), absmax=absmax, offset=offset)


def into_bitsandbytes(packed: Packed) -> tuple[torch.Tensor, Any]:
    """The packed weight [bytes, 1] and the ``bitsandbytes.functional.QuantState`` that its functions take with it."""
    from bitsandbytes.functional import QuantState

    nested = packed.scales if isinstance(packed.scales, Nested) else None
    numbers, dynamic = (_code(kind, packed.data.device).numbers.clone() for kind in (packed.kind, "dynamic"))
    state = QuantState(
        absmax=nested.codes if nested else packed.scales, shape=packed.shape, code=numbers, blocksize=packed.blocksize,
        quant_type=packed.kind, dtype=packed.dtype,
        offset=nested.offset if nested else None,
        state2=QuantState(absmax=nested.absmax, code=dynamic, blocksize=NESTED_BLOCK, dtype=torch.float32)
        if nested else None,
    )  # fmt: skip
    return packed.data[:, None], state


def parameter(packed: Packed, module: Any = None) -> Any:
    """The frozen ``Params4bit`` that a bitsandbytes ``Linear4bit`` holds; ``module`` is the layer that it is for."""
    from bitsandbytes.nn import Params4bit

    data, state = into_bitsandbytes(packed)
    if module is not None:
        module.quant_state = state
    return Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=packed.blocksize, compress_statistics=state.nested,
        quant_type=packed.kind, quant_storage=torch.uint8, module=module, bnb_quantized=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Code:
    """The numbers that codes stand for, fp32 by code, and tables that find the nearest one.

    A cell is all fp32 that share their upper 16 bits: so narrow that at most one edge between two numbers lies in it.
    ``edges`` [2 cells] holds that edge, twice, or infinity; ``codes`` [2 cells] the code up to it and the one above.
    ``pairs`` [256]: the two fp32 numbers that a byte of two codes stands for, as the bits of one int64.
    """

    numbers: torch.Tensor
    edges: torch.Tensor
    codes: torch.Tensor
    pairs: torch.Tensor

    def nearest(self, scaled: torch.Tensor) -> torch.Tensor:
        """fp32 in [-1, 1] → uint8 codes. bucketize finds the same and takes ten times as long."""
        cells = scaled.view(torch.int32).bitwise_right_shift(15).bitwise_and_(0x1FFFE)
        cells += scaled > self.edges.index_select(0, cells)
        return self.codes.index_select(0, cells)


@functools.cache
def _code(kind: str, device: torch.device) -> _Code:
    """nf4, fp4, or dynamic: the 8-bit code of the scales. Made on the CPU, whatever default device the caller set."""
    with torch.device("cpu"):
        return _Code(**{name: table.to(device) for name, table in _tables(kind).items()})


def _tables(kind: str) -> dict[str, torch.Tensor]:
    twelfths = torch.tensor(_FP4, dtype=torch.float32) / 12
    numbers = {"nf4": torch.tensor(_NF4, dtype=torch.float32), "fp4": twelfths, "dynamic": _dynamic()}[kind]
    order = torch.argsort(numbers, stable=True).to(torch.uint8)
    if kind == "fp4":
        order = order[order != 8]
    ascending = numbers[order.int()]
    between = (ascending[:-1] + ascending[1:]) / 2
    cells = torch.arange(1 << 16, dtype=torch.int32).bitwise_left_shift_(16).view(torch.float32)
    step, edge = torch.bucketize(cells, between), torch.full_like(cells, float("inf"))
    inside = (between.view(torch.int32).bitwise_right_shift(16) & 0xFFFF).long()
    step[inside], edge[inside] = torch.arange(len(between)), between
    codes = torch.stack([order[step], order[(step + 1).clamp(max=len(between))]], dim=1).reshape(-1)
    pairs = torch.cartesian_prod(numbers[:16], numbers[:16]).contiguous().view(torch.int64).reshape(-1)
    return {"numbers": numbers, "edges": edge.repeat_interleave(2), "codes": codes, "pairs": pairs}


def _dynamic() -> torch.Tensor:
    """The dynamic 8-bit code (Dettmers et al. 2022, section 2.1), fp32 [256] ascending.

    Zero, one, and in each decade 10^(d-6) of seven, 2^d numbers of either sign: the middles of equal parts of
    [0.1, 1], counted from the nearer end. The float64 sums below are exact and rounded once, as a fused multiply-add
    does it on a CPU that has one; torch.linspace would depend on that.
    """
    start = torch.tensor(0.1)
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        parts = 1 << decade
        step, count = ((1 - start) / parts).double(), torch.arange(parts + 1, dtype=torch.float64)
        ends = torch.where(count < (parts + 1) // 2, start.double() + step * count, 1 - step * (parts - count)).float()
        numbers = (ends[:-1] + ends[1:]) / 2 * torch.tensor(10.0 ** (decade - 6))
        found += [numbers, -numbers]
    return torch.cat(found).sort().values


def _pieces(flat: torch.Tensor, blocksize: int) -> Iterator[tuple[int, int, slice]]:
    """Values from and to, and the blocks that they are."""
    size = _PIECE_CPU if flat.device.type == "cpu" else _PIECE
    for start in range(0, flat.numel(), size):
        stop = min(start + size, flat.numel())
        yield start, stop, slice(start // blocksize, -(-stop // blocksize))


def _blocked(values: torch.Tensor, blocksize: int) -> torch.Tensor:
    """[values] → [blocks, blocksize], the last block filled up with zeros."""
    lacking = -values.numel() % blocksize
    return (torch.nn.functional.pad(values, (0, lacking)) if lacking else values).view(-1, blocksize)


def _pack(values: torch.Tensor, inverse: torch.Tensor, code: _Code, blocksize: int) -> torch.Tensor:
    """[values] → uint8 [values / 2, rounded up]."""
    scaled = _blocked(values, blocksize).to(torch.float32, copy=True).mul_(inverse[:, None])
    codes = code.nearest(scaled.view(-1)).view(-1, 2)
    return torch.add(codes[:, 1], codes[:, 0], alpha=16)[: (values.numel() + 1) // 2]


def _unpack(half: torch.Tensor, scales: torch.Tensor, code: _Code, blocksize: int) -> torch.Tensor:
    """uint8 [bytes] → fp32 [blocks * blocksize]."""
    bytes_ = _blocked(half, blocksize // 2).view(-1)
    numbers = code.pairs.index_select(0, bytes_.int()).view(torch.float32)
    return numbers.view(-1, blocksize).mul_(scales[:, None]).view(-1)


def _inverse(maxima: torch.Tensor) -> torch.Tensor:
    """1 / maximum, and 0 for a block of zeros: its values stay 0, which both codes have."""
    return torch.reciprocal(maxima).masked_fill_(maxima == 0, 0.0)


def _spread(values: torch.Tensor, blocksize: int, count: int) -> torch.Tensor:
    """One value per block → one per member, [count]."""
    return values.repeat_interleave(blocksize)[:count]


def _mean(values: torch.Tensor) -> torch.Tensor:
    """The mean, rounded to fp32 once more than float64 rounds: halves added to halves, a tree with no order to choose.

    On the CPU, since not every device has float64. torch.mean adds in an order that the device and threads decide.
    """
    total = values.cpu().double()
    while len(total) > 1:
        total = torch.nn.functional.pad(total, (0, len(total) % 2))
        half = len(total) // 2
        total = total[:half] + total[half:]
    return (total[0] / len(values)).float().to(values.device)
