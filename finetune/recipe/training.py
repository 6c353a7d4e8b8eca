"""The section ``train:``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.recipe.section import Count, Positive, Section


class Train(Section):
    """How long, how fast, how much at a time."""

    steps: Positive | None = Field(default=None, description="optimizer steps; or use epochs")
    epochs: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = Field(
        default=None, description="passes over the training rows; or use steps"
    )
    examples_per_step: Annotated[int, Field(ge=1, le=1_000_000)] | None = Field(
        default=None, description="rows in one optimizer step, all devices together; or use tokens_per_step"
    )
    tokens_per_step: Annotated[int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None, description="tokens in one optimizer step, all devices together; or use examples_per_step"
    )
    learning_rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = Field(description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        default="cosine", description="shape of the learning rate after warmup"
    )
    warmup: Count = Field(default=0, description="steps over which the learning rate rises from 0 to its peak")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_fa", "riemannian"] = Field(
        default="adamw", description="what turns gradients into updates, see docs/training.md"
    )
    lora_plus_ratio: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="LoRA+: the learning rate of LoRA's B matrices times this; null means one rate"
    )
    weight_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.0, description="decoupled weight decay of the adapter"
    )
    max_grad_norm: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = Field(
        default=1.0, description="gradients are scaled down to this 2-norm"
    )
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = Field(description="longest example, in tokens")
    micro_batch_tokens: Annotated[int, Field(ge=8, le=100_000_000)] | Literal["auto"] = Field(
        default="auto", description="tokens that go through the model at once on one device; auto fits the memory"
    )
    recompute: Literal["auto", "none", "layers", "offload"] = Field(
        default="auto",
        description="layers computed again in the backward pass to save memory: as many as the plan needs, none, all, "
        "or all with their inputs kept in the machine's memory instead of the card's",
    )
    kernels: Literal["auto", "off"] = Field(
        default="auto", description="fast paths of the training step; off computes as transformers and PEFT do"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="torch.compile of the pointwise parts of a layer; auto: nowhere until measured"
    )
    shard: Literal["none", "fsdp"] = Field(
        default="none",
        description="what each of several processes holds of the base: all of it, or with fsdp its part of every layer",
    )
    save_every: Positive = Field(default=50, description="steps between checkpoints")
    keep_last: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=2, description="checkpoints kept; older ones are removed"
    )
    copy_to: str | None = Field(
        default=None,
        description="URL of a folder elsewhere (s3://…, gs://…, file:///…) to which each checkpoint is copied, and "
        "from which a run goes on where its own folder is empty",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="seed of data order, adapter start and dropout"
    )
    workers: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="processes that prepare rows; 0 means none extra"
    )
