"""Forms of a frozen base in few bits: one file for each kind, behind one small interface.

A word of the recipe's ``quantize.weights`` that is no plain number format belongs to one of these files. Some forms are
made as full-precision weights are read (bitsandbytes, torchao); others lie in the base's folder (GPTQ, AWQ), which
says so in its config.json. Nothing here imports torch before it must.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

from finetune.decoder import DecoderShape, Packing
from finetune.errors import ModelError, RecipeError

if TYPE_CHECKING:
    import torch

MADE = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "torchao_int8": "torchao"}
"""Words of forms that are made while a base is read, and the files that make them."""
STORED = {"gptq": "gptq", "awq": "awq"}
"""Words of forms that lie in the folder; also what its ``quant_method`` says."""
MEASURED = ("nf4", "fp4")
"""Those of which a part of a weight cannot be made without knowing all of it: the scales have a mean."""
HELD = ("nf4", "fp4", "gptq", "awq")
"""Those that are dequantised once on a CPU, and kept, while answers are generated: their codes take long to read."""


class Form(Protocol):
    """What a file of this folder offers. ``word``: the one that the recipe used."""

    def bytes_per_weight(self, word: str, shape: DecoderShape, *, double: bool, device: str) -> float:
        """Bytes that one weight of a layer's linears takes, scales and all, as the plan counts it."""
        ...

    def refuse_missing(self, where: str) -> None:
        """Raise EnvironmentFault where a package that it needs is not installed."""
        ...

    def replay(
        self, word: str, block: torch.Tensor, *, double: bool, start: int = 0, settled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of a weight [rows, in] from ``start`` on as they act in training: dequantised, in the compute dtype.

        ``block`` comes in that dtype, from the folder and never from a live layer; the result is bit-equal to
        ``frozen_linear.dense_weight`` of the layer that loading makes.
        """
        ...


class Measured(Form, Protocol):
    """A form whose row blocks hang together: something of each must be known before any of them can be replayed."""

    def measure(self, block: torch.Tensor) -> torch.Tensor:
        """That something, of one row block."""
        ...

    def settle(self, measured: torch.Tensor, *, double: bool) -> torch.Tensor:
        """All that was measured, in order → ``settled`` of ``replay``."""
        ...


class Made(Form, Protocol):
    """A form that is packed from full-precision weights by this project's own loader."""

    def pack(self, weight: torch.Tensor) -> Any:
        """A weight [out, in] on its device, in the compute dtype → what ``frozen_linear.PackedLinear`` holds."""
        ...


class Stored(Form, Protocol):
    """A form that lies in a folder."""

    def packing(self, settings: dict[str, Any]) -> Packing:
        """What ``quantization_config`` says. Raises ValueError with the reason where that is not read here."""
        ...

    def parts(self, out: int, inside: int, packing: Packing) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
        """Of a linear [out, in]: each stored tensor's last name → (dtypes that it may have, shape).

        Raises ValueError where a linear of that shape cannot be packed so.
        """
        ...

    def read(self, parts: Callable[[str], torch.Tensor], packing: Packing) -> Any:
        """The stored tensors by their last names → what ``frozen_linear.PackedLinear`` holds.

        Raises ValueError with the reason where their numbers cannot be.
        """
        ...


def is_packed(word: str) -> bool:
    """Whether a base in that form holds its linears in few bits."""
    return word in MADE or word in STORED


def by_hand(word: str) -> bool:
    """Whether this project's own loader makes its layers; bitsandbytes' are made by transformers."""
    return is_packed(word) and MADE.get(word) != "bitsandbytes"


def get(word: str) -> Form:
    """The file of a form in few bits."""
    return cast(Form, importlib.import_module(f"{__name__}.{(MADE | STORED)[word]}"))


def measured(word: str) -> Measured:
    """The file of a form of ``MEASURED``."""
    return cast(Measured, get(word))


def made(word: str) -> Made:
    """The file of a form that this project packs itself."""
    return cast(Made, get(word))


def stored(kind: str) -> Stored:
    """The file of a form that lies in a folder."""
    return cast(Stored, get(kind))


def packages(word: str) -> tuple[str, ...]:
    """Packages that a form hangs on beyond those of every run."""
    return ("torchao",) if word == "torchao_int8" else ()


def packing_of(config: dict[str, Any], where: str) -> Packing | None:
    """How a folder's linears are packed, by its config.json; None: they are not.

    Raises:
        ModelError: packed in a way that is not read here.
    """
    if "quantization_config" not in config:
        return None
    settings = config["quantization_config"]
    fix = "use the full-precision model; `quantize:` makes a form in few bits of it"
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in STORED:
        known = " and ".join(STORED)
        what = f"the base is already quantised (quant_method {method!r}), and of such bases {known} are read"
        raise ModelError(what, where, fix)
    if config.get("model_type") == "qwen":
        raise ModelError(f"a {method} base in the original Qwen layout is not read", where, fix)
    try:
        return stored(method).packing(settings)
    except ValueError as error:
        raise ModelError(f"quantization_config of {method}: {error}", where, fix) from None


def refuse(word: str, packing: Packing | None, where: str) -> None:
    """Refuse to hold a base as ``word`` that lies in its folder as ``packing`` says, or without the package it needs.

    Raises:
        RecipeError: it lies otherwise there.
        EnvironmentFault: a package is not installed.
    """
    kind = packing.kind if packing else ""
    what = ""
    if word in STORED and word != kind:
        what = f"the base is packed as {kind}, not as {word}" if kind else f"the base is not packed as {word}"
    elif word in MADE and kind:
        what = f"the base is packed as {kind} already: {word} would round it a second time"
    if what:
        raise RecipeError(
            what, where, f"write {kind}, or bf16 to hold it dequantised" if kind else "write nf4, or bf16"
        )
    if is_packed(word):
        get(word).refuse_missing(where)
