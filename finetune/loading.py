"""The frozen base in the form that it is trained against, read tensor by tensor from either layout.

``from_pretrained`` takes a state dict whose values it materialises one by one (its own loading puts slices of open
files there); quantising and moving to the device follow at once, so that memory never holds a second model.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune import hardware, layouts
from finetune.base import Base
from finetune.errors import EnvironmentFault, Fault, ModelError
from finetune.kernels import four_bit, frozen_linear, logn
from finetune.shards import Reader

_PIECE = 1 << 22
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class BaseForm:
    """How the frozen base is held. ``weights``: nf4, fp4, int8, bf16, fp16, fp32; ``compute``: bf16, fp16, fp32."""

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
        with self._lock:
            self._done += place.bytes
            if self._progress:
                self._progress(self._done, self._total)
        return value

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
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = DTYPES[form.compute if form.weights not in DTYPES else form.weights]
    with Reader(base) as reader:
        source = Source(reader, base, dtype, progress, change)
        try:
            config = library_config(base)
            model, report = class_of(base, config).from_pretrained(
                None,
                config=config,
                state_dict=source.tensors(),
                dtype=dtype,
                quantization_config=quantization(form),
                device_map={"": form.device},
                attn_implementation=logn.register() if base.config.get("logn_from") else "sdpa",
                output_loading_info=True,
            )
        except torch.OutOfMemoryError as error:
            where, what = str(base.folder), f"out of memory while loading the base: {error}"
            raise EnvironmentFault(what, where, "see plan") from None
        except (OSError, RuntimeError, ValueError) as error:
            source.refuse_faults()
            raise ModelError(f"the base does not load: {error}", str(base.folder), "run `finetune plan`") from None
        source.refuse_faults()
    problems = {key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report.get(key)}
    if problems:
        raise ModelError(f"the base did not load whole: {problems}", str(base.folder), "fetch it again")
    if form.weights in DTYPES and form.compute != form.weights:
        model = model.to(DTYPES[form.compute])
    model.requires_grad_(False)
    frozen_linear.freeze(model)
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
    from accelerate import init_empty_weights

    config = library_config(base)
    attention = logn.register() if base.config.get("logn_from") else "sdpa"
    with init_empty_weights():
        model = class_of(base, config)._from_config(config, attn_implementation=attention)
    reader = Reader(base)
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


def quantization(form: BaseForm) -> Any:
    from transformers import BitsAndBytesConfig

    if form.weights in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.weights,
            bnb_4bit_use_double_quant=form.double,
            bnb_4bit_compute_dtype=DTYPES[form.compute],
        )
        config.quant_method = _own_codec()
        return config
    return BitsAndBytesConfig(load_in_8bit=True) if form.weights == "int8" else None


def pack(weight: torch.Tensor, layer: Any) -> Any:
    """A weight [out, in], on its device and in the compute dtype, as the parameter of a 4-bit linear that is empty."""
    empty = layer.weight
    double, blocksize = empty.compress_statistics, empty.blocksize
    packed = four_bit.quantize(weight, empty.quant_type, double=double, blocksize=blocksize)
    if weight.device.type == "cpu":  # decoding the scales twice a step is 4 % of a small model's time
        packed = packed.with_decoded_scales()
    return four_bit.parameter(packed, layer)


@functools.cache
def _own_codec() -> str:
    """Make a 4-bit quantiser known to transformers under the returned name: bitsandbytes' layers, our packed weights.

    By its public registry. The name only chooses the class: once made, it calls itself bitsandbytes again, which is
    what PEFT, accelerate and a saved config ask for.
    """
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class Pack(Bnb4bitQuantize):  # type: ignore[misc]  # the library ships no types
        """Called with one tensor at a time, on its device and in the compute dtype."""

        def convert(self, input_dict: dict[str, Any], *_: Any, model: Any = None, **__: Any) -> dict[str, Any]:
            made = {}
            for name, value in input_dict.items():
                layer = model.get_submodule(name.rpartition(".")[0])
                made[name] = pack(value[0] if isinstance(value, list) else value, layer)
                layer._is_hf_initialized = True  # the loader's mark: do not fill it at random
            return made

    class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # the library ships no types
        def __init__(self, config: Any, **rest: Any) -> None:
            config.quant_method = QuantizationMethod.BITS_AND_BYTES
            super().__init__(config, **rest)

        def get_quantize_ops(self) -> Any:
            return Pack(self)

    register_quantizer("finetune_4bit")(Quantizer)
    return "finetune_4bit"
