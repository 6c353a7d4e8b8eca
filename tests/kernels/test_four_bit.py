from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.errors import ModelError
from finetune.kernels import four_bit
from finetune.kernels.four_bit import DTYPES, Nested, Packed, dequantize, into_bitsandbytes, quantize, round_trip

KINDS = ["nf4", "fp4"]
BOTH = pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
CPU = torch.device("cpu")


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Weights whose rows differ in size, as a model's do."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(*shape[:-1], 1, generator=generator) * 0.05
    return (torch.randn(shape, generator=generator) * sizes).to(dtype)


def bits(values: torch.Tensor) -> torch.Tensor:
    """So that -0.0 is not 0.0."""
    return values.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(bits(one), bits(other))


def nibbles(data: torch.Tensor) -> torch.Tensor:
    flat = data.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)


def one_zero(codes: torch.Tensor, kind: str) -> torch.Tensor:
    """bitsandbytes' codes with FP4's second zero made the first, as ours are."""
    return torch.where(codes == 8, 0, codes) if kind == "fp4" else codes


def tensors(packed: Packed) -> list[torch.Tensor]:
    scales = packed.scales
    return [packed.data, *([scales.codes, scales.absmax, scales.offset] if isinstance(scales, Nested) else [scales])]


def edges_of(kind: str) -> torch.Tensor:
    """The midpoints between bitsandbytes' own numbers, ascending."""
    numbers = bnb.create_dynamic_map() if kind == "dynamic" else bnb.get_4bit_type(kind, device="cpu")
    ascending = torch.tensor(sorted(set(numbers.tolist())))
    return (ascending[:-1] + ascending[1:]) / 2


def by_hand(packed: Packed, dtype: torch.dtype) -> torch.Tensor:
    """The definition, value by value in Python floats: a product of two fp32 is exact in them."""
    numbers = bnb.get_4bit_type(packed.kind, device="cpu").tolist()
    scales = packed.scales.decoded() if isinstance(packed.scales, Nested) else packed.scales
    codes = nibbles(packed.data).tolist()[: packed.shape.numel()]
    exact = [numbers[code] * float(scales[at // packed.blocksize]) for at, code in enumerate(codes)]
    return torch.tensor(exact, dtype=torch.float64).float().to(dtype).reshape(packed.shape)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_numbers_are_bitsandbytes_own() -> None:
    for kind in KINDS:
        assert same(four_bit._code(kind, CPU).numbers, bnb.get_4bit_type(kind, device="cpu"))
    assert same(four_bit._code("dynamic", CPU).numbers, bnb.create_dynamic_map())


@pytest.mark.parametrize("kind", [*KINDS, "dynamic"])
def test_nearest_number_in_every_cell_and_around_every_edge(kind: str) -> None:
    code, edges = four_bit._code(kind, CPU), edges_of(kind)
    cells = torch.arange(1 << 16, dtype=torch.int32) << 16
    ends = torch.cat([cells, cells | 0xFFFF, cells | 0x7FFF]).view(torch.float32)
    infinity = torch.tensor(math.inf)
    around = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])
    scaled = torch.cat([ends[ends.abs() <= 1], around, code.numbers, -torch.zeros(1)])
    assert len(scaled) > 90_000
    found = code.numbers[code.nearest(scaled).int()]
    wanted = torch.tensor(sorted(set(code.numbers.tolist())))[(scaled[:, None] > edges).sum(dim=1)]
    assert torch.equal(found, wanted)
    assert kind != "fp4" or not bool((code.nearest(scaled) == 8).any())


@ALL_KINDS
@ALL_DTYPES
@BOTH
@pytest.mark.parametrize("shape", [(64, 64), (33, 40), (7, 100), (1, 6), (2, 3, 50), (300, 256)])
def test_dequantising_is_bitsandbytes_own(shape: tuple[int, ...], double: bool, dtype: torch.dtype, kind: str) -> None:
    packed = quantize(random(shape), kind, double=double)
    data, state = into_bitsandbytes(packed)
    state.dtype = dtype
    assert same(dequantize(packed, dtype), bnb.dequantize_4bit(data, state))


@ALL_KINDS
@ALL_DTYPES
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(96, 1024), (33, 40), (5, 7), (1, 1)])
def test_packing_is_bitsandbytes_cpu_packing(
    shape: tuple[int, ...], blocksize: int, dtype: torch.dtype, kind: str
) -> None:
    weight = random(shape, dtype)
    packed = quantize(weight, kind, double=False, blocksize=blocksize)
    data, state = bnb.quantize_4bit(weight, quant_type=kind, blocksize=blocksize)
    whole = weight.numel() // blocksize * blocksize
    assert torch.equal(nibbles(packed.data)[:whole], one_zero(nibbles(data), kind)[:whole])
    assert isinstance(packed.scales, torch.Tensor)
    assert same(packed.scales, state.absmax)
    _, made = into_bitsandbytes(packed)
    for field in ("shape", "dtype", "blocksize", "quant_type", "nested", "offset"):
        assert getattr(made, field) == getattr(state, field), field
    assert same(made.code, state.code)


