"""A frozen base linear, 16-bit or quantised: dequantise, multiply, and never anything else.

bitsandbytes' own CPU path is not used. On a CPU with AVX-512-bf16 it repacks a 4-bit weight at the first
evaluation-mode forward, and the layer then runs an inference kernel outside autograd: the loss stays the same to the
last digit, the gradients are wrong, and nothing is said. Here the packed weight is only read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from torch.nn.functional import linear

from finetune.kernels import four_bit


def dense_weight(layer: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weight as it acts: [out, in] in ``dtype``, dequantised where it is packed."""
    held = getattr(layer, "held_dense", None)
    if isinstance(held, torch.Tensor):
        return held.to(dtype)
    weight: Any = layer.weight
    if isinstance(layer, Linear4bit):
        return dequantize_4bit(weight.data, _four_bit_state(layer)).to(dtype)  # type: ignore[no-any-return]
    if isinstance(layer, Linear8bitLt):
        return dense_int8(weight.data, _int8_scales(layer), dtype)
    return weight.to(dtype)  # type: ignore[no-any-return]


def _four_bit_state(layer: Any) -> Any:
    """Of a weight that was gathered from shards the layer alone knows it."""
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def dense_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Row-wise int8 codes [out, in] and their largest absolute values [out] → weights (LLM.int8, section 2.1)."""
    return (codes.float() * (scales.float()[:, None] / 127.0)).to(dtype)


def _int8_scales(layer: Any) -> torch.Tensor:
    return layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB  # type: ignore[no-any-return]


class _FrozenMatmul(torch.autograd.Function):
    """y = x Wᵀ with W read from the layer both ways, so that no dequantised copy waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, dense_weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ dense_weight(ctx.layer, grad.dtype), None


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _FrozenMatmul.apply(x, layer)  # type: ignore[no-untyped-call]
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class FrozenLinear4bit(Linear4bit):  # type: ignore[misc]  # bitsandbytes ships no types
    """bitsandbytes' 4-bit storage with this module's arithmetic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and not torch.is_grad_enabled() and isinstance(self.weight, Params4bit):
            return super().forward(x)  # type: ignore[no-any-return]  # its fused kernel for single tokens; CUDA never repacks
        return _forward(self, x)


class FrozenLinear8bit(Linear8bitLt):  # type: ignore[misc]  # bitsandbytes ships no types
    """bitsandbytes' 8-bit storage with this module's arithmetic."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _forward(self, x)


def freeze(model: torch.nn.Module) -> None:
    """Turn every quantised linear of ``model`` into its frozen form, in place."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FrozenLinear4bit
        elif type(module) is Linear8bitLt:
            module.__class__ = FrozenLinear8bit


@contextlib.contextmanager
def held_dense(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every 4-bit weight is dequantised once and kept: for many small products, as in generation. Not those
    of which only a shard is here."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if isinstance(module, FrozenLinear4bit) and isinstance(module.weight, Params4bit)
    ]
    try:
        for layer in layers:
            layer.held_dense = dense_weight(layer, layer.weight.quant_state.dtype)
        yield
    finally:
        for layer in layers:
            layer.held_dense = None


def replay(weight: torch.Tensor, weights: str, double: bool, scales: torch.Tensor | None = None) -> torch.Tensor:
    """A full-precision weight [out, in] as it acted while it was trained against: quantised anew and dequantised.

    From the shard, never from a live layer. ``weight`` comes in the compute dtype, as it did at loading, and so does
    the result; bit-equal to ``dense_weight`` of the layer that loading makes from it. A part of a weight, 64 of its
    rows or a multiple, comes with its part of the
    whole weight's ``four_bit.scales_of``.
    """
    if weights in ("nf4", "fp4"):
        return four_bit.round_trip(weight, weights, double=double, scales=scales)
    if weights == "int8":
        codes, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return dense_int8(codes, scales, weight.dtype)
    return weight


class ShownLinear(torch.nn.Linear):
    """A quantised frozen linear whose ``weight`` is the matrix as it acts, [out, in], made anew at each look.

    Most of PEFT's methods compute with that matrix and know packed ones not at all, or take their codes for it. It
    cannot be set, and what is written into its numbers is lost: nothing here merges into a live base.
    """

    def __init__(self, packed: torch.nn.Module, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.packed, self.dtype = packed, dtype
        self.in_features, self.out_features = packed.in_features, packed.out_features  # type: ignore[assignment]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return dense_weight(self.packed, self.dtype)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        return self.packed.bias  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"ShownLinear({self.in_features}, {self.out_features})"  # PEFT quotes it where it refuses one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)  # type: ignore[no-any-return]


def is_packed(model: torch.nn.Module) -> bool:
    """Whether any of its linears is quantised."""
    return any(isinstance(module, FrozenLinear4bit | FrozenLinear8bit) for module in model.modules())


def show(model: Any) -> None:
    """Let every quantised linear of a transformers model show its weight, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear4bit | FrozenLinear8bit) and not name.endswith(".packed"):
            model.set_submodule(name, ShownLinear(module, model.dtype))


def hide(model: Any) -> None:
    """Undo ``show``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ShownLinear):
            model.set_submodule(name, module.packed)


@contextlib.contextmanager
def contiguous_input(head: torch.nn.Module) -> Iterator[None]:
    """The last position of every prompt is a strided view, for which torch on a CPU multiplies row by row with a copy
    of the whole head each: 50 rows of a 49k vocabulary copied 2.8 GB.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
