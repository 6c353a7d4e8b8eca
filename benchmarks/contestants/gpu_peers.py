"""TRL on a card, and the clock of all, over the base that the benchmark has made there. Used by benchmarks/gpu.py."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "trl": {}, "trl-padding-free": {"padding_free": True}, "trl-liger": {"use_liger_kernel": True},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """``rows`` with their ids and labels, ``at_once`` of them a step, after ``skip`` steps that are not timed."""

    rows: list[dict[str, list[int]]]
    at_once: int
    skip: int
    lora: dict[str, Any]


def steps(name: str, model: Any, work: Work) -> list[float]:
    """Seconds of each step but the skipped, through TRL's trainer and bitsandbytes' own layers."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

    from finetune.forms.bitsandbytes import FrozenLinear4bit
    from finetune.kernels import decoder_layer

    decoder_layer.fuse(model, None)
    for module in model.modules():
        if type(module) is FrozenLinear4bit:
            module.__class__ = Linear4bit
    timed: list[float] = []

    class Laps(TrainerCallback):  # type: ignore[misc]  # transformers gives no types here
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if len(timed) == work.skip:
                forget_peak()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            timed.append(synchronised() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model, train_dataset=Dataset.from_list(work.rows),
            args=SFTConfig(
                output_dir=folder, per_device_train_batch_size=work.at_once, max_steps=len(work.rows) // work.at_once,
                bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
                max_length=None, disable_tqdm=True, learning_rate=1e-4, **SETTINGS[name],
            ),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **work.lora), callbacks=[Laps()],
            processing_class=_tokenizer(),
        )  # fmt: skip
        try:
            trainer.train()
        finally:
            trainer.model.unload()
    return timed[work.skip :]


def _tokenizer() -> Any:
    """TRL wants one; the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({str(number): number for number in range(100)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="1", eos_token="2", unk_token="0")


def synchronised() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def forget_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