@ALL_KINDS
@pytest.mark.parametrize("shape", [(33, 40), (5, 7), (1, 1)])
def test_a_short_last_block_is_multiplied_by_its_inverse_as_the_others(shape: tuple[int, ...], kind: str) -> None:
    """As bitsandbytes' CUDA kernel does it; its CPU path divides there, and finds another code now and then."""
    weight, code = random(shape, torch.bfloat16), four_bit._code(kind, CPU)
    packed = quantize(weight, kind, double=False, blocksize=4096)
    data, _ = bnb.quantize_4bit(weight, quant_type=kind, blocksize=4096)
    flat = weight.float().reshape(-1)
    largest, count = flat.abs().amax(), len(flat)
    assert torch.equal(nibbles(packed.data)[:count], code.nearest(flat * (1 / largest)))
    assert torch.equal(one_zero(nibbles(data), kind)[:count], code.nearest(flat / largest))
    assert torch.equal(nibbles(packed.data)[count:], one_zero(nibbles(data), kind)[count:])


@ALL_KINDS
def test_double_quantisation_differs_from_bitsandbytes_only_where_its_cpu_kernel_rounds_loosely(kind: str) -> None:
    weight = random((1024, 1024))
    packed = quantize(weight, kind, double=True)
    _, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    nested = packed.scales
    assert isinstance(nested, Nested)
    maxima = four_bit.block_maxima(weight)
    assert same(nested.offset, torch.tensor(math.fsum(maxima.tolist()) / len(maxima)))
    centred = (maxima - nested.offset).view(-1, 256)
    assert same(nested.absmax, centred.abs().amax(dim=1))
    scaled = (centred * (1 / nested.absmax)[:, None]).view(-1)
    edges = edges_of("dynamic")
    assert torch.equal(nested.codes, torch.bucketize(scaled, edges).to(torch.uint8))
    torch.testing.assert_close(nested.offset, state.offset, rtol=2**-22, atol=0)
    other = (nested.codes != state.absmax).nonzero().reshape(-1)
    assert len(other) < 0.01 * len(nested.codes)
    near = (scaled[other, None] - edges).abs().amin(dim=1)
    assert bool((near < 2.0**-16).all())
    _, ours = into_bitsandbytes(packed)
    assert (ours.state2.blocksize, ours.state2.dtype) == (state.state2.blocksize, state.state2.dtype)
    assert same(ours.state2.code, state.state2.code)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    double=st.booleans(),
    blocksize=st.sampled_from([32, 64, 128]),
    magnitude=st.integers(-36, 4),
    seed=st.integers(0, 2**32),
)
def test_any_weight(
    shape: list[int], dtype: torch.dtype, kind: str, double: bool, blocksize: int, magnitude: int, seed: int
) -> None:
    shape[0] = min(shape[0], 30_000 // math.prod(shape[1:]) + 1)
    weight = (random(tuple(shape), seed=seed) * 10.0**magnitude).to(dtype)
    packed = quantize(weight, kind, double=double, blocksize=blocksize)
    assert packed.data.shape == ((weight.numel() + 1) // 2,)
    found = dequantize(packed)
    assert (found.shape, found.dtype) == (weight.shape, dtype)
    if weight.numel() <= 5000:
        assert torch.equal(found, by_hand(packed, dtype))  # torch's own product may sign a zero
    assert same(found, round_trip(weight, kind, double=double, blocksize=blocksize))
    if not double:  # half the widest gap between numbers, 1/6 in fp4
        room = torch.repeat_interleave(four_bit.block_maxima(weight, blocksize), blocksize)[: weight.numel()]
        error = (found.float() - weight.float()).abs().reshape(-1)
        assert bool((error <= room * (0.1667 + 2**-7) + 2.0**-64 * (room == 0) + 2.0**-24 * (dtype == DTYPES[2])).all())


@ALL_KINDS
@BOTH
def test_a_streamed_round_trip_has_the_bits_of_the_whole(double: bool, kind: str) -> None:
    weight = random((96, 1376), torch.bfloat16)  # 1376 = 21.5 blocks: two rows are the least that can stand alone
    pieces = [weight[:2], weight[2:50], weight[50:]]
    scales = four_bit.scales_of(torch.cat([four_bit.block_maxima(piece) for piece in pieces]), double=double)
    counts = [piece.numel() // 64 for piece in pieces]
    parts = [
        round_trip(piece, kind, double=double, scales=part)
        for piece, part in zip(pieces, torch.split(scales, counts), strict=True)
    ]
    assert same(torch.cat(parts), dequantize(quantize(weight, kind, double=double)))


@pytest.mark.usefixtures("threads")
@ALL_KINDS
def test_threads_change_nothing(kind: str) -> None:
    weight = random((1024, 1100), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    maxima = torch.rand(1_095_680, generator=generator) * 0.02 + 0.04  # torch.mean adds these up in another order
    runs = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        packed, nested = quantize(weight, kind, double=True), four_bit.nest(maxima)
        runs.append([*tensors(packed), dequantize(packed), nested.codes, nested.absmax, nested.offset])
    for other in runs[1:]:
        assert all(same(one, two) for one, two in zip(runs[0], other, strict=True))
    assert float(runs[0][-1]) == float(torch.tensor(math.fsum(maxima.tolist()) / len(maxima)))


def test_the_callers_default_device_and_gradients_change_nothing() -> None:
    weight = random((40, 64))
    wanted = dequantize(quantize(weight, "fp4", double=True))
    four_bit._code.cache_clear()
    with torch.device("meta"):
        found = round_trip(weight.requires_grad_(), "fp4", double=True)
    assert same(found, wanted)
    assert not found.requires_grad


@ALL_KINDS
@BOTH
def test_zero_blocks_stay_zero(double: bool, kind: str) -> None:
    weight = torch.zeros(4, 100)
    assert same(round_trip(weight, kind, double=double), weight)
    weight[2] = 0.5
    found = round_trip(weight, kind, double=double)
    assert bool((found[2] != 0).all())
    assert bool((found[:2] == 0).all())
    assert bool((found[3] == 0).all())


@ALL_KINDS
def test_one_scale_everywhere_is_kept_by_double_quantisation(kind: str) -> None:
    weight = random((4, 64)).sign() * 0.3
    assert same(round_trip(weight, kind, double=True), weight)


@ALL_KINDS
@ALL_DTYPES
def test_no_product_is_subnormal(dtype: torch.dtype, kind: str) -> None:
    """Where bitsandbytes' kernels disagree with each other: some flush such products to zero."""
    sizes = 2.0 ** torch.arange(-126, -40, 1.0)
    packed = quantize(random((len(sizes), 64)).sign() * sizes[:, None] * torch.linspace(0, 1, 64), kind, double=False)
    data, state = into_bitsandbytes(packed)
    state.dtype = dtype
    assert same(dequantize(packed, dtype), bnb.dequantize_4bit(data, state))
    products = dequantize(packed, torch.float32).abs()
    assert bool(((products == 0) | (products >= torch.finfo(torch.float32).tiny)).all())
    assert bool((products.amax(dim=1) > 0).eq(sizes >= 2.0**-64).all())


@ALL_DTYPES
@BOTH
def test_a_bitsandbytes_layer_holds_it_and_gives_it_back(double: bool, dtype: torch.dtype) -> None:
    weight = random((96, 128), dtype)
    packed = quantize(weight, "nf4", double=double)

    def layer() -> Any:
        return bitsandbytes.nn.Linear4bit(128, 96, bias=False, compute_dtype=dtype, quant_type="nf4")

    filled = layer()
    filled.weight = four_bit.parameter(packed, filled)
    filled = filled.to("cpu")  # which quantises a weight that is not marked as done
    assert filled.quant_state is filled.weight.quant_state
    assert filled.weight.compress_statistics == double
    dense = dequantize(packed)
    assert same(bnb.dequantize_4bit(filled.weight.data, filled.weight.quant_state), dense)
    x = random((3, 128), dtype, seed=5)
    assert torch.equal(filled(x), torch.nn.functional.linear(x, dense))
    saved = {name.removeprefix("weight."): value for name, value in filled.state_dict().items()}
    again = bitsandbytes.nn.Params4bit.from_prequantized(saved.pop("weight"), saved, device="cpu")
    assert same(bnb.dequantize_4bit(again.data, again.quant_state), dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 64 * 700, 64 * 1000 + 3])
def test_what_is_not_finite_is_refused(bad: float, at: int) -> None:
    weight = random((1, 64 * 1000 + 4), torch.bfloat16)
    weight[0, at] = bad
    for run in (quantize, round_trip):
        with pytest.raises(ModelError, match="NaN or infinity"):
            run(weight, "nf4", double=False)


@pytest.mark.parametrize(("dtype", "blocksize"), [(torch.float64, 64), (torch.int8, 64), (torch.float32, 48)])
def test_other_dtypes_and_blocksizes_are_refused(dtype: torch.dtype, blocksize: int) -> None:
    with pytest.raises(ModelError, match="4-bit packing takes no"):
        quantize(torch.ones(8, 64, dtype=dtype), "nf4", double=False, blocksize=blocksize)


@BOTH
def test_memory_beyond_the_result_is_a_few_pieces(double: bool) -> None:
    weight, big = random((1024, 2048), torch.bfloat16), set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > 16 * four_bit._PIECE_CPU:
                big.add(out.untyped_storage().data_ptr())
            return out

    packed = quantize(weight, "nf4", double=double)
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: quantize(weight, "nf4", double=double).data,
        lambda: dequantize(packed),
        lambda: round_trip(weight, "nf4", double=double),
    ]
    for run in runs:
        big.clear()
        with Watch():  # type: ignore[no-untyped-call]
            result = run()
        given = {held.untyped_storage().data_ptr() for held in (weight, packed.data)}
        assert big - given == {result.untyped_storage().data_ptr()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card on this machine: not run")
@ALL_KINDS
@ALL_DTYPES
@BOTH
def test_cuda_packs_the_same_bytes(double: bool, dtype: torch.dtype, kind: str) -> None:
    for shape in [(4096, 1100), (33, 40), (5, 7), (8192, 5120)]:
        weight = random(shape, dtype)
        here, there = quantize(weight, kind, double=double), quantize(weight.cuda(), kind, double=double)
        assert all(same(one, two.cpu()) for one, two in zip(tensors(here), tensors(there), strict=True))
        assert same(dequantize(here), dequantize(there).cpu())
        data, state = into_bitsandbytes(there)
        assert same(dequantize(here), bnb.dequantize_4bit(data, state).cpu())
        assert same(dequantize(here), round_trip(weight.cuda(), kind, double=double).cpu())
