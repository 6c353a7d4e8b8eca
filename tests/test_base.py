"""Base folders: a good one is read to the last tensor, a bad one is named before anything is loaded."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import base as bases
from finetune import model
from finetune.errors import ModelError
from finetune.loading import BaseForm
from tests import runs

Build = Callable[..., Path]


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def _json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _config(folder: Path, **values: Any) -> None:
    _json(folder / "config.json", lambda config: config.update(values))


def test_a_good_folder(tiny_base: Path, tiny_base_sharded: Path) -> None:
    one, many = bases.inspect(tiny_base), bases.inspect(tiny_base_sharded)
    assert (one.shards, one.dtype, one.stop_token, one.notes) == (["model.safetensors"], "bfloat16", "<|im_end|>", ())
    assert len(many.shards) > 2
    assert {name: tensor.shape for name, tensor in one.tensors.items()} == {
        name: tensor.shape for name, tensor in many.tensors.items()
    }
    with safe_open(tiny_base / "model.safetensors", framework="pt") as file:
        stored = {name: (tuple(file.get_slice(name).get_shape()), "BF16") for name in file.keys()}  # noqa: SIM118
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in one.tensors.items()} == stored
    assert bases.stored_bytes(one.tensors) == sum(v.nbytes for v in load_file(tiny_base / "model.safetensors").values())
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(one.digests()) == names | {"model.safetensors"}
    assert set(many.digests()) == names | set(many.shards)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10\x00")


def _write_header(folder: Path, header: Any, data: bytes = b"") -> None:
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    _json(folder / "tokenizer_config.json", lambda settings: settings.pop("chat_template", None))


def _other_stop(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_end|>", "<|stop|>"))


UP = "model.layers.1.mlp.up_proj.weight"

FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "62 truncated shard": (_cut, "model.safetensors", "the download was cut off"),
    "62 truncated header": (_cut_header, "model.safetensors", "cut off before its header"),
    "62 header is no JSON": (lambda f: (f / "model.safetensors").write_bytes(b"\x04" + bytes(7) + b"{{{{"),
                             "model.safetensors", "cannot be read"),
    "62 header longer than the file": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 20),
                                       "model.safetensors", "its header is longer than the file"),
    "62 header is a list": (lambda f: _write_header(f, [1]), "model.safetensors", "cannot be read"),
    "62 entry without offsets": (lambda f: _write_header(f, {"a": {}}), "model.safetensors", "cannot be read"),
    "62 bytes that are not the shape": (
        lambda f: _write_header(f, {UP: {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 4]}}, bytes(4)),
        "model.safetensors", f"tensor {UP} has 4 bytes, which is not its shape [2, 2]"),
    "62 no weights": (lambda f: (f / "model.safetensors").unlink(), "base", "no safetensors weights here"),
    "64 missing key": (lambda f: _weights(f, lambda w: w.pop(UP)), "base", f"1 tensors are missing, the first is {UP}"),
    "66 wrong hidden size": (lambda f: _config(f, hidden_size=32), "model.safetensors",
                             "tensor model.embed_tokens.weight is [320, 64] where config.json says [320, 32]"),
    "66 wrong vocabulary": (lambda f: _config(f, vocab_size=640), "model.safetensors",
                            "tensor model.embed_tokens.weight is [320, 64] where config.json says [640, 64]"),
    "66 more layers": (lambda f: _config(f, num_hidden_layers=3), "base", "the first is model.layers.2.self_attn"),
    "66 a text for a number": (lambda f: _config(f, num_hidden_layers="2"), "config.json", "num_hidden_layers is '2'"),
    "66 no heads": (lambda f: _config(f, num_attention_heads=0), "config.json", "num_attention_heads is 0"),
    "66 number missing": (lambda f: _json(f / "config.json", lambda c: c.pop("hidden_size")), "config.json",
                          "has no 'hidden_size'"),
    "67 id beyond the vocabulary": (
        lambda f: _json(f / "tokenizer.json", lambda t: t["added_tokens"].append({"id": 999, "content": "<x>"})),
        "tokenizer.json", "knows id 999 but the model has only 320 embedding rows"),
    "67 no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "base", "no tokenizer.json"),
    "67 tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json", "cannot be read"),
    "67 tokenizer is a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json", "cannot be read"),
    "67 an id that is no number": (
        lambda f: _json(f / "tokenizer.json", lambda t: t["model"]["vocab"].update(x="y")), "tokenizer.json",
        "cannot be read"),
    "67 settings are a list": (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer", "cannot be read"),
    "67 no stop token": (_other_stop, "tokenizer.json", "stop tokens (<|im_end|>) is in the tokenizer"),
    "68 no config": (lambda f: (f / "config.json").unlink(), "base", "no config.json: this is not a model folder"),
    "68 config is no JSON": (lambda f: (f / "config.json").write_text("{,"), "config.json", "cannot be read"),
    "68 config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json", "is not a JSON object"),
    "69 no template": (_no_template, "tokenizer_config.json", "no chat template"),
    "70 pickled weights": (_pickled, "base", "weights are pickled (pytorch_model.bin), which can run code"),
    "71 unknown model_type": (lambda f: _config(f, model_type="mamba", auto_map={"AutoModel": "x.Y"}), "config.json",
                              "unknown model_type 'mamba'"),
    "71 Qwen-1": (lambda f: _config(f, model_type="qwen"), "config.json", "no_bias is not true"),
    "71 no model_type": (lambda f: _json(f / "config.json", lambda c: c.pop("model_type")), "config.json",
                         "unknown model_type ''"),
    "quantised already": (lambda f: _config(f, quantization_config={"quant_method": "gptq"}), "config.json",
                          "quantization_config of gptq: bits is None"),
    "quantised in another way": (lambda f: _config(f, quantization_config={"quant_method": "hqq"}), "config.json",
                                 "already quantised"),
    "quantised already, unsaid": (lambda f: _weights(f, lambda w: w.update({UP: w[UP].to(torch.int8)})),
                                  "model.safetensors", "stored as I8"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "where", "what"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_folder_is_named(folder: Path, damage: Callable[[Path], object], where: str, what: str) -> None:
    damage(folder)
    with pytest.raises(ModelError) as caught:
        bases.inspect(folder)
    fault = caught.value.faults[0]
    assert what in fault.what
    assert where in Path(fault.where).name
    assert fault.fix
    assert "weights_only" not in str(caught.value)


def test_faults_of_a_sharded_base(tiny_base_sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_sharded, tmp_path / "base"))
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-8])
    with pytest.raises(ModelError) as caught:
        bases.inspect(folder)
    assert [(Path(fault.where).name, fault.what[:22]) for fault in caught.value.faults] == [
        (shards[0].name, "this shard is missing"), (shards[1].name, "this shard cannot be r"),
    ]  # fmt: skip
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ModelError, match="the shard index cannot be read"):
        bases.inspect(folder)


def test_an_index_cannot_lead_out_of_the_folder(tiny_base_sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base_sharded, tmp_path / "base"))
    _json(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../../secret.safetensors")
    )
    with pytest.raises(ModelError) as caught:
        bases.inspect(folder)
    assert Path(caught.value.faults[0].where) == folder / "model.safetensors.index.json"
    assert "'../../secret.safetensors', which is no file of this folder" in caught.value.faults[0].what


def test_all_faults_come_at_once(folder: Path) -> None:
    _config(folder, vocab_size=640)
    _no_template(folder)
    with pytest.raises(ModelError) as caught:
        bases.inspect(folder)
    assert len(caught.value.faults) == 3  # embedding, head, template


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", [UP, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize(
    ("weights", "double"),
    [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("bf16", True), ("fp32", True)],
)
def test_65_a_weight_that_is_no_number_is_refused(
    folder: Path, value: float, tensor: str, weights: str, double: bool
) -> None:
    def spoil(stored: dict[str, torch.Tensor]) -> None:
        stored[tensor].view(-1)[5] = value

    _weights(folder, spoil)
    with pytest.raises(ModelError, match=f"tensor {tensor} holds NaN or infinity"):
        model.load_base(bases.inspect(folder), BaseForm(weights=weights, double=double, compute="fp32", device="cpu"))


def test_65_the_command_says_so(work: Path) -> None:
    _weights(work / "base", lambda stored: stored[UP].view(-1)[:1].fill_(float("nan")))
    said = runs.train()
    assert said.code == 4
    assert f"tensor {UP} holds NaN" in said.err
    assert not (runs.OUTPUT / "adapter").exists()


def test_71_code_in_the_folder_is_never_run(work: Path) -> None:
    """A folder that asks transformers to import its Python file at every door there is."""
    base, canary = work / "base", work / "canary"
    trap = f"from pathlib import Path\nPath({str(canary)!r}).write_text('ran')\nclass Trap: pass\n"
    for name in ("modeling_trap.py", "configuration_trap.py", "tokenization_trap.py", "__init__.py"):
        (base / name).write_text(trap)
    doors = {"AutoConfig": "configuration_trap.Trap", "AutoModelForCausalLM": "modeling_trap.Trap"}
    _config(base, auto_map={**doors, "AutoTokenizer": ["tokenization_trap.Trap", None]}, trust_remote_code=True)
    _json(
        base / "tokenizer_config.json", lambda s: s.update(auto_map={"AutoTokenizer": ["tokenization_trap.Trap", None]})
    )
    _json(base / "generation_config.json", lambda s: s.update(custom_generate="modeling_trap.py"))
    notes = bases.inspect(base).notes
    assert notes == ("config.json names remote code (auto_map): ignored, nothing from the folder is executed",)
    said = runs.train("train.steps=2")
    assert said.code == 0, said.err
    assert runs.finetune("merge", "runs/one", "--out", "merged").code == 0
    assert not canary.exists()
    assert not any("_trap" in name for name in sys.modules)
    assert "auto_map" not in json.loads((work / "merged" / "config.json").read_text())
    assert not list((work / "merged").glob("*.py"))


def test_faults_of_the_base_end_the_command_with_4(work: Path) -> None:
    (work / "base" / "chat_template.jinja").unlink()
    said = runs.train()
    assert said.code == 4
    assert said.err.startswith("model: base/tokenizer_config.json: no chat template; ")
    assert not Path("runs").exists()
