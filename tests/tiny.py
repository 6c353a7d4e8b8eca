"""Policies over tiny bases, and samples and courses to train them on: shared by the tests of the training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune import base as bases
from finetune import model
from finetune import optimizer as optimizers
from finetune.dataset import Example
from finetune.loading import BaseForm
from finetune.loop import Course, StepDone, run
from finetune.model import Policy
from finetune.objectives import Batch, StepLoss, sft
from finetune.renderer import Renderer
from finetune.tokenizer import load_tokenizer

FIELDS: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def load(folder: Path, weights: str = "fp32", compute: str = "fp32", *, double: bool = True) -> Policy:
    """The bare base in that form."""
    return model.load_base(
        bases.inspect(folder), BaseForm(weights=weights, double=double, compute=compute, device="cpu")
    )


def adapt(policy: Policy, *, seed: int = 0, wake: bool = True, **fields: Any) -> Policy:
    """The base with an adapter. A fresh one starts at B = 0 and does nothing; ``wake`` gives B values."""
    adapted = model.attach(policy, FIELDS | fields, seed)
    if wake:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, value in adapted.trainable().items():
                if "lora_B" in name:
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return adapted


def exact(folder: Path) -> Policy:
    """The bare base wholly in fp64: the library's own norms drop to fp32 inside, so they are exchanged."""
    from transformers import AutoModelForCausalLM

    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    for name, module in list(causal_lm.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight, norm.variance_epsilon = module.weight, module.variance_epsilon
            causal_lm.set_submodule(name, norm)
    causal_lm.requires_grad_(False)
    causal_lm.config.use_cache = False
    tokenizer = load_tokenizer(folder)
    stop = bases.inspect(folder).stop_token
    return Policy(
        model=causal_lm, tokenizer=tokenizer, renderer=Renderer(tokenizer, stop), stop_token=stop, adapted=False
    )


def samples(lengths: Sequence[int], seed: int = 0, vocab: int = 250) -> list[Example]:
    """Random ids of these lengths; a random half or so of each sample is supervised, its last token always."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row, length in enumerate(lengths):
        ids = torch.randint(vocab, (length,), generator=generator).tolist()
        marks = (torch.rand(length, generator=generator) < 0.5).tolist()
        marks[0], marks[-1] = False, True
        made.append(Example(ids=tuple(ids), weights=tuple(map(float, marks)), where=f"rows.jsonl:{row + 1}"))
    return made


def course(steps: Sequence[Sequence[int]], **changes: Any) -> Course:
    plain: dict[str, Any] = {
        "peak_rate": 1e-3, "warmup": 0, "kind": "constant", "max_grad_norm": 1.0, "micro_batch_tokens": 64, "seed": 0
    }  # fmt: skip
    return Course(steps=tuple(map(tuple, steps)), **(plain | changes))


def adamw(policy: Policy, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return optimizers.make(policy.model, weight_decay=weight_decay)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps each step's gradients and changes nothing."""

    def __init__(self, policy: Policy) -> None:
        self.named = policy.trainable()
        super().__init__(self.named.values(), lr=0.0)
        self.gradients: list[dict[str, torch.Tensor]] = []

    def step(self, closure: Any = None) -> None:
        self.gradients.append({name: value.grad.clone() for name, value in self.named.items()})


@dataclass
class Watched:
    """The real objective; keeps what each micro-batch was: its rows and its summed loss."""

    rows: list[tuple[str, ...]] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        return sft.batches(examples, limit)

    def begin(self, policy: Policy, batches: list[Batch], each: Any = None) -> list[Batch]:
        return sft.begin(policy, batches)

    def loss(self, policy: Policy, batch: Batch) -> StepLoss:
        result = sft.loss(policy, batch)
        self.rows.append(batch.rows)
        self.totals.append(result.total.item())
        return result


def gradients(policy: Policy, examples: Sequence[Example], plan: Course) -> list[dict[str, torch.Tensor]]:
    """Each step's gradient as the loop makes it, unclipped where the course's max_grad_norm is infinite."""
    recorder = Recorder(policy)
    for _ in run(policy, sft, examples, plan, recorder):
        pass
    return recorder.gradients


def gradient_of(policy: Policy, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    """One backward pass over one packed batch."""
    result = sft.loss(policy, sft.collate(examples))
    (result.total / result.count).backward()
    found = {name: value.grad.clone() for name, value in policy.trainable().items()}
    policy.model.zero_grad(set_to_none=True)
    return found


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of ``two``, in fp64."""
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm())


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in policy.trainable().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def take(events: Iterator[StepDone], count: int) -> list[StepDone]:
    return [next(events) for _ in range(count)]
