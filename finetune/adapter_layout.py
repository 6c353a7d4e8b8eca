"""LoRA adapters between the original Qwen's module names and the native ones.

An adapter on the fused ``c_attn`` is exactly three adapters on q, k and v: A is copied, B is cut by rows. The way back
of three different ones needs a rank as large as theirs together: A stacked, B block-diagonal. (Where all three share
their A, as after the way there, the fused form has the old rank again.)
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from finetune import adapter_file, manifest
from finetune.adapter_file import CONFIG, FUSED, PREFIX, WEIGHTS, Adapter, Update
from finetune.errors import ModelError
from finetune.runfolder import json_bytes, write_synced
from finetune.terminal import Terminal, size

_LAYER = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.(.+)$")
_KINDS = {
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_TOP = {"transformer.wte": "model.embed_tokens", "lm_head": "lm_head"}
_SHORT = {"wte": "embed_tokens", "lm_head": "lm_head"}


def convert(source: Path, out: Path, layout: str, terminal: Terminal) -> None:
    """Write the adapter in ``source`` into the folder ``out`` under the other layout's names.

    Raises:
        ModelError: no LoRA, names of neither layout, or what fusing cannot express.
    """
    adapter, config = adapter_file.read(source)
    names = [*adapter.updates, *adapter.others]
    if all(_native(name) for name in names) == (layout == "native"):
        raise ModelError(f"this adapter is in the {layout} layout already", str(source), "there is nothing to convert")
    changed = to_native(adapter) if layout == "native" else to_original(adapter, source)
    tensors, settings = _tensors(changed), _config(changed, config, layout)
    data = save(tensors, {"format": "pt"})
    write_synced(out / WEIGHTS, data)
    write_synced(out / CONFIG, json_bytes(settings))
    manifest.write(out, manifest.digests(out))
    before = sum(value.nbytes for value in _tensors(adapter).values())
    ranks = sorted({update.rank for update in changed.updates.values()})
    terminal.say(f"ranks {', '.join(map(str, ranks))}; {size(before)} became {size(len(data))}")


def _native(name: str) -> bool:
    return name.startswith(("model.", "lm_head"))


def to_native(adapter: Adapter) -> Adapter:
    """Original module names → native ones, exactly and at the same rank."""
    found = Adapter(others={_renamed(name, _TOP): value for name, value in adapter.others.items()})
    for module, update in adapter.updates.items():
        match = _LAYER.match(module)
        if match is None:
            found.updates[_renamed(module, _TOP)] = update
            continue
        layer = f"model.layers.{match[1]}"
        if match[2] != FUSED:
            if match[2] not in _KINDS:
                raise ModelError(f"{module} is no module of the original Qwen", "adapter", "check its base")
            found.updates[f"{layer}.{_KINDS[match[2]]}"] = update
            continue
        thirds = update.b.chunk(3)
        lengths = update.lengths.chunk(3) if update.lengths is not None else (None,) * 3
        for part, b, length in zip(_PARTS, thirds, lengths, strict=True):
            found.updates[f"{layer}.{part}"] = Update(update.a, b.contiguous(), update.scale, length)
    return found


def to_original(adapter: Adapter, source: Path) -> Adapter:
    """Native module names → original ones; q, k and v of a layer become one update of the fused projection."""
    back = {native: original for original, native in _TOP.items()}
    kinds = {native: original for original, native in _KINDS.items()}
    found = Adapter(others={_renamed(name, back): value for name, value in adapter.others.items()})
    fused: dict[str, dict[str, Update]] = {}
    for module, update in adapter.updates.items():
        match = _LAYER.match(module)
        if match is None:
            found.updates[_renamed(module, back)] = update
        elif match[2] in _PARTS:
            fused.setdefault(f"transformer.h.{match[1]}.{FUSED}", {})[match[2]] = update
        elif match[2] in kinds:
            found.updates[f"transformer.h.{match[1]}.{kinds[match[2]]}"] = update
        else:
            raise ModelError(f"{module} is no linear of the native model", "adapter", "check its base")
    for module, parts in fused.items():
        found.updates[module] = _fuse(module, parts, source)
    return found


def _fuse(module: str, parts: dict[str, Update], source: Path) -> Update:
    """One update for the rows of q, k and v, those without one being zero."""
    rows = next(iter(parts.values())).b.shape[0]
    if any(update.b.shape[0] != rows for update in parts.values()):
        what = f"{module}: q, k and v differ in width, which the original Qwen's never do"
        raise ModelError(what, str(source), "this adapter belongs to another model")
    whole = len(parts) == len(_PARTS)
    with_lengths = [update.lengths is not None for update in parts.values()]
    if any(with_lengths) and not (whole and all(with_lengths)):
        raise ModelError(f"{module}: DoRA on a part of q, k and v cannot be fused", str(source), "train all three")
    first = next(iter(parts.values()))
    lengths = torch.cat([parts[name].lengths for name in _PARTS]) if all(with_lengths) else None  # type: ignore[misc]
    shared = whole and all(torch.equal(u.a, first.a) and u.scale == first.scale for u in parts.values())
    if shared:
        return Update(first.a, torch.cat([parts[name].b for name in _PARTS]), first.scale, lengths)
    a = torch.cat([parts[name].a for name in _PARTS if name in parts])
    b = torch.zeros(len(_PARTS) * rows, a.shape[0], dtype=first.b.dtype)
    column = 0
    for index, name in enumerate(_PARTS):
        if name in parts:
            update = parts[name]
            block = b[index * rows : (index + 1) * rows, column : column + update.rank]
            block.copy_(update.b * (update.scale / first.scale))
            column += update.rank
    return Update(a, b, first.scale, lengths)


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    raise ModelError(f"{name} is no module of the original Qwen", "adapter", "check its base")


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    found = {f"{PREFIX}{name}": value.contiguous() for name, value in adapter.others.items()}
    for module, update in adapter.updates.items():
        found[f"{PREFIX}{module}.lora_A.weight"] = update.a.clone()  # q, k and v must not share one memory on disk
        found[f"{PREFIX}{module}.lora_B.weight"] = update.b.contiguous()
        if update.lengths is not None:
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = update.lengths.contiguous()
    return found


def _config(adapter: Adapter, config: dict[str, Any], layout: str) -> dict[str, Any]:
    """PEFT's config for the new names. rsLoRA's factor is folded into alpha, module by module where they differ."""
    suffixes: dict[str, list[Update]] = {}
    for module, update in adapter.updates.items():
        match = _LAYER.match(module)
        suffixes.setdefault(match[2] if match else module, []).append(update)
    ranks, alphas = {}, {}
    base = next(iter(adapter.updates.values()), None)
    r = config["r"] if base is None else min(update.rank for update in adapter.updates.values())
    alpha = config["lora_alpha"] if base is None else _whole(base.scale * r)
    layers = {match[1] for module in adapter.updates if (match := _LAYER.match(module))}
    # Where not every layer has the same modules, each is named in full.
    named = any(_LAYER.match(str(name)) for name in _listed(config.get("target_modules")))
    uneven = (
        named
        or config.get("layers_to_transform") is not None
        or any(len(found) != len(layers) for suffix, found in suffixes.items() if suffix not in _TOP.values())
    )
    for module, update in adapter.updates.items():
        if update.rank != r:
            ranks[re.escape(module)] = update.rank
        if _whole(update.scale * update.rank) != alpha:
            alphas[re.escape(module)] = _whole(update.scale * update.rank)
    short = _SHORT if layout == "native" else {native: original for original, native in _SHORT.items()}
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = {short[name.rpartition(".")[2]]: ids for name, ids in indices.items()}
    whole = config.get("modules_to_save")
    return config | {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "target_modules": sorted(adapter.updates) if uneven else sorted(suffixes),
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "auto_mapping": None,
        "modules_to_save": [short.get(name, name) for name in whole] if whole else whole,
        "trainable_token_indices": indices,
    }


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: float) -> float:
    """An alpha that is a whole number, as one."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value
