"""A model as its run found it: the base alone, or with the adapter that the run began from. No base is held twice.

That is what "before" means in a run's scores, and the reference policy of the objectives that have one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch


@contextlib.contextmanager
def as_found(model: Any, start: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Inside, a PEFT model has the weights of ``start`` (by the parameters' names), or without them no adapter.

    The parameters change their storage and not their values, so that gradients and optimizers know nothing of it.
    """
    if start is None:
        with _switched_off(model):
            yield
        return
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].data for name in start}
    try:
        for name, value in start.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data = value


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    """PEFT's switch leaves all of an adapter trainable, LoRA-FA's frozen A too: put back."""
    frozen = [value for value in model.parameters() if not value.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for value in frozen:
            value.requires_grad_(False)
