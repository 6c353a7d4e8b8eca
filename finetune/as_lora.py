"""An adapter of any PEFT method as plain LoRA, which every consumer knows: the nearest update of a given rank.

What the adapter does to a weight is seen in the weight: merged by PEFT, less the base as it was trained against. The
truncated singular value decomposition of that is its nearest matrix of rank r (Eckart and Young 1936); how far off it
is, module by module, is measured on what is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from finetune import adapter_file, checkpoint, manifest, shards, trained, whole
from finetune.base import Base
from finetune.decoder import LINEARS
from finetune.errors import EnvironmentFault, ModelError
from finetune.runfolder import atomic_folder, clear_leftovers_of, json_bytes, read_json, write_synced
from finetune.terminal import Progress, Terminal
from finetune.trained import Trained

_PREFIX = "base_model.model."
_WHOLE = 1024
"""Up to this width a matrix is decomposed whole; beyond, by a randomised projection (Halko et al. 2011)."""
_SPARE, _ROUNDS = 16, 4
_ROUNDING = 1e-6
"""Of a weight's norm: less is what adding in fp32 leaves, and no update."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """B A, and its relative distance from the update that it stands for. a: [rank, in], b: [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    error: float
    norm: float


def convert(source: Path, out: Path, rank: int, terminal: Terminal, **bare: Any) -> dict[str, Any]:
    """Write the adapter of a run or a folder as LoRA into the new folder ``out``; → each module's relative error.

    Raises:
        ModelError: it is plain LoRA already, changes more than the weights of linears, or cannot be merged by PEFT.
        EnvironmentFault: something is in the way, or the model does not fit this machine's memory.
    """
    if out.exists() or out.is_symlink():
        raise EnvironmentFault("something is there already", str(out), "give another folder, or remove it")
    clear_leftovers_of(out)
    given = trained.of(source, terminal, **bare)
    method = _convertible(given)
    pairs = dict(_pairs(given, rank, terminal))
    if not pairs:
        raise ModelError("this adapter changes no weight", str(given.folder), "train it first")
    missed = math.hypot(*(pair.error * pair.norm for pair in pairs.values()))
    total = missed / math.hypot(*(pair.norm for pair in pairs.values()))
    errors = {name: float(f"{pair.error:.4g}") for name, pair in pairs.items()}
    found = {"method": method, "rank": rank, "relative_error": float(f"{total:.4g}"), "modules": errors}
    with atomic_folder(out) as temporary:
        _write(given, pairs, rank, temporary, found)
    for name, error in errors.items():
        terminal.say(f"{name:<44}{error:.2e}")
    terminal.say(f"{method} as LoRA of rank {rank}: {out}   off by {total:.2e} of the whole update's norm")
    return found


def _convertible(given: Trained) -> str:
    """The adapter's method. Raises ModelError where it is plain LoRA, or changes more than linears."""
    config = read_json(given.folder / adapter_file.CONFIG) or {}
    method, where = str(config.get("peft_type")).lower(), str(given.folder)
    if config.get("modules_to_save") or config.get("trainable_token_indices"):
        raise ModelError("modules or rows are trained whole beside it, which LoRA cannot hold", where, "merge it")
    if method == "lora" and not config.get("use_dora"):
        raise ModelError("this is LoRA already", where, "there is nothing to convert")
    return method


def _pairs(given: Trained, rank: int, terminal: Terminal) -> Iterator[tuple[str, Pair]]:
    """(module, its pair) of every linear that the adapter changes."""
    folding = whole.ground(given.base, given.form, replayed=given.is_quantised())
    state = whole.merged(given.base, given.folder, folding)
    show, names = Progress(terminal, "decomposing tensor"), list(given.base.tensors)
    with shards.Reader(given.base) as reader:
        for at, name in enumerate(names, 1):
            before = reader.tensor(name).to(torch.float32)
            update = state[name].float() - folding.whole(name, before.clone())
            norm = float(torch.linalg.vector_norm(update))
            if norm > _ROUNDING * float(torch.linalg.vector_norm(before)):
                _refuse_other(name, given.base, given.folder)
                yield name.removesuffix(".weight"), nearest(update, rank)
            show(at, len(names))


def _refuse_other(name: str, base: Base, folder: Path) -> None:
    """LoRA changes the weights of linears."""
    module, _, last = name.rpartition(".")
    kind = module.rpartition(".")[2]
    if last != "weight" or (kind not in LINEARS and (kind != "lm_head" or base.shape.tied)):
        what = f"it changes {name}, which is no weight of a linear: LoRA cannot hold that"
        raise ModelError(what, str(folder), "merge it instead: finetune merge")


def nearest(update: torch.Tensor, rank: int) -> Pair:
    """The nearest update of that rank. update: [out, in], fp32."""
    norm, least = float(torch.linalg.vector_norm(update)), min(update.shape)
    kept = min(rank, least)
    if least <= _WHOLE or kept + _SPARE >= least:
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of the projection: the same folder gives the same bytes
            u, s, v = torch.svd_lowrank(update, q=kept + _SPARE, niter=_ROUNDS)
        vh = v.T
    root = s[:kept].clamp(min=0).sqrt()
    b, a = u[:, :kept] * root, root[:, None] * vh[:kept]
    if kept < rank:  # one rank for all modules: the rest is zero
        b, a = (torch.nn.functional.pad(one, gap) for one, gap in ((b, (0, rank - kept)), (a, (0, 0, 0, rank - kept))))
    error = float(torch.linalg.vector_norm(update - b @ a)) / norm if norm else 0.0
    return Pair(a=a.contiguous(), b=b.contiguous(), error=error, norm=norm)


def _write(given: Trained, pairs: dict[str, Pair], rank: int, folder: Path, found: dict[str, Any]) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=given.name, r=rank, lora_alpha=rank,
        target_modules=_targets(list(pairs), given.base),
    ).to_dict()  # fmt: skip
    config["target_modules"] = sorted(config["target_modules"])
    weights: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        weights |= {f"{_PREFIX}{name}.lora_A.weight": pair.a, f"{_PREFIX}{name}.lora_B.weight": pair.b}
    form = {"weights": given.form.weights, "double": given.form.double, "compute": given.form.compute}
    made = {
        "base": given.name, "commit": given.commit, "base_sha256": dict(given.sha256), "rope": given.rope, "form": form,
        "converted": found | {"adapter_sha256": manifest.digest(given.folder / checkpoint.ADAPTER)},
    }  # fmt: skip
    write_synced(folder / checkpoint.PROVENANCE, json_bytes(made))
    write_synced(folder / checkpoint.ADAPTER, save(weights, {"format": "pt"}))
    write_synced(folder / checkpoint.CONFIG, json_bytes({key: getattr(v, "value", v) for key, v in config.items()}))
    manifest.write(folder, manifest.digests(folder))


def _targets(modules: list[str], base: Base) -> list[str]:
    """The last parts of the names, where they mean these very modules; else whole names."""
    kinds = {name.rpartition(".")[2] for name in modules}
    known = [name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight")]
    meant = {name for name in known if name.rpartition(".")[2] in kinds}
    return sorted(kinds if meant == set(modules) else modules)
