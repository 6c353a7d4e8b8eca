"""Several LoRA adapters of one base as one: PEFT's weighted arithmetic, module by module, without the base.

It is asked (``add_weighted_adapter``) on layers that hold no weight, so that it needs the adapters' memory and no
model. Its words are taken as it means them, save one. PEFT's ``linear`` adds the factors, Σ √w A and Σ √w B, whose
product holds every run's B times every other run's A: for two random rank-4 pairs it is 0.47 of the norm away from the
weighted sum of the updates. Here ``linear`` is Σ w ΔW, exactly: PEFT's ``cat``, at the sum of the ranks.

ties, dare_* and magnitude_prune work on the factors too; their ``_svd`` forms work on ΔW, as the papers do (TIES: Yadav
et al. 2023, DARE: Yu et al. 2024), and cost an SVD of each whole matrix. Runs of unequal ranks have no other form.

Rank and scale of each module are settled before PEFT is asked: it passes rsLoRA on to a sum that holds the scales
already (2.8 times too large at rank 8), and forgets ``rank_pattern``.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune.adapter_file import PREFIX, Adapter, Update
from finetune.errors import Fault, ModelError, RecipeError
from finetune.recipe import words

EXACT = ("linear", "cat", "svd")
FACTORS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*EXACT, *(form for word in FACTORS for form in (word, f"{word}_svd")))
"""PEFT's words for ``combination_type``."""
ROWS = ".token_adapter.trainable_tokens_delta"
"""What PEFT calls the values of trained rows."""
Rows = tuple[tuple[int, ...], torch.Tensor]
"""Token ids, and their rows' values: fp32 [ids, hidden]."""
DENSITY = 0.5
"""The fraction of values that a pruning method keeps where none is given. 0.2, as in the TIES paper, lost more in most
merges of two tiny adapters of unlike tasks; 0.8 was better for one run and worse for the other."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to merge. ``density``: the fraction of values that ties, dare_* and magnitude_prune keep; ``seed``: of the
    masks that dare_* draws; ``rank``: of an svd form's result (the largest of the parts, where None)."""

    method: str = "linear"
    density: float | None = None
    seed: int = 0
    rank: int | None = None

    def check(self) -> None:
        """Raise RecipeError with every option that cannot be or would not be used."""
        faults = []
        if self.method not in METHODS:
            faults.append(Fault(f"no method {self.method!r}", "--method", words.did_you_mean(self.method, METHODS)))
        elif self.method in EXACT and self.density is not None:
            faults.append(Fault(f"{self.method} keeps every value", "--density", "leave it out"))
        if self.density is not None and not 0 < self.density <= 1:
            fix = "give the fraction of values to keep, above 0 and at most 1"
            faults.append(Fault(f"is {self.density}", "--density", fix))
        if self.rank is not None and self.rank < 1:
            faults.append(Fault(f"is {self.rank}", "--rank", "give 1 or more"))
        elif self.rank is not None and self.method in METHODS and not self.method.endswith("svd"):
            fix = f"use --method {'svd' if self.method in EXACT else f'{self.method}_svd'}, or leave it out"
            faults.append(Fault(f"{self.method} gives no choice of rank", "--rank", fix))
        if faults:
            raise RecipeError.of(faults)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """The merged update of each module, and the method that made it: an svd form where the ranks made one needed;
    ``rows``: of each matrix that had some trained, which and with what values."""

    updates: dict[str, Update]
    method: str
    rows: dict[str, Rows] = field(default_factory=dict)

    def peft(self, base: Iterable[str], name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """PEFT's config and weights. ``base``: the names of the base's tensors; ``name``: what the config calls it."""
        from peft import LoraConfig

        kinds = {module.rpartition(".")[2] for module in self.updates}
        alike = {tensor.removesuffix(".weight") for tensor in base if tensor.endswith(".weight")}
        alike = {module for module in alike if module.rpartition(".")[2] in kinds}
        ranks = {module: update.rank for module, update in self.updates.items()}
        usual = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        odd = {re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != usual}
        trained = {name.rpartition(".")[2]: list(ids) for name, (ids, _) in self.rows.items()}
        fields = LoraConfig(
            task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=name, r=usual, lora_alpha=usual,
            rank_pattern=odd, alpha_pattern=dict(odd),
            trainable_token_indices=trained or None,
        ).to_dict()  # fmt: skip
        targets = sorted(kinds) if alike == set(self.updates) else sorted(self.updates)
        config = {**fields, "peft_type": "LORA", "target_modules": targets}
        weights = {}
        for module, update in sorted(self.updates.items()):
            weights[f"{PREFIX}{module}.lora_A.weight"] = update.a.contiguous()
            weights[f"{PREFIX}{module}.lora_B.weight"] = update.b.contiguous()
        weights |= {f"{PREFIX}{name}{ROWS}": values for name, (_, values) in self.rows.items()}
        return dict(sorted(config.items())), weights


def weigh(
    adapters: Sequence[Adapter], shares: Sequence[float], options: Options, progress: Callable[[int, int], None]
) -> Weighed:
    """The merge alone, module by module; a run without a module has no update there, which counts as nothing.

    Raises:
        ModelError: a merged number is not finite.
    """
    method = _method(adapters, options)
    modules = sorted({module for adapter in adapters for module in adapter.updates})
    updates = {}
    for done, module in enumerate(modules, start=1):
        having = [(one.updates.get(module), share) for one, share in zip(adapters, shares, strict=True)]
        made = _merged(module, having, method, options)
        if not bool(torch.isfinite(made.a).all() and torch.isfinite(made.b).all()):
            raise ModelError("the merged update is not finite", module, "give smaller weights")
        updates[module] = made
        progress(done, len(modules))
    return Weighed(updates=updates, method=method)


def weigh_rows(
    adapters: Sequence[Adapter], configs: Sequence[dict[str, Any]], shares: Sequence[float],
    base: Callable[[str, Sequence[int]], torch.Tensor],
) -> dict[str, Rows]:  # fmt: skip
    """Trained rows of embedding and head, which PEFT's arithmetic leaves out: base + Σ w (row - base), each row over
    the runs that trained it. ``base`` reads rows of a matrix by its module's name."""
    found: dict[str, Rows] = {}
    for name in dict.fromkeys(key.removesuffix(ROWS) for one in adapters for key in one.others if key.endswith(ROWS)):
        having = [
            (next(ids for word, ids in config["trainable_token_indices"].items() if name.endswith(word)), one, share)
            for one, config, share in zip(adapters, configs, shares, strict=True)
            if f"{name}{ROWS}" in one.others
        ]
        wanted = sorted({token for ids, _, _ in having for token in ids})
        before = base(name, wanted).float()
        after = before.clone()
        for ids, one, share in having:
            at = torch.tensor([wanted.index(token) for token in ids])
            after[at] += share * (one.others[f"{name}{ROWS}"].float() - before[at])
        found[name] = (tuple(wanted), after)
    return found


def _method(adapters: Sequence[Adapter], options: Options) -> str:
    """The word that can be done: factors of unequal ranks cannot be added, updates can."""
    ranks: dict[str, set[int]] = {}
    for adapter in adapters:
        for module, update in adapter.updates.items():
            ranks.setdefault(module, set()).add(update.rank)
    unequal = any(len(found) > 1 for found in ranks.values())
    return f"{options.method}_svd" if unequal and options.method in FACTORS else options.method


def _merged(module: str, having: list[tuple[Update | None, float]], method: str, options: Options) -> Update:
    owners = [(update, share) for update, share in having if update is not None]
    if method in EXACT:
        whole = _by_peft(owners, "cat", None, {})
        rank = options.rank or max(update.rank for update, _ in owners)
        return _cut(whole, rank) if method == "svd" else whole
    first = owners[0][0]
    rank = max(update.rank for update, _ in owners)
    nothing = Update(torch.zeros(rank, first.a.shape[1]), torch.zeros(first.b.shape[0], rank), 1.0)
    more: dict[str, Any] = {"density": density(options)}
    if method.endswith("svd"):
        # Full matrices would be as large as the square of the wider side, for columns that nobody reads.
        more |= {"svd_rank": options.rank or rank, "svd_full_matrices": False}
    seed = int.from_bytes(hashlib.sha256(f"{options.seed} {module}".encode()).digest()[:7], "big")
    return _by_peft([(update or nothing, share) for update, share in having], method, seed, more)


def _by_peft(parts: list[tuple[Update, float]], method: str, seed: int | None, more: dict[str, Any]) -> Update:
    """One module's merge by PEFT. Draws hang on ``seed`` alone, and none is taken from the process's own generator."""
    from peft import LoraConfig, get_peft_model

    names = [f"part{index}" for index in range(len(parts))]
    out, inside = parts[0][0].b.shape[0], parts[0][0].a.shape[1]
    hollow = torch.nn.Linear(inside, out, bias=False, device="meta")
    # One zero seen as a whole matrix: PEFT puts adapters on their base's device, and "meta" would lose the numbers.
    hollow.weight = torch.nn.Parameter(torch.zeros(()).expand(out, inside), requires_grad=False)
    holder: Any = torch.nn.ModuleDict({"layer": hollow})
    with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1")  # keeping all is a choice
        for index, (name, (update, _)) in enumerate(zip(names, parts, strict=True)):
            config = LoraConfig(r=update.rank, lora_alpha=update.scale * update.rank, target_modules=["layer"])
            if index == 0:
                wrapped = get_peft_model(holder, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            holder["layer"].lora_A[name].weight.copy_(update.a)
            holder["layer"].lora_B[name].weight.copy_(update.b)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        wrapped.add_weighted_adapter(names, [share for _, share in parts], "sum", method, **more)
        layer = holder["layer"]
        return Update(layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight * layer.scaling["sum"], 1.0)


def _cut(update: Update, rank: int) -> Update:
    """The nearest update of that rank (Eckart and Young 1936), what PEFT's ``svd`` gives, from the factors alone.

    With B = Q R and Aᵀ = P S, the singular values of B A are those of the small R Sᵀ: no SVD of an [out, in] matrix,
    which takes a minute at Qwen-14B's width.
    """
    q, r = torch.linalg.qr(update.b.double() * update.scale)
    p, s = torch.linalg.qr(update.a.double().T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    return Update((v[:rank] @ p.T).float(), (q @ (u[:, :rank] * values[:rank])).float(), 1.0)


def density(options: Options) -> float:
    """The fraction of values that is kept."""
    return DENSITY if options.density is None else options.density
