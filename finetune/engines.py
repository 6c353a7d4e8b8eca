"""Settings of FSDP2 (accelerate) and DeepSpeed ZeRO-3 for the run of a plan, on so many cards: text, from numbers.

accelerate's file can launch this tool, which puts the base in shards itself (``train.shard: fsdp``) and takes nothing
else from it. Both are for trainers that work through these engines: which rows they pick, and how, is their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault, RecipeError
from finetune.plan import Plan
from finetune.prepare import Prepared
from finetune.recipe import Recipe
from finetune.runfolder import write_atomic

_LAYERS = {"qwen1": "Qwen2DecoderLayer"}
"""The first Qwen as it is trained and as ``finetune convert`` writes it; the others are named after their family."""
_HEAD = """\
# accelerate with FSDP 2 for {processes} processes, by `finetune plan` for {model}. Each value: docs/scale.md.
# Launches this tool where the recipe has `train.shard: fsdp`:
#   finetune train RECIPE --processes {processes} --launch accelerate --launch-config THIS_FILE
# It then parts the base itself by torch's fully_shard, and takes process count and FSDP version from here, no more.
# For a trainer of transformers' kind{quantised}.
"""
_QUANTISED = """, load the base with
#   BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{weights}", bnb_4bit_use_double_quant={double},
#                      bnb_4bit_compute_dtype=torch.{dtype}, bnb_4bit_quant_storage=torch.{dtype})
# The storage must be a float format: its wrapping takes no bytes"""
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def write(files: Mapping[str, Path], prepared: Prepared, processes: int) -> None:
    """Write what is asked for, ``fsdp`` or ``zero3``, where nothing is yet.

    Raises:
        EnvironmentFault: there is a file already.
        RecipeError: as ``zero3``.
    """
    made = {path: {"fsdp": fsdp, "zero3": zero3}[kind](prepared.recipe, prepared.plan, processes)
            for kind, path in files.items()}  # fmt: skip
    for path in made:
        if path.exists() or path.is_symlink():
            raise EnvironmentFault("is there already", str(path), "name another file")
    for path, text in made.items():
        write_atomic(path, text.encode())


def fsdp(recipe: Recipe, plan: Plan, processes: int) -> str:
    """accelerate's config file, YAML."""
    packed = plan.weights in ("nf4", "fp4")
    quantised = _QUANTISED.format(weights=plan.weights, double=plan.double, dtype=_DTYPES[plan.compute])
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": processes,
        "mixed_precision": "no" if plan.compute == "fp32" else plan.compute,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": layer(plan.family),
            "fsdp_offload_params": False,
            "fsdp_cpu_ram_efficient_loading": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_activation_checkpointing": plan.recompute != "none",
        },
    }
    head = _HEAD.format(processes=processes, model=plan.model, quantised=quantised if packed else "")
    return head + "\n".join(_yaml(values)) + "\n"


def zero3(recipe: Recipe, plan: Plan, processes: int) -> str:
    """DeepSpeed's config file, JSON.

    Raises:
        RecipeError: the step's rows do not divide among the processes.
    """
    rows = recipe.train.examples_per_step
    if rows is None or rows % processes:
        found = "tokens_per_step counts tokens" if rows is None else f"{rows} rows do not divide among {processes}"
        what = f"DeepSpeed counts whole rows for each process: {found}"
        raise RecipeError(what, "train.examples_per_step", f"give a multiple of {processes}")
    each = rows // processes
    room = max(1, plan.micro_batch_tokens // recipe.train.max_length)
    micro = max(count for count in range(1, min(room, each) + 1) if each % count == 0)
    values = {
        "train_batch_size": rows,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": each // micro,
        "gradient_clipping": recipe.train.max_grad_norm,
        "bf16": {"enabled": plan.compute == "bf16"},
        "fp16": {"enabled": plan.compute == "fp16"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
    }
    return json.dumps(values, indent=2) + "\n"


def layer(family: str) -> str:
    """transformers' class of a family's decoder layers."""
    return _LAYERS.get(family, f"{family.capitalize()}DecoderLayer")


def _yaml(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}")
    return lines
