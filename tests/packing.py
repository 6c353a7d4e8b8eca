"""A full-precision base packed into GPTQ's and AWQ's layouts by plain rounding to the nearest: bases for tests.

Written from the layouts' own definitions, number by number where that is fast enough, and on purpose not with the code
that reads them.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """codes: int64 [out, in]; zeros, scales: [groups, out] int64 and fp16; groups: int64 [in]."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    groups: torch.Tensor

    def dense(self) -> torch.Tensor:
        """fp64 [out, in]."""
        zeros, scales = (one[self.groups].T.double() for one in (self.zeros, self.scales))
        return (self.codes.double() - zeros) * scales


def round_to_nearest(weight: torch.Tensor, group: int, *, symmetric: bool, order: torch.Tensor | None) -> Rounded:
    """weight: [out, in]. ``order``: columns in the order in which they fill groups (desc_act); None: as they stand."""
    out, inside = weight.shape
    size = inside if group == -1 else group
    groups = torch.arange(inside) // size
    if order is not None:
        groups = torch.empty(inside, dtype=torch.int64).index_copy_(0, order, groups)
    count = int(groups.max()) + 1
    scales, zeros = torch.empty(count, out, dtype=torch.float16), torch.empty(count, out, dtype=torch.int64)
    codes = torch.empty(out, inside, dtype=torch.int64)
    for at in range(count):
        columns = (groups == at).nonzero().squeeze(1)
        part = weight[:, columns].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / 15).clamp(min=1e-6).half()
        zero = torch.full((out,), 8) if symmetric else (-low / scale.float()).round().clamp(0, 15).long()
        scales[at], zeros[at] = scale, zero
        codes[:, columns] = ((part / scale.float()[:, None]).round().long() + zero[:, None]).clamp(0, 15)
    return Rounded(codes=codes, zeros=zeros, scales=scales, groups=groups)


def words(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """[rows, columns] below 16 → int32 [rows, columns / 8]: number ``order[i]`` of each eight at bit 4 i."""
    eights = numbers.view(len(numbers), -1, 8)
    made = torch.zeros(eights.shape[:2], dtype=torch.int64)
    for place, number in enumerate(order):
        made |= eights[:, :, number] << (4 * place)
    return _signed(made)


def _signed(made: torch.Tensor) -> torch.Tensor:
    return torch.where(made >= 1 << 31, made - (1 << 32), made).to(torch.int32)


def gptq(found: Rounded, *, version: str = "gptq") -> dict[str, torch.Tensor]:
    """The parts of one linear. In the first format a zero is stored less one, the whole word counted down."""
    zeros = words(found.zeros).long()
    return {
        "qweight": words(found.codes).T.contiguous(),
        "qzeros": _signed((zeros - (0x11111111 if version == "gptq" else 0)) % (1 << 32)),
        "scales": found.scales.contiguous(),
        "g_idx": found.groups.to(torch.int32),
    }


def awq(found: Rounded) -> dict[str, torch.Tensor]:
    """The parts of one linear."""
    codes = words(found.codes.T.contiguous(), AWQ_ORDER)
    return {"qweight": codes, "qzeros": words(found.zeros, AWQ_ORDER), "scales": found.scales.contiguous()}


def pack_base(
    source: Path, out: Path, kind: str, *, group: int = 32, symmetric: bool = False, desc_act: bool = False,
    version: str = "gptq",
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Write the base in ``source`` to ``out``, packed; → each packed matrix in fp64 by its name."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("digests.json", "config.json"):
            shutil.copyfile(path, out / path.name)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = settings(kind, group, symmetric=symmetric, desc_act=desc_act, version=version)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    dense: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        for name, value in load_file(path).items():
            if not re.search(r"\.layers\.\d+\..*_proj\.weight$", name):
                made[name] = value
                continue
            chance = torch.Generator().manual_seed(len(dense))
            order = torch.randperm(value.shape[1], generator=chance) if desc_act else None
            found = round_to_nearest(value, group, symmetric=symmetric, order=order)
            dense[name] = found.dense()
            parts = gptq(found, version=version) if kind == "gptq" else awq(found)
            made |= {f"{name.removesuffix('.weight')}.{last}": part for last, part in parts.items()}
        save_file(made, out / path.name, {"format": "pt"})
    (out / "model.safetensors.index.json").unlink(missing_ok=True)
    return dense


def settings(kind: str, group: int, *, symmetric: bool, desc_act: bool, version: str) -> dict[str, Any]:
    """``quantization_config`` as the libraries write it."""
    if kind == "awq":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "desc_act": desc_act,
        "checkpoint_format": version, "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip
