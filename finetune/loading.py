"""The frozen base in the form that it is trained against, read tensor by tensor from either layout.

``from_pretrained`` takes a state dict whose values it materialises one by one (its own loading puts slices of open
files there); quantising and moving to the device follow at once, so that memory never holds a second model.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune import forms, hardware, layouts
from finetune.base import Base
from finetune.errors import EnvironmentFault, Fault, ModelError
from finetune.kernels import logn
from finetune.kernels.frozen_linear import PackedLinear
from finetune.shards import Reader

_PIECE = 1 << 22
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class BaseForm:
    """How the frozen base is held. ``weights``: a word of ``forms``, or bf16, fp16, fp32; ``compute``: one of those."""

    weights: str
    double: bool
    compute: str
    device: str


Change = Callable[[str, torch.Tensor], torch.Tensor]
"""A tensor's name and value → the value to take in its place."""


class Source:
    """The tensors of a base, lazily. Faults met while reading are kept: the loader above wraps what it catches."""

    def __init__(
        self, reader: Reader, base: Base, dtype: torch.dtype, progress: Callable[[int, int], None] | None = None,
        change: Change | None = None,
    ) -> None:  # fmt: skip
        self._reader, self._base, self._dtype, self._progress, self._change = reader, base, dtype, progress, change
        self.folder = base.folder
        self._total, self._done = sum(tensor.bytes for tensor in base.tensors.values()), 0
        self._faults: list[Fault] = []
        self._lock = threading.Lock()  # the loader reads from several threads

    def tensors(self) -> dict[str, Any]:
        return {name: _Lazy(self, name, tensor.dtype, tensor.shape) for name, tensor in self._base.tensors.items()}

    def parameter(self, name: str, device: str) -> torch.nn.Parameter:
        """One tensor on its device, frozen."""
        return torch.nn.Parameter(self.read(name).to(device, self._dtype), requires_grad=False)

    def held(self, name: str, form: BaseForm) -> Any:
        """One matrix as ``frozen_linear.PackedLinear`` holds it."""
        if form.weights in forms.MADE:
            return forms.made(form.weights).pack(self.read(name).to(form.device, self._dtype))
        held = self._reader.packed(name).to(form.device)
        self._tell(self._base.tensors[name].bytes)
        return held

    def read(self, name: str) -> torch.Tensor:
        """One tensor; one that is not finite in the dtype that it will have would train on without a word."""
        place = self._base.tensors[name]
        try:
            with self._lock:
                value = self._reader.tensor(name)
        except ModelError as error:
            self._faults += error.faults
            raise
        if self._change:
            value = self._change(name, value)
        if not _finite(value, self._dtype):
            what = f"tensor {place.stored or name} holds NaN or infinity"
            self._faults.append(Fault(what, str(self._base.folder / place.shard), "fetch the base again"))
        self._tell(place.bytes)
        return value

    def _tell(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)

    def refuse_faults(self) -> None:
        """Raise ModelError with what was wrong in the tensors read so far."""
        if self._faults:
            raise ModelError.of(self._faults[:20])


