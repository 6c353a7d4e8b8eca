"""A frozen base linear, 16-bit or in few bits: dequantise, multiply, and never anything else.

What a form in few bits is made of stands in ``forms``; here is what all of them have in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.nn.functional import linear


class Frozen:
    """Mixed into a linear whose weight is held in few bits. ``held_dense``: its matrix, while it is kept."""

    held_dense: torch.Tensor | None = None

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as it acts: [out, in] in ``dtype``."""
        raise NotImplementedError

    def to_hold(self) -> torch.Tensor | None:
        """The weight as it is kept for many small products; None: it is dequantised each time."""
        return None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _FrozenMatmul.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)


def dense_weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """The layer's weight as it acts: [out, in] in ``dtype``, dequantised where it is packed."""
    if not isinstance(layer, Frozen):
        return layer.weight.to(dtype)  # type: ignore[no-any-return]
    return layer.dense(dtype) if layer.held_dense is None else layer.held_dense.to(dtype)


class _FrozenMatmul(torch.autograd.Function):
    """y = x Wᵀ with W read from the layer both ways, so that no dequantised copy waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        ctx.layer = layer
        return linear(x, dense_weight(layer, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ dense_weight(ctx.layer, grad.dtype), None


class Held(Protocol):
    """A packed matrix [out, in]. What it computes with is its own: no cast of the model reaches it."""

    @property
    def codes(self) -> torch.Tensor: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def slow(self) -> bool:
        """Whether reading the codes takes so long that the matrix is better kept for many small products."""
        ...

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, number by number rounded once to ``dtype``."""
        ...


class PackedLinear(Frozen, torch.nn.Linear):
    """A frozen linear over a packed matrix, which computes in ``dtype``. PEFT takes it for a plain linear, whose
    ``weight`` is made anew at each look: it cannot be set, and what is written into its numbers is lost."""

    def __init__(self, held: Held, bias: torch.nn.Parameter | None, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.held, self.dtype = held, dtype
        self.out_features, self.in_features = held.shape
        self.codes = torch.nn.Parameter(held.codes, requires_grad=False)  # PEFT asks a parameter for the device
        self.register_parameter("bias", bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.held.dense(self.dtype).to(dtype)  # also where activations are wider: it acts as it acted

    def to_hold(self) -> torch.Tensor | None:
        return self.held.dense(self.dtype) if self.held.slow else None

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return dense_weight(self, self.dtype)

    def __repr__(self) -> str:
        return f"PackedLinear({self.in_features}, {self.out_features})"


@contextlib.contextmanager
def held_dense(model: torch.nn.Module) -> Iterator[None]:
    """Inside, every weight that is slow to read is dequantised once and kept: for many small products, as in
    generation."""
    layers = [module for module in model.modules() if isinstance(module, Frozen)]
    try:
        for layer in layers:
            layer.held_dense = layer.to_hold()
        yield
    finally:
        for layer in layers:
            layer.held_dense = None


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
    return any(isinstance(module, Frozen) for module in model.modules())


def is_hidden(module: torch.nn.Module) -> bool:
    """Whether it is quantised, and its ``weight`` is another thing than its matrix."""
    return isinstance(module, Frozen) and not isinstance(module, PackedLinear)


def show(model: Any) -> None:
    """Let every quantised linear of a transformers model show its weight, in place."""
    for name, module in list(model.named_modules()):
        if is_hidden(module) and not name.endswith(".packed"):
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
