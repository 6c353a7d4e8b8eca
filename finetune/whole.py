"""An adapter of any PEFT method, folded by PEFT itself: the whole model in memory, in fp32.

LoRA and its kin go through ``fold``, a block at a time. What the other methods do to a weight, PEFT alone knows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from finetune import budget, checkpoint, forms, hardware, loading, shards
from finetune.base import Base
from finetune.errors import EnvironmentFault, ModelError
from finetune.fold import Fold, Folding, dithered
from finetune.kernels import frozen_linear
from finetune.loading import BaseForm
from finetune.merge import quantised_names


def need(base: Base) -> int:
    """Bytes of memory that such a merge takes."""
    return int(budget.weight_bytes("fp32", False, "fp32", base.shape, "cpu") * 1.05 + 1e9)


def attach(model: Any, folder: Path) -> Any:
    """PEFT's model of an adapter folder on a base. Raises ModelError where PEFT refuses it."""
    from peft import PeftModel, get_peft_model_state_dict

    frozen_linear.show(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
            known = set(get_peft_model_state_dict(adapted))
        strange = sorted(set(checkpoint.read_adapter(folder).weights) - known)
        if strange:  # of these PEFT says nothing
            raise ValueError(f"{strange[0]} fits nothing")
        return adapted
    except Exception as error:  # noqa: BLE001 - each method has its own ways to refuse
        said = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"PEFT does not load this adapter: {said}"
        raise ModelError(what, str(folder), "name the base that it was trained on") from None


def apply(
    base: Base, form: BaseForm, folder: Path, out: Path, layout: str, progress: Callable[[int, int], None],
    *, replayed: bool,
) -> None:  # fmt: skip
    """Write the merged shards into the folder ``out``. Raises as ``merged``."""
    state = merged(base, folder, ground(base, form, replayed=replayed))

    def after(name: str, rows: shards.Rows) -> Any:
        dtype = shards.TORCH_DTYPES[base.tensors[name].dtype]  # what was not changed lies on its grid, and stays
        return [dithered(state[name].clone(), name) if dtype == torch.bfloat16 else state[name].to(dtype)]

    shards.rewrite(base, out, layout, after, progress)


def ground(base: Base, form: BaseForm, *, replayed: bool) -> Folding:
    """What the adapter is added to: the base as it was trained against, or as published."""
    names = quantised_names(base) if replayed and forms.is_packed(form.weights) else []
    return Folding(folds={name: Fold(replay=True) for name in names}, form=form, weights={})


def merged(base: Base, folder: Path, folding: Folding) -> dict[str, torch.Tensor]:
    """The merged model's tensors by name, fp32.

    Raises:
        EnvironmentFault: the model does not fit this machine's memory.
        ModelError: PEFT refuses the adapter, or cannot merge this method.
    """
    if need(base) > hardware.detect().free_memory * budget.USABLE:
        what = f"PEFT merges this method in {need(base) / 1e9:.0f} GB of memory, more than is free"
        raise EnvironmentFault(what, str(folder), "merge it on a larger machine")
    held = BaseForm(weights="fp32", double=False, compute="fp32", device="cpu")
    adapted = attach(loading.load(base, held, change=lambda name, value: folding.whole(name, value.float())), folder)
    try:
        state: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"PEFT cannot merge this method: {error}", str(folder), "serve it with PEFT") from None
    return state
