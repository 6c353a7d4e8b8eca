"""GPTQ in 4 bits, as AutoGPTQ and GPTQModel write it: read without either.

Of a linear [out, in]: ``qweight`` int32 [in / 8, out], eight rows of the transposed weight in a word, the lowest bits
first; ``qzeros`` int32 [groups, out / 8], packed along the outputs; ``scales`` [groups, out]; ``g_idx`` int32 [in], the
group of each input, in any order where the base was made with ``desc_act``. The first format stores each zero less one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.decoder import DecoderShape, Packing

if TYPE_CHECKING:
    import torch

    from finetune.kernels.int4 import Int4

FORMATS = ("gptq", "gptq_v2")
FLOATS = ("F16", "BF16", "F32")
_ONES = 0x11111111
"""One in each of a word's eight numbers. Added to the whole word, as GPTQModel does: a zero of 0 was stored with a
borrow from its neighbour, which the carry gives back."""


def packing(settings: dict[str, Any]) -> Packing:
    bits, group = settings.get("bits"), settings.get("group_size")
    if bits != 4:
        raise ValueError(f"bits is {bits!r}, and 4 are read")
    if settings.get("dynamic"):
        raise ValueError("dynamic gives modules settings of their own, which is not read")
    if settings.get("lm_head"):
        raise ValueError("the head is packed too, which is not read")
    written = settings.get("checkpoint_format", settings.get("format", "gptq"))
    if written not in FORMATS:
        raise ValueError(f"checkpoint_format is {written!r}, and {' and '.join(FORMATS)} are read")
    if settings.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"pack_dtype is {settings['pack_dtype']!r}, and int32 is read")
    return Packing(kind="gptq", group=checked_group(group), biased_zeros=written == "gptq")


def checked_group(group: Any) -> int:
    """``group_size``, 0 where a group is a whole row. Raises ValueError for what is no size."""
    if type(group) is not int or (group != -1 and not 8 <= group <= 1 << 20):
        raise ValueError(f"group_size is {group!r}, where -1 or a number of inputs must stand")
    return max(group, 0)


def parts(out: int, inside: int, packing: Packing) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    if out % 8 or inside % 8:
        raise ValueError(f"[{out}, {inside}] does not fill words of eight numbers")
    groups = packing.groups(inside)
    return {
        "qweight": (("I32",), (inside // 8, out)), "qzeros": (("I32",), (groups, out // 8)),
        "scales": (FLOATS, (groups, out)), "g_idx": (("I32",), (inside,)),
    }  # fmt: skip


def read(parts: Callable[[str], torch.Tensor], packing: Packing) -> Int4:
    """The parts with the inputs of an output beside each other; no number changes."""
    import torch

    from finetune.kernels.int4 import Int4, nibbles

    words, zeros, order = parts("qweight"), parts("qzeros"), parts("g_idx")
    inside, groups = len(order), len(zeros)
    if int(order.min()) < 0 or int(order.max()) >= groups:
        raise ValueError(f"g_idx names group {int(order.max() if order.min() >= 0 else order.min())} of {groups}")
    if packing.biased_zeros:
        zeros = zeros + _ONES
    codes = words.contiguous().view(torch.uint8).view(inside // 8, -1, 4).permute(1, 0, 2).reshape(-1, inside // 2)
    runs = inside % groups == 0 and torch.equal(order, torch.arange(inside, dtype=order.dtype) // (inside // groups))
    return Int4(
        codes=codes.contiguous(), zeros=nibbles(zeros).flatten(1).T.contiguous(),
        scales=finite(parts("scales")).T.contiguous(), groups=None if runs else order.int(),
    )  # fmt: skip


def finite(scales: torch.Tensor) -> torch.Tensor:
    """The scales. Raises ValueError where one is no number: the model would train on without a word."""
    import torch

    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales hold NaN or infinity")
    return scales


def bytes_per_weight(word: str, shape: DecoderShape, *, double: bool, device: str) -> float:
    """Half a byte, and per group a scale in 16 bits and a zero in 8; a base that is not known is taken for 128."""
    group = shape.packing.group if shape.packing else 128
    return 0.5 + 3 / (group or shape.hidden)


def refuse_missing(where: str) -> None:
    """No package is needed."""


def replay(
    word: str, block: torch.Tensor, *, double: bool, start: int = 0, settled: torch.Tensor | None = None
) -> torch.Tensor:
    """What lies in the folder is what acts."""
    return block
