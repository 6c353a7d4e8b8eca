"""`finetune`: its own plan, model, packing and loop, put together as `finetune train` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.contestants import reference
from benchmarks.contestants.job import IGNORED, Job, Watch
from finetune import loop, model, prepare
from finetune import optimizer as optimizers
from finetune.dataset import Example
from finetune.kernels import cross_entropy, decoder_layer, lora_linear, varlen_attention
from finetune.loop import Course
from finetune.model import Policy
from finetune.objectives import sft
from finetune.run import Run
from finetune.terminal import Terminal


def main(job: Job) -> None:
    watch, padded = Watch(job.skip, job.turns), list[float]()
    overrides = [f"quantize.weights={job.weights}", f"quantize.compute={job.compute}"]
    prepared = prepare.prepare(Path(job.recipe), overrides)
    run = Run(prepared, Terminal(quiet=True))
    course = run.course()
    _check_same_work(job, course, prepared.samples)
    policy = model.load_base(run.base, run.form())
    policy = model.attach(policy, prepared.plan.adapter_fields, course.seed)
    recompute, count = run.identity.resolved["recompute"], run.identity.resolved["recomputed_layers"]
    if recompute != "none":
        policy.recompute_layers(count, offload=recompute == "offload")
    for lever in job.levers:
        course = switch_off(lever, policy, course)
    optimizer = optimizers.make(
        policy.model, "adamw", weight_decay=prepared.recipe.train.weight_decay, lora_plus_ratio=None
    )
    events = loop.run(policy, sft, prepared.samples, course, optimizer)
    watch.start()
    for step in range(len(job.steps)):
        if job.snapshots:
            save_file(model.adapter_weights(policy.model), job.snapshot(step))
            with torch.no_grad():
                padded.append(reference.loss(policy.model, job.steps[step]).item())
        event = next(events)
        watch.lap()
        watch.losses.append(event.loss)
    watch.finish(job, recompute=recompute, micro_batch_tokens=course.micro_batch_tokens, padded=padded)


def switch_off(lever: str, policy: Policy, course: Course) -> Course:
    """Take one part of the step away, in this process alone."""
    if lever == "attention":
        varlen_attention.attend = varlen_attention.composed  # type: ignore[assignment]
    elif lever == "head":
        cross_entropy.summed = cross_entropy.plain
    elif lever == "recompute":
        policy.recompute_layers()
    elif lever in ("layer", "lora"):
        decoder_layer.fuse(policy.model, None)
    else:
        return replace(course, micro_batch_tokens=1)  # a sample longer than the limit has a batch of its own
    if lever == "lora":
        own = {fused: plain for plain, fused in lora_linear._FUSED.items()}
        for module in policy.model.modules():
            module.__class__ = own.get(type(module), type(module))
    return course


def _check_same_work(job: Job, course: Course, examples: Sequence[Example]) -> None:
    for step, (indices, samples) in enumerate(zip(course.steps, job.steps, strict=False)):
        own = [list(examples[index].ids) for index in indices]
        masks = [list(examples[index].supervised) for index in indices]
        if own != [sample["ids"] for sample in samples] or masks != [
            [label != IGNORED for label in sample["labels"]] for sample in samples
        ]:
            raise RuntimeError(f"step {step} has other samples here than the peers were given")


if __name__ == "__main__":
    main(Job.read(sys.argv[1]))