def _finite(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether it is finite in ``dtype``, a piece at a time: an embedding is large, and would be copied.

    The largest magnitude is NaN or infinite where any is: one pass, where isfinite makes a second tensor.
    """
    pieces = torch.split(value.reshape(-1), _PIECE)
    return all(math.isfinite(torch.linalg.vector_norm(piece.to(dtype), ord=math.inf)) for piece in pieces)


class _Lazy:
    """What the loader knows a slice of a safetensors file by."""

    def __init__(self, source: Source, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._source, self._name, self._dtype, self._shape = source, name, dtype, shape

    def get_dtype(self) -> str:
        return self._dtype

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._source.read(self._name)[index]


def load(
    base: Base, form: BaseForm, progress: Callable[[int, int], None] | None = None, change: Change | None = None
) -> Any:
    """The frozen base in the wanted form, each tensor read, checked to be finite and quantised before the next.

    ``progress`` is told the bytes read and their total; ``change`` makes another model of it, tensor by tensor.

    Raises:
        ModelError: tensors missing, of another shape, or not finite.
        EnvironmentFault: the device's memory is too small.
    """
    dtype = DTYPES[form.compute if form.weights not in DTYPES else form.weights]
    with Reader(base) as reader:
        source = Source(reader, base, dtype, progress, change)
        try:
            model = (_packed if forms.by_hand(form.weights) else _loaded)(base, form, source, dtype)
        except torch.OutOfMemoryError as error:
            where, what = str(base.folder), f"out of memory while loading the base: {error}"
            raise EnvironmentFault(what, where, "see plan") from None
        except (OSError, RuntimeError, ValueError) as error:
            source.refuse_faults()
            raise ModelError(f"the base does not load: {error}", str(base.folder), "run `finetune plan`") from None
        source.refuse_faults()
    if form.weights in DTYPES and form.compute != form.weights:
        model = model.to(DTYPES[form.compute])
    model.requires_grad_(False)
    settle(model, base)
    return model


def settle(model: Any, base: Base) -> None:
    """What is said of a loaded model beside its weights."""
    from transformers import GenerationConfig

    model.config.use_cache = False
    model.name_or_path = str(base.folder)  # where PEFT looks for the base's name
    model.generation_config = GenerationConfig(**layouts.generation(base))
    hardware.trim()


def class_of(base: Base, config: Any) -> Any:
    """The library's class of the model, with the head that the base has."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    kinds = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if base.shape.scored else MODEL_FOR_CAUSAL_LM_MAPPING
    return kinds[type(config)]


def _loaded(base: Base, form: BaseForm, source: Source, dtype: torch.dtype) -> Any:
    """By transformers' own loader, which makes bitsandbytes' layers too."""
    from transformers.utils import logging

    from finetune.forms import bitsandbytes

    logging.disable_progress_bar()
    config = library_config(base)
    packed = forms.is_packed(form.weights)
    model, report = class_of(base, config).from_pretrained(
        None,
        config=config,
        state_dict=source.tensors(),
        dtype=dtype,
        quantization_config=bitsandbytes.settings(form.weights, form.double, dtype) if packed else None,
        device_map={"": form.device},
        attn_implementation=attention(base),
        output_loading_info=True,
    )
    source.refuse_faults()
    problems = {key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report.get(key)}
    if problems:
        raise ModelError(f"the base did not load whole: {problems}", str(base.folder), "fetch it again")
    bitsandbytes.freeze(model)
    return model


def attention(base: Base) -> str:
    return logn.register() if base.config.get("logn_from") else "sdpa"


def _empty(base: Base) -> Any:
    """The library's model without weights."""
    from accelerate import init_empty_weights

    config = library_config(base)
    with init_empty_weights():
        return class_of(base, config)._from_config(config, attn_implementation=attention(base))


def _packed(base: Base, form: BaseForm, source: Source, dtype: torch.dtype) -> Any:
    """Tensor by tensor: layers' linears packed, or as they lie packed in the folder, all else in the compute dtype."""
    model = _empty(base)
    for name, module in list(model.named_modules()):
        if (weight := f"{name}.weight") in base.tensors and isinstance(module, torch.nn.Linear) and ".layers." in name:
            bias = source.parameter(f"{name}.bias", form.device) if module.bias is not None else None
            model.set_submodule(name, PackedLinear(source.held(weight, form), bias, dtype))
    for name, _ in list(model.named_parameters()):
        if name in base.tensors:
            owner, _, last = name.rpartition(".")
            if model.get_parameter(name).is_meta:
                setattr(model.get_submodule(owner), last, source.parameter(name, form.device))
    model.tie_weights()
    model.model.rotary_emb.to(form.device)
    model.config.dtype = dtype
    return model.eval()


def library_config(base: Base) -> Any:
    """The library's own config of a base. Raises ModelError with what it does not accept."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**base.config)
    except Exception as error:  # noqa: BLE001 - each library version has its own classes for this
        what = f"transformers does not accept this config: {str(error).splitlines()[-1]}"
        raise ModelError(what, str(base.folder / "config.json"), "use the folder as published") from None


def streamed(base: Base, form: BaseForm, change: Change | None = None) -> Any:
    """The base in a 16- or 32-bit form without holding it: each layer is read when the forward pass comes to it.

    For proofs on a machine that a merged model does not fit. Slow for generation, where every token reads it all.
    """
    model, reader = _empty(base), Reader(base)
    weakref.finalize(model, reader.close)
    head = model.score if base.shape.scored else model.lm_head
    units = [model.model.embed_tokens, *model.model.layers, model.model.norm, head]
    for unit in units:
        unit.register_forward_pre_hook(_filled(_reading(reader, change), _names(model, unit, base), form))
        unit.register_forward_hook(_emptied)
    model.model.rotary_emb.to(form.device)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def _names(model: Any, unit: torch.nn.Module, base: Base) -> dict[str, str]:
    """A unit's parameters → the base's tensors; a tied head is the embedding."""
    prefix = next(name for name, module in model.named_modules() if module is unit)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if base.shape.tied else {}
    names = {name: f"{prefix}.{name}" for name, _ in unit.named_parameters()}
    return {name: tied.get(tensor, tensor) for name, tensor in names.items()}


def _reading(reader: Reader, change: Change | None) -> Callable[[str], torch.Tensor]:
    return reader.tensor if change is None else lambda name: change(name, reader.tensor(name))


def _filled(read: Callable[[str], torch.Tensor], names: dict[str, str], form: BaseForm) -> Callable[..., None]:
    def fill(unit: torch.nn.Module, inputs: Any) -> None:
        for name, tensor in names.items():
            owner, _, last = name.rpartition(".")
            value = read(tensor).to(form.device, DTYPES[form.compute])
            setattr(unit.get_submodule(owner), last, torch.nn.Parameter(value, requires_grad=False))

    return fill


def _emptied(unit: torch.nn.Module, inputs: Any, output: Any) -> None:
    for name, value in list(unit.named_parameters()):
        owner, _, last = name.rpartition(".")
        empty = torch.empty_like(value, device="meta")
        setattr(unit.get_submodule(owner), last, torch.nn.Parameter(empty, requires_grad=False))
