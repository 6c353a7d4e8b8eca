"""Modules that are trained whole beside an adapter (PEFT's ``modules_to_save``), with fp32 masters.

PEFT gives LoRA's matrices fp32 masters and leaves these in the base's dtype, where small updates of a bf16 weight are
rounded away. Here they compute in fp32 and take and return the activations' dtype, as everything around them does.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper


def widen(model: torch.nn.Module, compute: torch.dtype) -> None:
    """Give every such module of a PEFT model fp32 masters (fp64 ones in fp64), in place. ``compute``: the dtype of the
    activations."""

    def narrow(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(compute)

    wide = torch.promote_types(compute, torch.float32)
    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for module in wrapper.modules_to_save.values():
            module.to(wide)
            module.register_forward_pre_hook(_wide_inputs)
            module.register_forward_hook(narrow)


def acting(module: torch.nn.Module) -> torch.nn.Module:
    """The module that answers where this one is called: itself, or of PEFT's wrapper the trained or the base's one."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    off = module.disable_adapters or not module.active_adapters
    found: torch.nn.Module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    return found


def _wide_inputs(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    wide = next(module.parameters()).dtype
    return tuple(value.to(wide) if value.is_floating_point() else value for value in inputs)
