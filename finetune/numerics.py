"""Does this machine compute what was promised? A tiny random model, made on the spot, trained in ways that must agree.

In fp32 two ways are compared directly: loss and gradient of the same steps. In bf16 two right ways already lie further
apart than that (decision 0005): there each is held against fp32 at the same weights, and may not be further from it,
on average over the steps, than one and a half times as far as transformers and PEFT over padded rows are, plus 1e-3.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as tensors_to

from finetune import base as bases
from finetune import certify, checkpoint, hardware, loop, model, proof, tiny_base, trained
from finetune import optimizer as optimizers
from finetune.base import Base
from finetune.checkpoint import Checkpoint
from finetune.dataset import Example
from finetune.errors import FinetuneError
from finetune.loading import BaseForm
from finetune.loop import Course
from finetune.model import Policy
from finetune.objectives import sft
from finetune.runfolder import json_bytes, read_json
from finetune.terminal import Progress, Terminal

FP32, BF16 = 1e-5, 1e-3
"""The bounds of README's first promises and of decision 0005."""
_FIELDS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
_LENGTHS = (3, 40, 7, 22, 2, 31, 15, 9, 57, 12, 12, 5, 64, 28, 4, 19, 33, 6, 11, 47, 8, 25, 2, 70)
_REPEATS = 12
"""In bf16 one step says little: two right ways differ by 2e-3 either way over 3 steps (10 draws of the rows)."""
_MORE = 1.5
_WHOLE, _ALONE = 10_000, 1
"""Tokens of a micro-batch: all rows of a step at once, or each alone."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that must change nothing: how far apart two ways of it are here, and how far they may be."""

    name: str
    form: str
    what: str
    measured: float
    bound: float
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.measured <= self.bound  # also not where either is NaN

    def __str__(self) -> str:
        state, why = ("ok", "") if self.holds else ("fault", f"; {self.why or 'report it with this line'}")
        found = f"{self.measured:.1e} (at most {self.bound:.1e})"
        return f"{state:<7}{self.name:<14}{self.form:<11}{self.what}: {found}{why}"

    def to_dict(self) -> dict[str, Any]:
        measured = self.measured if math.isfinite(self.measured) else None  # JSON has no infinity
        return asdict(self) | {"measured": measured, "holds": self.holds}


class Steps(NamedTuple):
    """Loss of each step, and the gradients of all of them as one vector, in fp64 on the CPU."""

    losses: torch.Tensor
    gradient: torch.Tensor


def prove(terminal: Terminal) -> list[Check]:
    """Every check in every form that this machine trains in. Takes well under two minutes; nothing is left behind."""
    machine = hardware.detect()
    forms = [("fp32", "fp32"), ("nf4", "fp32"), *([("nf4", "bf16")] if machine.bf16 else [])]
    forms += [("bf16", "bf16")] if machine.device == "cuda" and machine.bf16 else []
    found: list[Check] = []
    show = Progress(terminal, "proving")
    with tempfile.TemporaryDirectory(prefix="finetune-numerics-") as scratch:
        base = bases.inspect(tiny_base.build(Path(scratch) / "base"))
        for number, (weights, compute) in enumerate(forms):
            form = BaseForm(weights=weights, double=True, compute=compute, device=machine.device)
            place = Path(scratch) / f"{weights}-{compute}"
            show(number, len(forms), f"{weights}, products in {compute}")
            found += ways(base, form)
            found += [resumed(base, form, place), merged(base, form, place)]
        show(len(forms), len(forms))
    return found


