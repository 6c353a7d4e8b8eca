"""A GGUF that is read back is the model folder, to the byte; whatever differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import gguf_file
from finetune.errors import Fault, ModelError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra gguf)")
PARTS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def stored_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i of a head goes to 2i, row i + d/2 to 2i + 1."""
    size = value.shape[0] // heads
    order = [
        head * size + half * (size // 2) + row for head in range(heads) for row in range(size // 2) for half in (0, 1)
    ]
    return value[order]


def contents(folder: Path, family: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Keys and tensors of the GGUF that a tiny folder should become."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = {index: token for token, index in tokenizer["model"]["vocab"].items()}
    known |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    values = {
        f"{family}.block_count": 2, f"{family}.context_length": 1024, f"{family}.embedding_length": 64,
        f"{family}.feed_forward_length": 128, f"{family}.attention.head_count": 4,
        f"{family}.attention.head_count_kv": 2, f"{family}.attention.key_length": 16,
        f"{family}.attention.layer_norm_rms_epsilon": 1e-6, f"{family}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [known.get(index, f"[PAD{index}]") for index in range(config["vocab_size"])],
        "tokenizer.ggml.merges": merges,
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }  # fmt: skip
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if family == "llama" and ".q_proj." in name:
            value = interleaved(value, 4)
        if family == "llama" and ".k_proj." in name:
            value = interleaved(value, 2)
        tensors[stored_name(name)] = value
    return values, tensors


def write(path: Path, family: str, values: dict[str, Any], tensors: dict[str, Any]) -> gguf_file.GGUF:
    writer = gguf.GGUFWriter(path, family)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):  # quantised: (bytes, form)
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        elif value.dtype == torch.bfloat16 and value.dim() > 1:
            raw = value.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, (value.float() if value.dim() == 1 else value).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_file.read(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Path]) -> Callable[[str], Path]:
    """A tiny model of a family, in the form that most models of it have."""
    made: dict[str, Path] = {}
    forms = {"llama": {"dtype": "float32", "tie_word_embeddings": True}, "qwen2": {}, "qwen3": {"dtype": "float16"}}

    def build(family: str) -> Path:
        if family not in made:
            made[family] = build_tiny(tmp_path_factory.mktemp("gguf") / family, family=family, **forms[family])
        return made[family]

    return build


