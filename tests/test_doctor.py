"""The doctor: sound installations pass, each planted fault is one line with its mend and exit code 1."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from finetune import conflicts, doctor, hardware
from finetune.doctor import Finding
from tests.conftest import ROOT
from tests.runs import finetune

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing that a runner's environment might say."""
    for name in ("WORLD_SIZE", "HF_TOKEN", "HF_ENDPOINT", *conflicts.LOWERED, *conflicts.ISA):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Other versions of some packages; None: not there."""
    real = metadata.version

    def version(name: str) -> str:
        found = versions.get(name.replace("-", "_"), real(name) if name.replace("-", "_") not in versions else None)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)


def faults() -> dict[str, Finding]:
    return {one.what: one for one in doctor.examine() if one.state == "fault"}


def test_this_installation_is_sound(sound: None) -> None:
    said = finetune("doctor")
    assert (said.code, said.err) == (0, ""), said.out
    for line in (
        "ok     finetune",
        "ok     torch",
        "CPU",
        "memory",
        "runs",
        "hub cache",
        "OMP_NUM_THREADS",
        "extra pii",
    ):
        assert line in said.out
    assert all(line.split()[0] in ("ok", "note") for line in said.out.splitlines())


def test_json_is_one_object(sound: None) -> None:
    said = finetune("doctor", "--json")
    found = json.loads(said.out)
    assert (said.code, found["holds"]) == (0, True)
    assert {tuple(sorted(one)) for one in found["findings"]} == {("fix", "said", "state", "what")}


@pytest.mark.parametrize(
    ("versions", "package", "said", "fix"),
    [
        ({"transformers": "5.16.9"}, "transformers", "5.16.9 is outside", "pip install 'transformers>=5.17'"),
        ({"bitsandbytes": None}, "bitsandbytes", "not installed", "pip install 'bitsandbytes>=0.50'"),
        ({"rensa": "0.4"}, "rensa", "0.4 is outside what the extra data asks for", "pip install 'rensa>=0.5'"),
        ({"transformers": "6.0.1"}, "conflict", "transformers 6.0.1, peft", "<6'"),
        ({"tokenizers": "0.1"}, "tokenizers", "0.1 is outside what transformers asks for", "pip install 'tokenizers"),
    ],
)
def test_a_version_that_does_not_go_is_a_fault(
    sound: None, monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], package: str, said: str, fix: str
) -> None:
    pretend(monkeypatch, **versions)
    found = faults()
    assert said in found[package].said
    assert fix in found[package].fix
    answered = finetune("doctor")
    assert answered.code == 1
    assert sum(line.startswith("fault ") for line in answered.out.splitlines()) == len(found)


@pytest.mark.parametrize(
    ("name", "value", "what", "fix"),
    [
        ("WORLD_SIZE", "2", "WORLD_SIZE", "start `finetune train` alone"),
        ("HF_ENDPOINT", "ftp://x", "HF_ENDPOINT", "https://host"),
        ("HF_TOKEN", "hf_sëcret", "HF_TOKEN", "copy the token again"),
    ],
)
def test_a_variable_that_breaks_a_run_is_a_fault(
    sound: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, what: str, fix: str
) -> None:
    monkeypatch.setenv(name, value)
    assert fix in faults()[what].fix
    assert "sëcret" not in finetune("doctor").out


def test_variables_that_change_bits_or_memory_are_notes(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "4096")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "bf16")
    notes = {one.what: one.said for one in doctor.environment(hardware.detect()) if one.state == "note"}
    assert "bits differ" in notes["ATEN_CPU_CAPABILITY"]
    assert "fewer bits" in notes["ONEDNN_DEFAULT_FPMATH_MODE"]
    assert "would set 128" in notes["LRU_CACHE_CAPACITY"]


def test_a_full_or_closed_disk(sound: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "free_disk", lambda path: int(5e8))
    assert {"runs", "hub cache", "rows' cache"} <= faults().keys()
    monkeypatch.setattr(hardware, "free_disk", lambda path: int(5e9))
    found = {one.what: one for one in doctor.disks()}
    assert (found["runs"].state, found["hub cache"].state) == ("ok", "note")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in faults()["runs"].said


def machine(**changes: Any) -> hardware.Hardware:
    return replace(hardware.detect(), **changes)


def test_cards_as_torch_sees_them(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"name": "Tesla T4", "memory": 16_000_000_000, "capability": [7, 5]}
    monkeypatch.setattr(hardware, "cards", lambda: [card])
    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "550.54")
    found = [str(one) for one in doctor.device(machine(device="cuda", bf16=False))]
    assert "Tesla T4, 16.0 GB, compute capability 7.5, driver 550.54" in found[0]
    assert "fp16 with loss scaling" in found[1]


@pytest.mark.parametrize(("built", "fix"), [(None, "install torch's CUDA build"), ("12.8", "update the driver")])
def test_a_card_that_torch_does_not_see(
    sound: None, monkeypatch: pytest.MonkeyPatch, built: str | None, fix: str
) -> None:
    import torch

    monkeypatch.setattr(hardware, "nvidia_driver", lambda: "550.54")
    monkeypatch.setattr(hardware, "cards", list)
    monkeypatch.setattr(torch.version, "cuda", built)
    (found,) = (one for one in doctor.device(machine(device="cpu")) if one.what == "GPU")
    assert found.state == "fault"
    assert fix in found.fix


def test_a_torch_that_does_not_load_is_told_with_the_rest(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def detect() -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(hardware, "detect", detect)
    said = finetune("doctor")
    assert said.code == 1
    assert "libcudart.so.12" in said.out
    assert "extra data" in said.out


def test_a_containers_bound_is_told(sound: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bound").write_text("1000000\n")
    monkeypatch.setattr(doctor, "_CGROUP", (tmp_path / "none", tmp_path / "bound"))
    assert any("1.0 MB" in one.said for one in doctor.memory(machine(device="cpu")))
    (tmp_path / "bound").write_text("max\n")
    assert len(list(doctor.memory(machine(device="cpu")))) == 1


def test_known_conflicts_hang_on_versions_and_processor(sound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bitsandbytes="0.50.2")
    said = {flag: [one.said for one in doctor.known_conflicts(frozenset({flag}))] for flag in ("avx512_bf16", "avx2")}
    assert any("wrong gradients" in one for one in said["avx512_bf16"])
    assert not any("wrong gradients" in one for one in said["avx2"])


def test_every_extra_of_the_project_is_described() -> None:
    assert conflicts.EXTRAS.keys() == PROJECT["optional-dependencies"].keys()
    bounds = [str(one) for one in doctor.required("gguf")[1]]
    assert bounds == PROJECT["optional-dependencies"]["gguf"]


def test_bounds_of_an_installed_package(sound: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a checkout they come from what pip installed."""
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "finetune" / "doctor.py"))
    python, core = doctor.required()
    assert python == PROJECT["requires-python"]
    assert {"torch", "transformers", "peft"} <= {one.name for one in core}
    assert not any(one.name == "gguf" for one in core)
    assert {one.name for one in doctor.required("gguf")[1]} == {"gguf", "sentencepiece"}