def ways(base: Base, form: BaseForm) -> list[Check]:
    """Accumulation, packing and kernels: the same steps, computed in other ways."""
    rows = samples(_LENGTHS if form.compute == "fp32" else _LENGTHS * _REPEATS)
    on, off = _adapted(base, form), _adapted(base, form, kernels=False)
    split, whole, plain, padded = (
        _by_the_loop(on, rows, _ALONE), _by_the_loop(on, rows, _WHOLE), _by_the_loop(off, rows, _WHOLE),
        _by_the_library(off, rows),
    )  # fmt: skip
    if form.compute == "fp32":
        pairs = {
            "accumulation": (split, whole, "8 micro-batches against 1"),
            "packing": (plain, padded, "packed rows against padded ones"),
            "kernels": (whole, plain, "fast paths against transformers and PEFT"),
        }
        return [
            Check(name=name, form=_called(form), what=what, measured=_apart(one, two), bound=FP32)
            for name, (one, two, what) in pairs.items()
        ]
    truth = _by_the_library(_adapted(base, replace(form, compute="fp32"), kernels=False), rows)
    bound = _MORE * _off(padded, truth) + BF16
    singles = {
        "accumulation": (split, "8 micro-batches, from fp32"),
        "packing": (plain, "packed rows, from fp32"),
        "kernels": (whole, "fast paths, from fp32"),
    }
    return [
        Check(name=name, form=_called(form), what=what, measured=_off(one, truth), bound=bound)
        for name, (one, what) in singles.items()
    ]


def resumed(base: Base, form: BaseForm, folder: Path) -> Check:
    """Three steps, a checkpoint on the disk, a fresh model, three more: the very weights of six unbroken ones."""
    what = "stopped, saved, loaded and gone on, against unbroken; the weights"
    try:
        unbroken, first = _trained(base, form), _trained(base, form, until=3)
        state = Checkpoint(
            step=3, weights=model.adapter_weights(first.policy.model), config=_config(base, first.policy),
            moments=checkpoint.optimizer_tensors(first.optimizer, first.policy.trainable()),
        )  # fmt: skip
        checkpoint.write(folder / "checkpoints", state)
        again = _trained(base, form, saved=checkpoint.newest(folder / "checkpoints", lambda text: None))
        # A card may add in another order each time; then two unbroken runs say how far that goes.
        bound = 0.0 if form.device == "cpu" else 4 * _most(unbroken.policy, _trained(base, form).policy)
        measured, why = _most(unbroken.policy, again.policy), ""
    except FinetuneError as error:
        measured, bound, why = math.inf, 0.0, str(error)
    return Check(name="resume", form=_called(form), what=what, measured=measured, bound=bound, why=why)


def merged(base: Base, form: BaseForm, folder: Path) -> Check:
    """Train, write the adapter, fold it, load the folder: mean KL to the live model."""
    bound, why, out = proof.MEAN_KL["replayed"], "", folder / "merged"
    try:
        policy = _trained(base, form).policy
        config = json.dumps(_config(base, policy)).encode()
        kept = {key: value for key, value in asdict(form).items() if key != "device"}
        made = {"base": str(base.folder), "base_sha256": base.digests(), "form": kept}
        weights = tensors_to(model.adapter_weights(policy.model), {"format": "pt"})
        files = {checkpoint.PROVENANCE: json_bytes(made), checkpoint.ADAPTER: weights, checkpoint.CONFIG: config}
        checkpoint.write_folder(folder / "adapter", files)
        quiet = Terminal(out=io.StringIO(), quiet=True)
        certify.merge(trained.of_adapter(folder / "adapter", quiet), out, certify.Asked(base="replayed"), quiet)
    except FinetuneError as error:
        why = str(error)
    note = read_json(out / certify.PROVENANCE)
    measured = abs(note["proof"]["mean_kl"]) if note else math.inf
    what = "adapter folded and loaded from the disk, against the live one; mean KL"
    return Check(name="merge", form=_called(form), what=what, measured=measured, bound=bound, why=why)


class _Trained(NamedTuple):
    policy: Policy
    optimizer: torch.optim.Optimizer


def _trained(base: Base, form: BaseForm, until: int = 6, saved: Checkpoint | None = None) -> _Trained:
    """A fresh model on the course of six steps, with dropout; from a checkpoint where one is given."""
    policy = _adapted(base, form, lora_dropout=0.1)
    made = optimizers.make(policy.model)
    if saved is not None:
        model.load_adapter(policy.model, saved.weights, base.folder)
        checkpoint.restore_optimizer(made, policy.trainable(), saved.moments)
    events = loop.run(
        policy, sft, samples(_LENGTHS), _course(_steps(_LENGTHS) * 2, 50), made, start=saved.step if saved else 0
    )  # fmt: skip
    for event in events:
        if event.step == until:
            break
    return _Trained(policy, made)


