"""The frozen base in shards: each process holds its part of every decoder layer, and all gather a layer when it is due.

By torch's ``fully_shard`` (FSDP2), which splits each parameter of a layer along its first dimension, gathers the layer
before its forward and its backward pass, and lets go of it afterwards. Embedding, head and final norm, the scales of
packed weights, and the adapter with its gradients and moments stay whole on every process, so that a step is the
same as with whole bases, bit for bit.

A layer is gathered by all processes at once: what one computes outside a step the others pass through with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from finetune import forms, loading
from finetune.base import Base
from finetune.errors import EnvironmentFault, ModelError
from finetune.forms import bitsandbytes
from finetune.kernels import decoder_layer
from finetune.loading import DTYPES, BaseForm, Source
from finetune.shards import Reader


def load(base: Base, form: BaseForm, world: int, progress: Callable[[int, int], None] | None = None) -> Any:
    """The frozen base as ``loading.load`` makes it, this process's part: never more than one layer of it is whole.

    Raises:
        ModelError: tensors missing, of another shape, or not finite.
        EnvironmentFault: the device's memory is too small, or the layers did not become shards.
    """
    mesh = init_device_mesh(torch.device(form.device).type, (world,))
    dtype = DTYPES[form.compute]
    with Reader(base) as reader:
        source = Source(reader, base, dtype, progress)
        model = _skeleton(base, form, dtype)
        layers = {f"model.layers.{number}.": layer for number, layer in enumerate(model.model.layers)}
        outside = [name for name in base.tensors if not name.startswith(tuple(layers))]
        try:
            _fill(model, outside, source, form)
            for prefix, layer in layers.items():
                _fill(model, [name for name in base.tensors if name.startswith(prefix)], source, form)
                bitsandbytes.freeze(layer)
                decoder_layer.fuse(layer)
                _shard(layer, mesh)
        except torch.OutOfMemoryError as error:
            what = f"out of memory while loading the base: {str(error).splitlines()[0]}"
            raise EnvironmentFault(what, str(base.folder), "see plan") from None
        source.refuse_faults()
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing:
        what = f"the base did not load whole: {len(missing)} tensors are missing, the first is {missing[0]}"
        raise ModelError(what, str(base.folder), "fetch it again")
    fully_shard(model.model, mesh=mesh, ignored_params=set(_outside(model)))  # the root, which orders the layers
    model.model.rotary_emb.to(form.device)
    model.requires_grad_(False)
    loading.settle(model, base)
    check(model, world)
    return model


def _skeleton(base: Base, form: BaseForm, dtype: torch.dtype) -> Any:
    """The model without a number in it, its linears of the kind that will hold them."""
    from accelerate import init_empty_weights
    from transformers.quantizers.auto import AutoHfQuantizer

    config, attention = loading.library_config(base), loading.attention(base)
    with init_empty_weights():
        model = loading.class_of(base, config)._from_config(config, attn_implementation=attention, dtype=dtype)
    model.eval()
    if forms.is_packed(form.weights):
        wanted = bitsandbytes.settings(form.weights, form.double, dtype)
        quantizer = AutoHfQuantizer.from_config(wanted, pre_quantized=False)
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": form.device})
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    return model


def _fill(model: Any, names: list[str], source: Source, form: BaseForm) -> None:
    """Read these tensors into their places, in the form that they are held in."""
    for name in names:
        owner, _, last = name.rpartition(".")
        try:
            place = model.get_submodule(owner)
            empty = getattr(place, last)
        except AttributeError:
            continue  # as from_pretrained: a tensor that the model has no place for
        value = source.read(name)
        full = (place.out_features, place.in_features) if last == "weight" and _packed(place) else empty.shape
        if tuple(value.shape) != tuple(full):
            what = f"{name} is {list(value.shape)} where the model needs {list(full)}"
            raise ModelError(what, str(source.folder), "fetch the base again")
        value = value.to(form.device, DTYPES[form.weights if form.weights in DTYPES else form.compute])
        if _packed(place) and last == "weight":
            setattr(place, last, bitsandbytes.pack(value, place))
        else:
            held = value.to(DTYPES[form.compute]).contiguous()
            setattr(place, last, torch.nn.Parameter(held, requires_grad=False))


def _packed(module: torch.nn.Module) -> bool:
    return isinstance(module, Linear4bit)


def _shard(layer: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Keep this process's part of a layer. What PEFT asks of a packed weight stays known of the part."""
    asked = {}
    for name, module in layer.named_modules():
        if _packed(module):
            asked[name] = {key: getattr(module.weight, key) for key in ("compress_statistics", "quant_type")}
    fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    for name, facts in asked.items():
        for key, value in facts.items():
            setattr(layer.get_submodule(name).weight, key, value)


def _outside(model: Any) -> list[torch.nn.Parameter]:
    inside = {id(value) for value in model.model.layers.parameters()}
    return [value for value in model.model.parameters() if id(value) not in inside]


def check(model: Any, world: int) -> None:
    """Every frozen parameter of a layer is in shards over ``world`` processes.

    Raises:
        EnvironmentFault: some are whole here, or shared with another number of processes.
    """
    for number, layer in enumerate(model.model.layers):
        for name, value in layer.named_parameters():
            part = isinstance(value, DTensor) and value.placements == (Shard(0),) and value.device_mesh.size() == world
            if not part or value.to_local().shape[0] > -(-value.shape[0] // world):
                what = f"layer {number} is not in shards over {world} processes: {name} is whole"
                raise EnvironmentFault(what, "train.shard", "set it to none, or report this with your torch version")


def held_bytes(model: Any) -> int:
    """Bytes of the layers' parameters that this process holds."""
    values = (value.to_local() for value in model.model.layers.parameters() if isinstance(value, DTensor))
    return sum(value.numel() * value.element_size() for value in values)


def is_sharded(model: Any) -> bool:
    return any(isinstance(value, DTensor) for value in model.parameters())


def announce(model: Any, begins: Callable[[], None], ends: Callable[[], None]) -> None:
    """From now on ``begins`` is called before every pass through the layers, before the first is due, and ``ends``
    after it."""
    model.model.register_forward_pre_hook(lambda module, inputs: begins(), prepend=True)
    model.model.register_forward_hook(lambda module, inputs, output: ends())


def pass_along(policy: Any) -> None:
    """Go through the layers once because another process does: with one token, and without keeping anything."""
    with policy.evaluating():
        policy.causal_lm.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device), use_cache=False)
