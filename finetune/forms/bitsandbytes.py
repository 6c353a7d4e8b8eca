"""NF4, FP4 and int8 in bitsandbytes' own layers, which PEFT knows; the 4-bit codes are made by ``kernels.four_bit``.

Only the storage is bitsandbytes'. Its CPU path is not used: on a CPU with AVX-512-bf16 it repacks a 4-bit weight at the
first evaluation-mode forward, and the layer then runs an inference kernel outside autograd: the loss stays the same to
the last digit, the gradients are wrong, and nothing is said. Here the packed weight is only read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit

from finetune.decoder import DecoderShape
from finetune.kernels import four_bit
from finetune.kernels.frozen_linear import Frozen

_FOUR = ("nf4", "fp4")


def bytes_per_weight(word: str, shape: DecoderShape, *, double: bool, device: str) -> float:
    if word in _FOUR:
        # Per 64 weights one scale: fp32, or 8 bits and one fp32 per 256 scales (Dettmers et al. 2023, section 3), which
        # loading decodes on a CPU.
        return 0.5 + (1 / 64 + 4 / (64 * 256) if double and device != "cpu" else 4 / 64)
    return 1.0 + 4 / shape.hidden


def refuse_missing(where: str) -> None:
    """bitsandbytes comes with every installation."""


def measure(block: torch.Tensor) -> torch.Tensor:
    return four_bit.block_maxima(block)


def settle(measured: torch.Tensor, *, double: bool) -> torch.Tensor:
    return four_bit.scales_of(measured, double=double)


def replay(
    word: str, block: torch.Tensor, *, double: bool, start: int = 0, settled: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of a weight as they act in training. A part of a 4-bit weight is 64 of its rows or a multiple."""
    if word in _FOUR:
        begin = start * (block.numel() // max(1, len(block))) // four_bit.BLOCK
        part = None if settled is None else settled[begin : begin - (-block.numel() // four_bit.BLOCK)]
        return four_bit.round_trip(block, word, double=double, scales=part)
    codes, scales, _ = int8_vectorwise_quant(block.to(torch.float16))
    return dense_int8(codes, scales, block.dtype)


def dense_int8(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Row-wise int8 codes [out, in] and their largest absolute values [out] → weights (LLM.int8, section 2.1)."""
    return (codes.float() * (scales.float()[:, None] / 127.0)).to(dtype)


class FrozenLinear4bit(Frozen, Linear4bit):  # type: ignore[misc]  # bitsandbytes ships no types
    """bitsandbytes' 4-bit storage with this project's arithmetic."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        weight: Any = self.weight
        state = getattr(weight, "quant_state", None)  # of a weight gathered from shards the layer alone knows it
        return dequantize_4bit(weight.data, state or self.quant_state).to(dtype)  # type: ignore[no-any-return]

    def to_hold(self) -> torch.Tensor | None:
        whole = isinstance(self.weight, Params4bit)  # else only a shard of it is here
        return self.dense(self.weight.quant_state.dtype) if whole else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and not torch.is_grad_enabled() and isinstance(self.weight, Params4bit):
            # Its fused kernel for single tokens; CUDA never repacks.
            return Linear4bit.forward(self, x)  # type: ignore[no-any-return]
        return Frozen.forward(self, x)


class FrozenLinear8bit(Frozen, Linear8bitLt):  # type: ignore[misc]  # bitsandbytes ships no types
    """bitsandbytes' 8-bit storage with this project's arithmetic."""

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        weight: Any = self.weight
        return dense_int8(weight.data, weight.SCB if weight.SCB is not None else self.state.SCB, dtype)


def freeze(model: torch.nn.Module) -> None:
    """Turn every quantised linear of ``model`` into its frozen form, in place."""
    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = FrozenLinear4bit
        elif type(module) is Linear8bitLt:
            module.__class__ = FrozenLinear8bit


def settings(word: str, double: bool, compute: torch.dtype) -> Any:
    """transformers' quantisation config, under which its loader makes these layers."""
    from transformers import BitsAndBytesConfig

    if word not in _FOUR:
        return BitsAndBytesConfig(load_in_8bit=True)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=word,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )
    config.quant_method = _own_codec()
    return config


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
