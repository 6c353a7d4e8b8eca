"""The loss by its definition: padded batch, attention mask, every logit, the layers of transformers and PEFT as they
come; nothing of `finetune` but the packed base, whose numbers all must share.

Two answers for every step: the loss at the very weights that `finetune` had before that step (``same_weights``), and
the loss of a course of its own from the same start (``losses``), where rounding may add up from step to step.

``same_weights_autocast`` is the yardstick for 16 bits: the same weights again, by the same modules under autocast, as
the trainers of transformers run them. PEFT then rounds the adapter's products elsewhere; how far its own two answers
lie apart is what rounding alone does to this model's loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence

from benchmarks.contestants.job import DTYPES, IGNORED, Job, Watch, device, refuse_repacked
from finetune.base import inspect
from finetune.loading import BaseForm
from finetune.model import attach, load_base

MORE = 32
"""Columns of padding that change nothing but where the processor rounds."""


def loss(model: Any, samples: list[dict[str, list[int]]], more: int = 0) -> torch.Tensor:
    """Mean over the supervised tokens of one step's samples, all in one padded batch, ``more`` columns too wide."""
    ids = pad_sequence([torch.tensor(sample["ids"]) for sample in samples], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(sample["labels"]) for sample in samples], batch_first=True, padding_value=IGNORED
    )
    mask = pad_sequence([torch.ones(len(sample["ids"]), dtype=torch.long) for sample in samples], batch_first=True)
    ids, mask = pad(ids, (0, more)), pad(mask, (0, more))
    labels = pad(labels, (0, more), value=IGNORED)
    logits = model(input_ids=ids.to(device()), attention_mask=mask.to(device()), use_cache=False).logits
    targets = labels[:, 1:].to(device())
    trained = targets != IGNORED
    # In fp64: torch's own softmax over a vocabulary of 49k is 5e-6 off in fp32, half of what is being asked.
    return cross_entropy(logits[:, :-1][trained].double(), targets[trained])


def main(job: Job) -> None:
    form = BaseForm(weights=job.weights, double=job.double, compute=job.compute, device=device())
    policy = attach(load_base(inspect(Path(job.base)), form), job.lora, job.seed, kernels=False)
    model = policy.model.train()
    if job.same_start:
        _refuse_other_start(job, model)
    parameters = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    watch, same_weights, under_autocast, wider = Watch(job.skip), [], [], []
    watch.start()
    for step, samples in enumerate(job.steps):
        plain, autocast, more = _losses_at_snapshot(job, model, step)
        same_weights.append(plain)
        wider.append(more)
        under_autocast.append(autocast)
        found = loss(model, samples)
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = job.rates[step]
        torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        watch.lap()
        watch.losses.append(found.item())
    refuse_repacked(model)
    watch.finish(job, same_weights=same_weights, same_weights_autocast=under_autocast, same_weights_wider=wider)


def _refuse_other_start(job: Job, model: Any) -> None:
    theirs, own = load_file(job.snapshot(0)), get_peft_model_state_dict(model, save_embedding_layers=False)
    if theirs.keys() != own.keys() or any(not torch.equal(theirs[name], own[name].cpu()) for name in own):
        raise RuntimeError("the adapter's start differs from that of finetune; losses cannot be compared")


def _losses_at_snapshot(job: Job, model: Any, step: int) -> tuple[float, float, float]:
    """In training mode throughout (no dropout is set), since an evaluation-mode forward would repack 4-bit weights."""
    own = {name: value.clone() for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    set_peft_model_state_dict(model, load_file(job.snapshot(step)))
    with torch.no_grad():
        plain = loss(model, job.steps[step]).item()
        wider = loss(model, job.steps[step], MORE).item()
        if job.compute == "fp32":
            autocast = plain
        else:
            with torch.autocast(device(), DTYPES[job.compute]):
                autocast = loss(model, job.steps[step]).item()
    set_peft_model_state_dict(model, own)
    return plain, autocast, wider


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
