"""S26: a 4-bit base is packed by one codec everywhere; bitsandbytes holds its bytes, and its quantiser is not asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file

from finetune import loading
from finetune.forms import bitsandbytes as bitsandbytes_form
from finetune.kernels import four_bit, frozen_linear
from tests import tiny


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("compute", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_is_loaded_is_what_the_codec_packs(
    build_tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, double: bool,
    compute: str,
) -> None:  # fmt: skip
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("bitsandbytes' own quantiser was asked")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", forbidden)
    base = build_tiny(tmp_path / "base", family="qwen2", intermediate_size=104)  # ragged: no multiple of the block
    policy = tiny.load(base, kind, compute, double=double)
    stored = load_file(base / "model.safetensors")
    layers = {
        name: module
        for name, module in policy.causal_lm.named_modules()
        if isinstance(module, bitsandbytes_form.FrozenLinear4bit)
    }
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"].to(loading.DTYPES[compute])
        packed, state = four_bit.quantize(weight, kind, double=double), layer.weight.quant_state
        assert torch.equal(layer.weight.data.view(-1), packed.data)
        assert (state.nested, state.blocksize, state.shape, state.dtype) == (False, 64, packed.shape, packed.dtype)
        # On a CPU nested scales are decoded once, at loading.
        scales = packed.scales.decoded() if isinstance(packed.scales, four_bit.Nested) else packed.scales
        assert torch.equal(state.absmax, scales)
        # What a merge replays from the shard is what the layer multiplies with.
        replayed = bitsandbytes_form.replay(kind, weight, double=double)
        assert torch.equal(replayed, frozen_linear.dense_weight(layer, weight.dtype))
    assert policy.causal_lm.config.quantization_config.quant_method.value == "bitsandbytes"  # as PEFT expects