def samples(lengths: Sequence[int]) -> list[Example]:
    """Random ids of these lengths; about half of each sample is supervised, its last token always."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for row, length in enumerate(lengths, 1):
        ids = torch.randint(250, (length,), generator=generator).tolist()
        marks = (torch.rand(length, generator=generator) < 0.5).tolist()
        marks[0], marks[-1] = False, True
        made.append(Example(ids=tuple(ids), weights=tuple(map(float, marks)), where=f"sample {row}"))
    return made


def _adapted(base: Base, form: BaseForm, *, kernels: bool = True, **fields: Any) -> Policy:
    """The base with an adapter that does something: a fresh one starts at B = 0, where half of its arithmetic is 0."""
    policy = model.attach(model.load_base(base, form), _FIELDS | fields, 0, kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in policy.trainable().items():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return policy


def _steps(rows: Sequence[Any]) -> tuple[tuple[int, ...], ...]:
    """Eight rows a step."""
    return tuple(tuple(range(start, start + 8)) for start in range(0, len(rows), 8))


def _course(steps: tuple[tuple[int, ...], ...], tokens: int) -> Course:
    plain: dict[str, Any] = {"peak_rate": 5e-3, "warmup": 0, "kind": "constant", "max_grad_norm": math.inf, "seed": 0}
    return Course(steps=steps, micro_batch_tokens=tokens, **plain)


class _Keeper(torch.optim.SGD):
    """Keeps each step's gradient and moves nothing."""

    def __init__(self, policy: Policy) -> None:
        self.named = policy.trainable()
        super().__init__(self.named.values(), lr=0.0)
        self.kept: list[torch.Tensor] = []

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.kept.append(_flat({name: value.grad for name, value in self.named.items()}))


def _by_the_loop(policy: Policy, rows: Sequence[Example], tokens: int) -> Steps:
    keeper = _Keeper(policy)
    losses = [event.loss for event in loop.run(policy, sft, rows, _course(_steps(rows), tokens), keeper)]
    return Steps(torch.tensor(losses, dtype=torch.float64), torch.cat(keeper.kept))


def _by_the_library(policy: Policy, rows: Sequence[Example]) -> Steps:
    """The same by transformers alone: rows padded to one width, attention mask, labels, mean over labels."""
    policy.model.train()
    losses, gradients = [], []
    for chosen in _steps(rows):
        width = max(len(rows[index].ids) for index in chosen) + 8
        ids, mask, labels = (torch.full((len(chosen), width), fill) for fill in (0, 0, -100))
        for at, index in enumerate(chosen):
            own, size = torch.tensor(rows[index].ids), len(rows[index].ids)
            ids[at, :size], mask[at, :size] = own, 1
            labels[at, :size] = torch.where(torch.tensor(rows[index].supervised), own, -100)
        ids, mask, labels = (one.to(policy.device) for one in (ids, mask, labels))
        loss = policy.causal_lm(
            ids, attention_mask=mask, labels=labels, num_items_in_batch=int((labels != -100).sum()), use_cache=False
        ).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(_flat({name: value.grad for name, value in policy.trainable().items()}))
        policy.model.zero_grad(set_to_none=True)
    return Steps(torch.tensor(losses, dtype=torch.float64), torch.cat(gradients))


def _flat(tensors: dict[str, Any]) -> torch.Tensor:
    return torch.cat([tensors[name].detach().double().cpu().reshape(-1) for name in sorted(tensors)])


def _apart(one: Steps, two: Steps) -> float:
    """The larger of the losses' difference and of the gradients', the latter relative to its norm."""
    gradient = float((one.gradient - two.gradient).norm() / two.gradient.norm())
    return max(float((one.losses - two.losses).abs().max()), gradient)


def _off(one: Steps, truth: Steps) -> float:
    return float((one.losses - truth.losses).abs().mean())


def _most(one: Policy, two: Policy) -> float:
    """The largest difference of any trained weight."""
    return float((_flat(dict(one.trainable())) - _flat(dict(two.trainable()))).abs().max())


def _config(base: Base, policy: Policy) -> dict[str, Any]:
    return model.adapter_config(policy.model, str(base.folder))


def _called(form: BaseForm) -> str:
    return form.weights if form.weights == form.compute else f"{form.weights}/{form.compute}"