def faults(file: gguf_file.GGUF, folder: Path) -> list[Fault]:
    config = gguf_file.config_of(folder)
    found = gguf_file.number_faults(file, config) + gguf_file.vocabulary_faults(file, folder, config)
    return found + gguf_file.tensor_faults(file, folder, config)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_was_written_right_has_no_fault(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny(family)
    assert faults(write(tmp_path / "m.gguf", family, *contents(folder, family)), folder) == []


def test_rows_are_reordered_for_llama_alone(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tiny("llama")
    values, tensors = contents(folder, "llama")
    plain = load_file(folder / "model.safetensors")
    tensors["blk.0.attn_q.weight"] = plain["model.layers.0.self_attn.q_proj.weight"]
    (fault,) = faults(write(tmp_path / "m.gguf", "llama", values, tensors), folder)
    assert "tensor blk.0.attn_q.weight holds other values" in str(fault)
    assert "model.layers.0.self_attn.q_proj.weight" in fault.fix


def in_eight_bits(value: torch.Tensor) -> tuple[Any, Any]:
    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quantize(value.float().numpy(), kind), kind


def one_bit(value: torch.Tensor) -> torch.Tensor:
    changed = value.clone()
    changed.view(torch.uint8).reshape(-1)[-1] ^= 1
    return changed


@pytest.mark.parametrize(
    ("name", "edit", "what"),
    [
        ("blk.1.ffn_up.weight", one_bit, "holds other values"),
        ("blk.0.attn_k.bias", one_bit, "holds other values"),
        ("output_norm.weight", lambda value: None, "is missing"),
        ("blk.0.ffn_down.weight", lambda value: value.T, "is [128, 64] where it should be [64, 128]"),
        ("token_embd.weight", lambda value: value.roll(1, 0), "holds other values"),
        ("blk.2.ffn_up.weight", lambda value: torch.zeros(2, 2), "is not of this model"),
        ("output.weight", lambda value: in_eight_bits(value), "is stored as Q8_0"),
    ],
    ids=["one bit", "one bit of a bias", "missing", "shape", "rows", "additional", "quantised"],
)  # fmt: skip
def test_a_tensor_that_differs_is_named(
    name: str, edit: Callable[[Any], Any], what: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    values, tensors = contents(tiny("qwen2"), "qwen2")
    changed = edit(tensors.get(name))
    tensors = {key: value for key, value in tensors.items() if key != name} | (
        {} if changed is None else {name: changed}
    )
    (fault,) = faults(write(tmp_path / "m.gguf", "qwen2", values, tensors), tiny("qwen2"))
    assert f"tensor {name} {what}" in str(fault)


@pytest.mark.parametrize(
    ("key", "edit", "what"),
    [
        ("qwen2.attention.layer_norm_rms_epsilon", lambda value: 1e-5, "where it should be 1e-06"),
        ("qwen2.rope.freq_base", lambda value: 1e6, "where it should be 10000.0"),
        ("qwen2.attention.head_count_kv", lambda value: 4, "is 4 where it should be 2"),
        ("qwen2.attention.key_length", lambda value: 8, "is 8 where it should be 16"),
        ("qwen2.context_length", lambda value: 512, "is 512 where it should be 1024"),
        ("tokenizer.ggml.tokens", lambda value: [value[1], value[0], *value[2:]], "token 0 is"),
        ("tokenizer.ggml.tokens", lambda value: value[:-1], "it has 319 tokens where the model has 320"),
        ("tokenizer.ggml.merges", lambda value: value[1:], "its merges are not those"),
        ("tokenizer.chat_template", lambda value: value + " ", "its chat template is not"),
    ],
)
def test_a_number_or_a_token_that_differs_is_named(
    key: str, edit: Callable[[Any], Any], what: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    values, tensors = contents(tiny("qwen2"), "qwen2")
    values[key] = edit(values[key])
    (fault,) = faults(write(tmp_path / "m.gguf", "qwen2", values, tensors), tiny("qwen2"))
    assert what in str(fault)


def test_a_value_that_half_precision_cannot_hold_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    stored = load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"][3, 3] = 1e5
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    values, tensors = contents(folder, "llama")
    with np.errstate(over="ignore"):
        tensors["token_embd.weight"] = tensors["token_embd.weight"].half()
    (fault,) = faults(write(tmp_path / "m.gguf", "llama", values, tensors), folder)
    assert "does not fit F16" in str(fault)


def test_quantised_values_must_be_near(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    values, tensors = contents(tiny("llama"), "llama")
    whole = write(tmp_path / "whole.gguf", "llama", values, tensors)
    kind = gguf.GGMLQuantizationType.Q8_0
    small = {
        name: value if value.dim() == 1 else (gguf.quantize(value.numpy(), kind), kind)
        for name, value in tensors.items()
    }
    assert gguf_file.quantised_faults(write(tmp_path / "small.gguf", "llama", values, small), whole) == []
    small["blk.0.ffn_up.weight"] = in_eight_bits(tensors["blk.0.ffn_gate.weight"])
    (fault,) = gguf_file.quantised_faults(write(tmp_path / "other.gguf", "llama", values, small), whole)
    assert "tensor blk.0.ffn_up.weight as Q8_0 is off by 1." in str(fault)
    small["blk.0.ffn_up.weight"] = in_eight_bits(tensors["blk.0.ffn_up.weight"])
    values |= {"tokenizer.chat_template": "another"}
    (fault,) = gguf_file.quantised_faults(write(tmp_path / "keys.gguf", "llama", values, small), whole)
    assert "tokenizer.chat_template changed while quantising" in str(fault)


def test_a_file_that_is_cut_off_is_refused(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", "qwen2", *contents(tiny("qwen2"), "qwen2")).path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 200):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(ModelError, match="cannot be read"):
            gguf_file.read(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"architectures": ["QWenLMHeadModel"]}', "an original Qwen in the native layout first"),
        ('{"architectures": []}', "cannot be written as GGUF"),
        ('{"architectures": "LlamaForCausalLM"}', "cannot be written as GGUF"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "64"}', "hidden_size is no number"),
        ("[]", "config.json is no mapping"),
        ("{", "config.json cannot be read"),
    ],
)
def test_another_model_is_refused(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError) as raised:
        gguf_file.config_of(tmp_path)
    assert what in str(raised.value)


def test_a_folder_without_its_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors here"):
        gguf_file.shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(ModelError, match="no file of this folder"):
        gguf_file.shards(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"no model-1\.safetensors here"):
        gguf_file.shards(tmp_path)
