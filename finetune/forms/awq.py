"""AWQ in 4 bits, as AutoAWQ writes it in its ``gemm`` version: read without it.

Of a linear [out, in]: ``qweight`` int32 [in, out / 8], eight outputs in a word in the order 0 2 4 6 1 3 5 7, the lowest
bits first; ``qzeros`` int32 [groups, out / 8] in the same order; ``scales`` [groups, out].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from finetune.decoder import Packing
from finetune.forms.gptq import FLOATS, bytes_per_weight, checked_group, finite, refuse_missing, replay

if TYPE_CHECKING:
    import torch

    from finetune.kernels.int4 import Int4

__all__ = ["bytes_per_weight", "packing", "parts", "read", "refuse_missing", "replay"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each number of a word is, from the lowest bits on."""


def packing(settings: dict[str, Any]) -> Packing:
    bits, version = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if bits != 4:
        raise ValueError(f"bits is {bits!r}, and 4 are read")
    if version != "gemm":
        raise ValueError(f"version is {version!r}, another order of the numbers; gemm is read")
    if settings.get("zero_point", True) is not True:
        raise ValueError(f"zero_point is {settings['zero_point']!r}, and true is read")
    group = settings.get("group_size", settings.get("q_group_size"))
    return Packing(kind="awq", group=checked_group(group), biased_zeros=False)


def parts(out: int, inside: int, packing: Packing) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    if out % 8 or inside % (packing.group or inside) or inside % 2:
        raise ValueError(f"[{out}, {inside}] does not fill words of eight numbers in groups of {packing.group}")
    groups = packing.groups(inside)
    return {
        "qweight": (("I32",), (inside, out // 8)), "qzeros": (("I32",), (groups, out // 8)),
        "scales": (FLOATS, (groups, out)),
    }  # fmt: skip


def read(parts: Callable[[str], torch.Tensor], packing: Packing) -> Int4:
    """The parts with the inputs of an output beside each other; no number changes."""
    from finetune.kernels.int4 import Int4, in_halves, nibbles

    place = [ORDER.index(output) for output in range(8)]
    codes, zeros = (nibbles(parts(name))[..., place].flatten(1).T.contiguous() for name in ("qweight", "qzeros"))
    return Int4(codes=in_halves(codes), zeros=zeros, scales=finite(parts("scales")).T.contiguous())
