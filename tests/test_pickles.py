"""Pickled shards: tensors come out, payloads do not run, and one line says what is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import pickles
from finetune.errors import ModelError
from tests import qwen1, runs
from tests.qwen1 import PICKLED


class Payload:
    """What a hostile shard holds: a call that is made while it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def convert(source: Path, out: Path) -> runs.Said:
    return runs.finetune("convert", str(source), str(out), "--to", "native")


def test_every_tensor_comes_out_as_it_was(tmp_path: Path) -> None:
    pickles.unpack(PICKLED, tmp_path, lambda done, of: None)
    for number in (1, 2):
        given = torch.load(PICKLED / f"pytorch_model-0000{number}-of-00002.bin", weights_only=True)
        found = load_file(tmp_path / f"model-0000{number}-of-00002.safetensors")
        assert set(found) == set(given)
        assert all(torch.equal(found[name], given[name]) and found[name].dtype == given[name].dtype for name in given)


def test_a_payload_is_refused_and_never_runs(tmp_path: Path) -> None:
    folder, canary = qwen1.copy(PICKLED, tmp_path / "base"), tmp_path / "canary"
    shard = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({"transformer.wte.weight": Payload(canary)}, shard)
    said = convert(folder, tmp_path / "out")
    assert (said.code, said.err.count("\n")) == (4, 1)
    assert f"{shard}: this pickle holds more than tensors" in said.err
    shard.write_bytes(pickle.dumps(Payload(canary)))
    said = convert(folder, tmp_path / "out")
    assert said.code == 4
    assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "damaged"),
        (b"PK\x03\x04 cut off", "damaged"),
        ([torch.zeros(2)], "no mapping of names to tensors"),
        ({"a": torch.zeros(2), "b": 3}, "no mapping of names to tensors"),
        ({"a": torch.zeros(2, dtype=torch.int8)}, "which is a quantised form"),
        ({"a\ud800": torch.zeros(2)}, "without a usable name"),
        ({7: torch.zeros(2)}, "without a usable name"),
    ],
)
def test_other_contents_are_refused(content: Any, what: str, tmp_path: Path) -> None:
    shard = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        shard.write_bytes(content)
    else:
        torch.save(content, shard)
    with pytest.raises(ModelError) as caught:
        pickles.unpack(tmp_path, tmp_path, lambda done, of: None)
    fault = caught.value.faults[0]
    assert what in fault.what
    assert fault.where == str(shard)


def test_the_child_gets_no_secret_and_imports_nothing_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module beside the shard, named as one that the child imports, and a token in our environment."""
    folder, canary = qwen1.copy(PICKLED, tmp_path / "base"), tmp_path / "canary"
    trap = f"import os\nopen({str(canary)!r}, 'w').write(os.environ.get('HF_TOKEN', ''))\n"
    for name in ("torch.py", "json.py", "safetensors.py"):
        (folder / name).write_text(trap)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.chdir(folder)
    seen: list[dict[str, str]] = []
    given = pickles.subprocess.run

    def run(*arguments: Any, **settings: Any) -> Any:
        seen.append(settings["env"])
        return given(*arguments, **settings)

    monkeypatch.setattr(pickles.subprocess, "run", run)
    assert convert(folder, tmp_path / "out").code == 0
    assert not canary.exists()
    assert seen
    assert all("HF_TOKEN" not in environment for environment in seen)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = qwen1.copy(PICKLED, tmp_path / "base")
    second = folder / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(second, weights_only=True) | {"transformer.wte.weight": torch.zeros(256, 128)}
    torch.save(tensors, second)
    said = convert(folder, tmp_path / "out")
    assert said.code == 4
    assert "transformer.wte.weight lies in model-00001-of-00002.safetensors too" in said.err


def test_the_index_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = qwen1.copy(PICKLED, tmp_path / "base")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "../../evil.bin"}}')
    assert "'../../evil.bin', which is no shard of this folder" in convert(folder, tmp_path / "out").err


def test_faults_of_the_tensors_name_the_source(tmp_path: Path) -> None:
    folder = qwen1.copy(PICKLED, tmp_path / "base")
    second = folder / "pytorch_model-00002-of-00002.bin"
    tensors = torch.load(second, weights_only=True)
    tensors.pop("lm_head.weight")
    torch.save(tensors, second)
    said = convert(folder, tmp_path / "out")
    assert said.code == 4
    assert "lm_head.weight is missing" in said.err
    assert str(folder) in said.err


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = qwen1.copy(PICKLED, tmp_path / "base")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    said = convert(folder, tmp_path / "out")
    assert said.code == 4
    assert "pytorch_model-00002-of-00002.bin: this shard is missing" in said.err
    (folder / "pytorch_model.bin.index.json").write_text("{")
    assert "the shard index cannot be read" in convert(folder, tmp_path / "out").err


def test_training_from_pickles_names_the_converter(work: Path) -> None:
    import shutil

    shutil.rmtree(work / "base")
    qwen1.copy(PICKLED, work / "base")
    said = runs.finetune("plan", "r.yaml")
    assert said.code == 4
    assert "which can run code" in said.err
    assert "finetune convert" in said.err
