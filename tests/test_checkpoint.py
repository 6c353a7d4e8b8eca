from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import checkpoint, loop
from finetune.checkpoint import ADAPTER, CONFIG, OPTIMIZER, STATE, Checkpoint
from finetune.errors import ModelError
from finetune.manifest import NAME as MANIFEST
from tests import tiny


def state(step: int, **changes: Any) -> Checkpoint:
    plain: dict[str, Any] = {
        "step": step,
        "weights": {"a": torch.full((2, 3), float(step)), "b": torch.arange(4, dtype=torch.float32)},
        "config": {"peft_type": "LORA", "r": 4, "target_modules": ["k_proj", "q_proj"]},
        "moments": {"a|exp_avg": torch.ones(2, 3), "a|step": torch.tensor(float(step))},
        "scaler": {"scale": 65536.0, "_growth_tracker": step},
    }
    return Checkpoint(**(plain | changes))


def equal(one: Checkpoint, two: Checkpoint) -> bool:
    plain = (one.step, one.config, one.scaler) == (two.step, two.config, two.scaler)
    return plain and tiny.same(one.weights, two.weights) and tiny.same(one.moments, two.moments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def silent(text: str) -> None:
    pytest.fail(f"said {text!r}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_what_was_saved_is_read(folder: Path) -> None:
    assert checkpoint.newest(folder, silent) is None
    path = checkpoint.save(folder, state(12), 2)
    assert path == folder / "step-00000012"
    assert names(path) == sorted([ADAPTER, CONFIG, OPTIMIZER, STATE, MANIFEST])
    found = checkpoint.newest(folder, silent)
    assert found is not None
    assert equal(found, state(12))


def test_the_newest_is_the_highest_step_and_not_the_last_name(folder: Path) -> None:
    for step in (7, 99_999_999, 123_456_789):
        checkpoint.save(folder, state(step), 10)
    (folder / checkpoint.folder_name(7)).touch()
    found = checkpoint.newest(folder, silent)
    assert found is not None
    assert found.step == 123_456_789


def test_steps_beyond_the_saved_one_go(folder: Path) -> None:
    """A run that stands before them has passed them over as damaged."""
    for step in (1, 2, 3, 4):
        checkpoint.save(folder, state(step), 10)
    checkpoint.save(folder, state(2), 10)
    assert names(folder) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_last_ones_are_kept(folder: Path, keep: int) -> None:
    (folder / "notes").mkdir()
    for step in range(1, 6):
        checkpoint.save(folder, state(step), keep)
        first = max(1, step - keep + 1)
        assert names(folder) == ["notes"] + [checkpoint.folder_name(s) for s in range(first, step + 1)]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    checkpoint.save(folder, state(3), 2)
    other = state(3, weights={"a": torch.zeros(1)})
    checkpoint.save(folder, other, 2)
    found = checkpoint.newest(folder, silent)
    assert found is not None
    assert equal(found, other)
    assert names(folder) == ["step-00000003"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", [ADAPTER, CONFIG, OPTIMIZER, STATE, MANIFEST])
@pytest.mark.parametrize("damage", [flip, truncate, empty, longer, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_passed_over(folder: Path, damage: Callable[[Path], None], name: str) -> None:
    for step in (1, 2, 3):
        checkpoint.save(folder, state(step), 3)
    harmless = name == MANIFEST and damage in (truncate, longer)  # its last byte is a newline: the JSON still holds
    damage(folder / "step-00000003" / name)
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    assert found is not None
    assert equal(found, state(3 if harmless else 2))
    assert len(said) == (0 if harmless else 1)
    # A digest that was altered in the manifest is told as the damage of the file that it stands for.
    told = "step-00000003" if name == MANIFEST else f"step-00000003/{name}"
    assert all(text.startswith("checkpoint step-00000003 is passed over: ") and told in text for text in said)


def test_every_single_bit_of_a_small_file_counts(folder: Path) -> None:
    checkpoint.save(folder, state(1), 3)
    path = checkpoint.save(folder, state(2), 3) / STATE
    whole = path.read_bytes()
    for place in range(len(whole) * 8):
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        found = checkpoint.newest(folder, lambda _: None)
        assert found is not None
        assert found.step == 1


@pytest.mark.parametrize("name", ["more.txt", "pytorch_model.bin", ".hidden"])
def test_an_additional_file_is_damage(folder: Path, name: str) -> None:
    checkpoint.save(folder, state(1), 3)
    checkpoint.save(folder, state(2), 3)
    (folder / "step-00000002" / name).write_text("x")
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    assert found is not None
    assert found.step == 1
    assert said == [f"checkpoint step-00000002 is passed over: step-00000002/{name} is not in the manifest"]


def test_damage_falls_back_as_far_as_it_must(folder: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(folder, state(step), 3)
    (folder / "step-00000003" / MANIFEST).unlink()
    flip(folder / "step-00000002" / ADAPTER)
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    assert found is not None
    assert found.step == 1
    assert [text.split()[1] for text in said] == ["step-00000003", "step-00000002"]
    flip(folder / "step-00000001" / OPTIMIZER)
    assert checkpoint.newest(folder, said.append) is None


def test_half_written_folders_are_not_checkpoints(folder: Path) -> None:
    checkpoint.save(folder, state(1), 3)
    (folder / "step-00000001").rename(folder / "step-00000009.tmp-123")
    (folder / "step-00000008").write_text("a file")
    assert checkpoint.newest(folder, silent) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_not_written(folder: Path, value: float) -> None:
    checkpoint.save(folder, state(1), 1)
    bad = state(2)
    bad.weights["b"][2] = value
    with pytest.raises(ModelError, match="adapter tensor b is not finite after step 2"):
        checkpoint.save(folder, bad, 1)
    assert names(folder) == ["step-00000001"]
    found = checkpoint.newest(folder, silent)
    assert found is not None
    assert equal(found, state(1))


def test_nothing_is_pickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something was pickled")

    for module, name in [(pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads"), (pickle, "Pickler"),
                         (pickle, "Unpickler"), (torch, "save"), (torch, "load")]:  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    path = checkpoint.save(folder, state(1), 1)
    assert checkpoint.newest(folder, silent) is not None
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            assert load_file(file)
        else:
            assert isinstance(json.loads(file.read_bytes()), dict)


def trained(folder: Path) -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    from finetune.objectives import sft

    policy = tiny.adapt(tiny.load(folder))
    optimizer = tiny.adamw(policy, 0.01)
    list(loop.run(policy, sft, tiny.samples([5, 6]), tiny.course([(0,), (1,)]), optimizer))
    return policy.trainable(), optimizer


def test_optimizer_state_goes_there_and_back(tiny_base: Path, folder: Path) -> None:
    parameters, optimizer = trained(tiny_base)
    moments = checkpoint.optimizer_tensors(optimizer, parameters)
    assert len(moments) == 3 * len(parameters)
    checkpoint.save(folder, state(2, moments=moments), 1)
    saved = checkpoint.newest(folder, silent)
    assert saved is not None
    fresh = torch.optim.AdamW(parameters.values())
    checkpoint.restore_optimizer(fresh, parameters, saved.moments)
    for parameter in parameters.values():
        one, two = optimizer.state[parameter], fresh.state[parameter]
        assert set(one) == set(two) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(one[entry], two[entry]) for entry in one)
        assert float(two["step"]) == 2


def test_saved_moments_are_copies(tiny_base: Path) -> None:
    parameters, optimizer = trained(tiny_base)
    moments = checkpoint.optimizer_tensors(optimizer, parameters)
    before = {name: value.clone() for name, value in moments.items()}
    for entries in optimizer.state.values():
        for value in entries.values():
            value.add_(1)
    assert tiny.same(moments, before)


def test_state_of_other_parameters_is_refused(tiny_base: Path) -> None:
    parameters, optimizer = trained(tiny_base)
    moments = checkpoint.optimizer_tensors(optimizer, parameters)
    moments["stranger|step"] = torch.tensor(1.0)
    with pytest.raises(ModelError, match="the optimizer state has stranger, the adapter has not"):
        checkpoint.restore_optimizer(optimizer, parameters, moments)
