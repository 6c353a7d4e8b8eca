"""PEFT's methods by name: the config that a recipe's fields make, and what such an adapter adds to a model.

What it adds is counted by PEFT itself, on a stand-in of the model that has its names and shapes and no numbers: no
formula of ours per method could drift, and what PEFT refuses of these fields is a fault of the recipe before anything
is loaded.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune.decoder import DecoderShape
from finetune.kernels import frozen_linear

_OWN = {"frod": {"progressbar": False}}
"""Fields that are ours to set: what a method prints."""


_LOOKING = ("mica", "orthogonal")
"""LoRA's beginnings that ask the base's weight for its numbers or their format."""


@dataclass(frozen=True, kw_only=True)
class Added:
    """What an adapter adds: its ``modules``; tensors that are ``trained`` as (module or "", elements) → how many; and
    values that it keeps beside them without training them, such as projections. ``said``: what PEFT remarked, as where
    it took another rank than the one asked for."""

    modules: tuple[str, ...]
    trained: Mapping[tuple[str, int], int]
    kept: int
    said: tuple[str, ...] = ()


def config(method: str, fields: Mapping[str, Any], *, scored: bool = False) -> Any:
    """PEFT's config; with ``scored`` of a model with a score head, which PEFT then trains whole beside the adapter.

    Raises ValueError, TypeError or ImportError as PEFT does.
    """
    from peft import get_peft_config

    if scored:  # a list of its own, which PEFT adds its names of heads to
        fields = {**fields, "task_type": "SEQ_CLS", "modules_to_save": [*(fields.get("modules_to_save") or ())]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that have no effect together
        made = {"peft_type": method.upper(), "task_type": "CAUSAL_LM", **fields, **_OWN.get(method, {})}
        return get_peft_config(made)


def stored(settings: Any) -> dict[str, Any]:
    """What ``adapter_config.json`` has of PEFT's config, with sets sorted so that equal runs write equal bytes."""
    found = settings.to_dict()
    if found["task_type"] == "SEQ_CLS":  # PEFT adds all names of heads that it knows, and each time anew
        found["modules_to_save"] = [one for one in dict.fromkeys(found["modules_to_save"]) if one != "classifier"]
    return {key: _plain(value) for key, value in sorted(found.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)


def put_on(model: Any, settings: Any) -> Any:
    """PEFT's model with a fresh adapter. Raises as PEFT does."""
    from peft import get_peft_model

    if settings.peft_type == "LORA" and settings.init_lora_weights not in _LOOKING:
        return get_peft_model(model, settings)
    frozen_linear.show(model)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # what PEFT says of layers that it was not made for; they are tried
        return get_peft_model(model, settings)


def added(method: str, fields: Mapping[str, Any], shape: DecoderShape) -> Added | None:
    """What the adapter adds to a model of that shape; None where PEFT must see the weights to know.

    Raises:
        ValueError: what PEFT says of fields that do not fit the model.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    try:
        settings = config(method, fields)
        base = _stand_in(shape)
        before = {id(value) for value in [*base.parameters(), *base.buffers()]}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type](base, settings, "default", low_cpu_mem_usage=True)
    except NotImplementedError:  # what torch raises where a number is asked for that is not there
        return None
    except Exception as error:  # noqa: BLE001 - each method has its own ways to refuse
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None
    said = dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, UserWarning))
    modules = tuple(tuner.targeted_module_names)
    trained: Counter[tuple[str, int]] = Counter()
    kept = 0
    for name, value in [*tuner.named_parameters(), *tuner.named_buffers()]:
        if value.requires_grad:
            trained[next((one for one in modules if f".{one}." in f".{name}"), ""), value.numel()] += 1
        elif id(value) not in before:
            kept += value.numel()
    told = tuple(one for one in said if not one.startswith("Unsupported layer type"))  # our stand-in's, not the model's
    return Added(modules=modules, trained=trained, kept=kept, said=told)


class _Norm(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)


class _Config(dict[str, Any]):
    """What PEFT asks a model for."""

    model_type = "qwen2"  # whose names all supported families share

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type}


def _stand_in(shape: DecoderShape) -> torch.nn.Module:
    """A tree of modules with the model's names, and matrices that hold nothing."""
    tensors, root = shape.tensors(), torch.nn.Module()
    root.config = _Config()  # type: ignore[assignment]
    for name, size in tensors.items():
        owner, _, last = name.rpartition(".")
        if last != "weight":
            continue
        if len(size) == 1:
            leaf: torch.nn.Module = _Norm(size[0])
        elif owner.endswith("embed_tokens"):
            leaf = torch.nn.Embedding(size[0], size[1], device="meta")
        else:
            leaf = torch.nn.Linear(size[1], size[0], bias=f"{owner}.bias" in tensors, device="meta")
        node = root
        *parents, own = owner.split(".")
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = node.get_submodule(part)
        node.add_module(own, leaf)
    return root.requires_grad_(False)
