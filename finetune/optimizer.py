"""The optimizer that a recipe names, over the adapter's fp32 masters; and the bytes that its state takes.

AdamW (Loshchilov and Hutter 2019, algorithm 2) is torch's. Its 8-bit and paged kinds (Dettmers et al. 2022) are
bitsandbytes', LoRA-FA (Zhang et al. 2023) and Riemannian preconditioning (Zhang and Pilanci 2024) PEFT's. LoRA+ (Hayou
et al. 2024) is two groups of parameters. All have AdamW's betas and eps, and a rate that the loop sets at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

BETAS, EPS = (0.9, 0.999), 1e-8
RATIO = "rate_ratio"
"""In a parameter group: its rate is the course's times this."""
MIN_8BIT = 4096
"""bitsandbytes' own bound: a tensor with fewer elements keeps 32-bit states."""
_BLOCK = 256
_QMAP = 1024
"""Bytes of one code table of 256 fp32 values; all tensors share two in memory, in a file each has its own."""

_BITSANDBYTES = {
    # kind → (on a card, on a CPU, where nothing can be paged out and the classes would only warn)
    "adamw_8bit": ("AdamW8bit", "AdamW8bit"),
    "paged_adamw": ("PagedAdamW", "AdamW"),
    "paged_adamw_8bit": ("PagedAdamW8bit", "AdamW8bit"),
}


@dataclass(frozen=True)
class Tensors:
    """``count`` tensors of ``elements`` values each. ``role``: A, B, magnitude (DoRA's), frozen (kept beside what a
    method trains), or whole (anything else)."""

    role: str
    elements: int
    count: int

    @property
    def parameters(self) -> int:
        return self.elements * self.count


def make(
    model: torch.nn.Module, kind: str = "adamw", *, weight_decay: float = 0.0, lora_plus_ratio: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer of everything in ``model`` that has a gradient. ``kind``: the word of ``train.optimizer``.

    ``lora_fa`` freezes the model's A matrices. ``lora_plus_ratio``: B's rate is the others' times this; AdamW kinds.
    """
    common: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay}
    if kind == "lora_fa":
        return _lora_fa(model, common)
    common |= {"betas": BETAS, "eps": EPS}
    if kind == "riemannian":
        from peft.optimizers import create_riemannian_optimizer

        return create_riemannian_optimizer(model, torch.optim.AdamW, **common)  # type: ignore[no-any-return]
    groups = _groups(model, lora_plus_ratio)
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True, **common)  # the same formula, one pass for each tensor
    import bitsandbytes

    on_cpu = groups[0]["params"][0].device.type == "cpu"
    made = getattr(bitsandbytes.optim, _BITSANDBYTES[kind][on_cpu])
    return made(groups, min_8bit_size=MIN_8BIT, **common)  # type: ignore[no-any-return]


def _groups(model: torch.nn.Module, ratio: float | None) -> list[dict[str, Any]]:
    """The trained parameters, B apart where it has a rate of its own.

    Not PEFT's ``create_loraplus_optimizer``: that gives B's rate to whatever has one dimension (DoRA's magnitudes, a
    norm trained whole), and takes ``weight_decay`` without applying it.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if ratio is None:
        return [{"params": list(trained.values())}]
    high = [value for name, value in trained.items() if ".lora_B." in name]
    rest = [value for name, value in trained.items() if ".lora_B." not in name]
    return [{"params": rest, RATIO: 1.0}, {"params": high, RATIO: ratio}]


def _lora_fa(model: Any, common: dict[str, Any]) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    made: torch.optim.Optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, **common)
    # PEFT's own eps of 1e-6 is added to a root that is not corrected for bias: in the first steps it is as if it were
    # 3e-5, more than the entries of a large model's gradient, and nothing would move.
    made.param_groups[0]["eps"] = EPS
    return made


def is_trained(kind: str, role: str) -> bool:
    """Whether the optimizer moves tensors of that role at all."""
    return role != "frozen" and not (kind == "lora_fa" and role == "A")


def state_bytes(kind: str, tensors: Sequence[Tensors]) -> int:
    """Bytes of the moments while training: two in fp32, or in 8 bits with one fp32 scale per 256 values each."""
    return sum(one.count * _bytes_of(kind, one) for one in tensors)


def saved_bytes(kind: str, tensors: Sequence[Tensors]) -> int:
    """Bytes of the same in a checkpoint, where each 8-bit tensor's two code tables lie beside it."""
    tables = sum(one.count * 2 * _QMAP for one in tensors if _is_8bit(kind, one))
    return state_bytes(kind, tensors) + tables


def _is_8bit(kind: str, one: Tensors) -> bool:
    return kind.endswith("8bit") and one.elements >= MIN_8BIT


def _bytes_of(kind: str, one: Tensors) -> int:
    if not is_trained(kind, one.role):
        return 0
    if _is_8bit(kind, one):
        return 2 * one.elements + 2 * 4 * -(-one.elements // _BLOCK)
    return 2 * 4 * one.elements


def notes(kind: str, tensors: Sequence[Tensors], device: str) -> list[str]:
    """What a plan says of the choice."""
    said = []
    if kind.startswith("paged") and device == "cuda":
        said.append(f"{kind}: its states may move to the machine's memory while the card is full")
    elif kind.startswith("paged"):
        said.append(f"{kind}: without a card there is nothing to page; the arithmetic is the same")
    small = sum(one.parameters for one in tensors if one.role != "frozen" and not _is_8bit(kind, one))
    if kind.endswith("8bit") and small:
        said.append(f"{kind}: {small:,} parameters in tensors below {MIN_8BIT:,} keep 32-bit states")
    frozen = sum(one.parameters for one in tensors if one.role == "A" and not is_trained(kind, "A"))
    if frozen:
        said.append(f"{kind}: the A matrices ({frozen:,} parameters) stay as they begin")
    return said
