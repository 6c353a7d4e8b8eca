"""Small linears packed and dequantised by GPTQModel and AutoAWQ themselves: what ``libraries.safetensors`` holds.

    python make.py GPTQMODEL AUTOAWQ     # the unpacked source archives of gptqmodel 7.7.0 and autoawq 0.2.9

Run once, where both can be imported: gptqmodel asks for a newer torch than is pinned here, and autoawq is no longer
maintained. Their packages' own beginnings (models, kernels) are passed over, the modules that pack are theirs.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT, IN, GROUP = 32, 64, 16


def main() -> None:
    torch.manual_seed(3)
    gptqmodel, autoawq = sys.argv[1:]
    made: dict[str, torch.Tensor] = {}
    sys.path.insert(0, gptqmodel)
    for name, symmetric, shuffled in (("sym", True, False), ("asym", False, False), ("act", False, True)):
        made |= {f"gptq.{name}.{key}": value for key, value in _gptq(symmetric, shuffled).items()}
    package = types.ModuleType("awq")
    package.__path__ = [str(Path(autoawq) / "awq")]
    sys.modules["awq"] = package
    made |= {f"awq.{key}": value for key, value in _awq().items()}
    save_file(
        {key: value.contiguous() for key, value in made.items()}, Path(__file__).with_name("libraries.safetensors")
    )


def _linear(symmetric: bool, groups: torch.Tensor) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A linear whose weights lie on the grid, scales and zeros [out, groups]."""
    count = int(groups.max()) + 1
    scales = (torch.rand(OUT, count) * 0.05 + 0.01).half().float()
    zeros = torch.full((OUT, count), 8) if symmetric else torch.randint(0, 16, (OUT, count))  # zero of 0 too
    codes = torch.randint(0, 16, (OUT, IN))
    linear = torch.nn.Linear(IN, OUT, bias=False)
    linear.weight.data = (codes - zeros[:, groups]) * scales[:, groups]
    return linear, scales, zeros.float()


def _gptq(symmetric: bool, shuffled: bool) -> dict[str, torch.Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT, METHOD, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    groups = torch.arange(IN) // GROUP
    groups = groups[torch.randperm(IN)] if shuffled else groups
    linear, scales, zeros = _linear(symmetric, groups)
    module = TorchLinear(
        bits=4, group_size=GROUP, sym=symmetric, desc_act=shuffled, in_features=IN, out_features=OUT,
        format=FORMAT.GPTQ_V2,
    )  # fmt: skip
    module.pack_original(linear=linear, scales=scales, zeros=zeros, g_idx=groups.to(torch.int32))
    module.post_init()
    found = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    found["dense"] = module.dequantize_weight().T.clone()
    settings = QuantizeConfig(bits=4, group_size=GROUP, quant_method=METHOD.GPTQ, format=FORMAT.GPTQ)
    convert_gptq_v2_to_v1_format_module(module, settings)
    return found | {"qzeros_v1": module.qzeros.data.clone()}


def _awq() -> dict[str, torch.Tensor]:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    linear, scales, zeros = _linear(False, torch.arange(IN) // GROUP)
    module = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    found = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales")}
    return found | {"dense": dequantize_gemm(found["qweight"], found["qzeros"], found["scales"], 4, GROUP).T.clone()}


if __name__ == "__main__":
    main()
