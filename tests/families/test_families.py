from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import families
from finetune.errors import ModelError
from finetune.families import qwen1


def test_every_file_is_a_family() -> None:
    here = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(families.names()) == here >= {"llama", "qwen2", "qwen3"}


TYPES = [{"qwen1": "qwen"}.get(name, name) for name in families.names()]


@pytest.mark.parametrize("name", [name for name in TYPES if name != "qwen"])  # whose layers are qwen2's
def test_targets_are_the_linear_layers_of_a_block(name: str, build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(build_tiny(tmp_path / name, family=name))
    linears = {path.rsplit(".", 1)[-1] for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(families.get(name).TARGET_MODULES) == linears - {"lm_head"}
    assert model.config.model_type == name


@pytest.mark.parametrize("name", TYPES)
def test_constants_have_their_promised_types(name: str) -> None:
    family = families.get(name)
    assert len(family.TARGET_MODULES) == len(set(family.TARGET_MODULES))
    assert all(isinstance(token, str) and token for token in family.STOP_TOKENS)
    assert family.TEMPLATE
    for model, licence in family.LICENSES.items():
        assert "/" not in model
        assert licence.id and licence.name and licence.duties  # noqa: PT018 - one statement of each


def test_unknown_model_types_are_refused() -> None:
    with pytest.raises(ModelError, match="known ones: llama, qwen1, qwen2, qwen3; did you mean") as caught:
        families.get("qwen4")
    assert caught.value.exit_code == 4
    assert families.get("qwen") is qwen1
    for name in ("__init__", "../llama", "os", "", "qwen1"):
        with pytest.raises(ModelError, match="unknown model_type"):
            families.get(name)


def test_licences_are_found_by_any_spelling_of_the_model() -> None:
    qwen2 = families.get("qwen2")
    assert families.licence_of(qwen2, "Qwen/Qwen2.5-14B-Instruct") == families.APACHE
    assert families.licence_of(qwen2, "models/qwen2.5-3b/") is not None
    assert families.licence_of(qwen2, "models/qwen2.5-3b/") != families.APACHE
    assert families.licence_of(qwen2, "somebody/else") is None
    assert families.licence_of(families.get("llama"), "data/bases/smollm2-135m-instruct") == families.APACHE


def test_looking_at_families_imports_no_torch() -> None:
    code = f"import sys; from finetune import families; [families.get(n) for n in {TYPES}]; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
