"""What is known to go wrong between packages and machines, and what each optional extra brings. One table each.

An entry is here because it was met: the place that says so is named beside it.
"""

from __future__ import annotations

from typing import NamedTuple


class Conflict(NamedTuple):
    """Versions that do not go together, all of ``packages`` at once; on processors with ``flag`` where one is named.

    ``fault``: a result or a run hangs on it; otherwise it is told, and nothing need be done here.
    """

    packages: dict[str, str]
    what: str
    fix: str
    fault: bool = True
    flag: str = ""


CONFLICTS = (
    Conflict(  # transformers' own deprecation warning, and the filter of it in pyproject.toml
        {"transformers": ">=6", "peft": "<0.22"},
        "PEFT asks the base for `is_gradient_checkpointing`, which transformers 6 no longer has",
        "pip install 'transformers>=5.17,<6'",
    ),
    Conflict(  # docs/decisions/0002
        {"bitsandbytes": ">=0.50,<0.51"},
        "bitsandbytes' own 4-bit layers give wrong gradients on this processor once they have been evaluated",
        "nothing to do here: finetune multiplies by itself (decision 0002); beware of it in other programs",
        fault=False,
        flag="avx512_bf16",
    ),
)

OLD_GLIBC = (2, 38)
"""Before it the heap seldom finds an aligned block again (decision 0015); what is free is given back between steps."""

EXTRAS = {
    "data": "near copies, wrongly decoded text and languages in `finetune data check`",
    "pii": "phone and identity numbers in `finetune data check --personal`",
    "eval": "`finetune eval --tasks`: tasks of lm-evaluation-harness",
    "gguf": "`finetune export --to gguf`",
    "llamacpp": "quantised GGUF files, and running them in `finetune prove`",
    "sign": "`finetune release --sign` and `finetune verify --key`",
    "tensorboard": "`tracker: tensorboard`",
    "mlflow": "`tracker: mlflow`",
    "slurm": "`finetune train --launch slurm`",
    "deepspeed": "nothing yet: no verb uses it",
    "torchao": "`quantize.weights: torchao_int8`",
    "docs": "`make site`: the pages of docs/ and the API, rendered",
    "notebooks": "the notebooks, executed",
    "bench": "the peers that benchmarks measure against",
    "dev": "tests, lint and types",
}
"""Extra → what it brings."""

LOWERED = {
    "ONEDNN_DEFAULT_FPMATH_MODE": ("BF16", "F16", "TF32", "ANY"),
    "DNNL_DEFAULT_FPMATH_MODE": ("BF16", "F16", "TF32", "ANY"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": ("1",),
}
"""Variables, with the values under which libraries may compute products in fp32 in fewer bits."""

ISA = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
"""Variables that choose other instructions: results agree to rounding, their bits do not."""
