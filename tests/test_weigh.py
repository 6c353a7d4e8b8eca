"""Weighted sums of adapters: ``linear`` is exact, every other word is what PEFT's own arithmetic gives on a model."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune import adapter_file, model, weigh
from finetune import base as bases
from finetune.adapter_file import Adapter, Update
from finetune.errors import ModelError, RecipeError
from finetune.weigh import Options
from tests import tiny

SHARES = (0.7, -0.4)
PLAIN: dict[str, Any] = {}
OTHER: dict[str, Any] = {"lora_alpha": 3}
ODD: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"q_proj": 3, "model.layers.1.mlp.up_proj": 5},
    "alpha_pattern": {"v_proj": 12, "layers.0.self_attn.o_proj": 2.5},
    "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "lm_head"],
}
FIRST_LAYER: dict[str, Any] = {"target_modules": r".*layers\.0\.self_attn\.[qk]_proj"}
Fields = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def plain_base(tiny_base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return lambda: AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)


@pytest.fixture
def adapters(tmp_path: Path, tiny_base: Path) -> Any:
    """Adapters with these fields, awake, each in a folder of its own."""

    def make(*kinds: dict[str, Any]) -> list[Path]:
        folders = []
        for index, fields in enumerate(kinds):
            policy = tiny.adapt(tiny.load(tiny_base), seed=10 * index, **fields)
            folders.append(tmp_path / f"part{index}")
            write(folders[-1], model.adapter_config(policy.model, "tiny"), model.adapter_weights(policy.model))
        return folders

    return make


def write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def read(folders: list[Path]) -> list[Adapter]:
    return [adapter_file.read(folder)[0] for folder in folders]


def weighed(folders: list[Path], **options: Any) -> weigh.Weighed:
    return weigh.weigh(read(folders), SHARES[: len(folders)], Options(**options), lambda done, of: None)


def changes(wrapped: Any, name: str) -> dict[str, torch.Tensor]:
    """PEFT's own ΔW of each module."""
    found = {}
    for module, layer in wrapped.get_base_model().named_modules():
        if name in getattr(layer, "lora_A", {}):
            found[module] = layer.get_delta_weight(name).detach()
    return found


def loaded(base: Any, folder: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    return changes(PeftModel.from_pretrained(base, str(folder)), "default")


def together(base: Any, folders: list[Path]) -> Any:
    """A whole model with all the adapters on it."""
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(base, str(folders[0]), adapter_name="part0")
    for index, folder in enumerate(folders[1:], start=1):
        wrapped.load_adapter(str(folder), adapter_name=f"part{index}")
    return wrapped


def delta(update: Update) -> torch.Tensor:
    return update.scale * update.b @ update.a


def wanted(base: Any, folders: list[Path]) -> dict[str, torch.Tensor]:
    """Σ w ΔW of what PEFT itself reads from the folders, in fp64."""
    total: dict[str, torch.Tensor] = {}
    for folder, share in zip(folders, SHARES, strict=False):
        for module, change in loaded(base(), folder).items():
            total[module] = total.get(module, torch.zeros(())) + share * change.double()
    return total


@pytest.mark.parametrize("kinds", [(PLAIN, OTHER), (PLAIN, ODD), (ODD, FIRST_LAYER), (ODD, {**ODD, "lora_alpha": 1})])
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_linear_is_the_weighted_sum(
    kinds: Fields, method: str, adapters: Any, plain_base: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """Written, loaded by PEFT and asked for ΔW: equal and unequal ranks, rsLoRA, patterns, other targets."""
    folders = adapters(*kinds)
    write(tmp_path / "out", *weighed(folders, method=method).peft(bases.inspect(tiny_base).tensors, "tiny"))
    found, total = loaded(plain_base(), tmp_path / "out"), wanted(plain_base, folders)
    assert set(found) == set(total)
    for module, change in total.items():
        assert tiny.distance(found[module], change) < 1e-6, module


def test_peft_linear_is_another_thing(adapters: Any, plain_base: Any) -> None:
    """Why the word means ``cat`` here: cross terms between one run's A and the other's B."""
    folders = adapters(PLAIN, OTHER)
    wrapped = together(plain_base(), folders)
    wrapped.add_weighted_adapter(["part0", "part1"], list(SHARES), "sum", "linear")
    found, total = changes(wrapped, "sum"), wanted(plain_base, folders)
    assert min(tiny.distance(found[module], total[module]) for module in total) > 0.2


@pytest.mark.parametrize(
    "method", [word for word in weigh.METHODS if word not in ("linear", "cat") and "dare" not in word]
)
@pytest.mark.parametrize("kinds", [(PLAIN, OTHER), (OTHER, {"target_modules": ["q_proj", "o_proj"]})])
def test_the_other_words_are_pefts(method: str, kinds: Fields, adapters: Any, plain_base: Any) -> None:
    """On a whole model, also where a module has one of the adapters only."""
    folders = adapters(*kinds)
    more = {} if method == "svd" else {"density": 0.4}
    made = weighed(folders, method=method, **more)
    wrapped = together(plain_base(), folders)
    wrapped.add_weighted_adapter(["part0", "part1"], list(SHARES), "sum", method, **more)
    found = changes(wrapped, "sum")
    assert made.method == method
    assert set(found) == set(made.updates)
    for module, change in found.items():
        assert tiny.distance(delta(made.updates[module]), change) < 1e-5, module
        assert made.updates[module].rank == 4


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_pefts_with_the_module_s_own_seed(
    method: str, adapters: Any, plain_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.v_proj"
    folders = adapters({"target_modules": [name]}, {"target_modules": [name], "lora_alpha": 3})
    seeds: list[int] = []
    real = torch.default_generator.manual_seed

    class Watched:
        def manual_seed(self, seed: int) -> None:
            seeds.append(seed)
            real(seed)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "default_generator", Watched())
        made = weighed(folders, method=method, density=0.6, seed=5)
    wrapped = together(plain_base(), folders)
    torch.manual_seed(seeds[0])
    wrapped.add_weighted_adapter(["part0", "part1"], list(SHARES), "sum", method, density=0.6)
    assert tiny.distance(delta(made.updates[name]), changes(wrapped, "sum")[name]) < 1e-5


def test_masks_hang_on_the_seed_alone(adapters: Any) -> None:
    folders = adapters(PLAIN, OTHER)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = weighed(folders, method="dare_ties", seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(9)
    again, other = weighed(folders, method="dare_ties", seed=7), weighed(folders, method="dare_ties", seed=8)
    for module, update in first.updates.items():
        assert torch.equal(update.a, again.updates[module].a)
        assert torch.equal(update.b, again.updates[module].b)
        assert not torch.equal(update.a, other.updates[module].a)
    masks = [first.updates[f"model.layers.{layer}.self_attn.q_proj"].a == 0 for layer in (0, 1)]
    assert not torch.equal(*masks)  # each module has its own draw


def test_unequal_ranks_take_the_svd_form(adapters: Any, tiny_base: Path, tmp_path: Path, plain_base: Any) -> None:
    folders = adapters(PLAIN, ODD)
    made = weighed(folders, method="ties", density=0.4)
    assert made.method == "ties_svd"
    asked = weighed(folders, method="ties_svd", density=0.4)
    assert all(torch.equal(made.updates[module].a, update.a) for module, update in asked.updates.items())
    assert made.updates["model.layers.0.self_attn.v_proj"].rank == 8
    assert made.updates["model.layers.0.self_attn.k_proj"].rank == 4  # the first alone has it
    write(tmp_path / "out", *made.peft(bases.inspect(tiny_base).tensors, "tiny"))
    for module, change in loaded(plain_base(), tmp_path / "out").items():
        torch.testing.assert_close(change, delta(made.updates[module]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["svd", "ties_svd", "dare_ties_svd"])
def test_a_rank_is_kept_to(method: str, adapters: Any, tiny_base: Path, tmp_path: Path, plain_base: Any) -> None:
    """Also one beyond what a matrix has: 32 rows have no rank of 40."""
    folders = adapters(PLAIN, ODD)
    assert {update.rank for update in weighed(folders, method=method, rank=2).updates.values()} == {2}
    made = weighed(folders, method=method, rank=40)
    assert made.updates["model.layers.0.self_attn.k_proj"].rank <= 32
    write(tmp_path / "out", *made.peft(bases.inspect(tiny_base).tensors, "tiny"))
    found = loaded(plain_base(), tmp_path / "out")
    if method == "svd":  # and at full rank nothing is lost
        for module, change in wanted(plain_base, folders).items():
            assert tiny.distance(found[module], change) < 1e-5


def test_all_may_be_kept(adapters: Any) -> None:
    """A density of 1 is TIES' election of signs alone; PEFT's warning is no fault."""
    folders = adapters(PLAIN, OTHER)
    assert weighed(folders, method="ties", density=1.0).method == "ties"
    assert weigh.density(Options(method="ties")) == weigh.DENSITY


def test_targets_are_short_where_they_say_the_same(adapters: Any, tiny_base: Path) -> None:
    tensors = bases.inspect(tiny_base).tensors
    config, _ = weighed(adapters(PLAIN, OTHER)).peft(tensors, "tiny")
    assert config["target_modules"] == sorted(tiny.FIELDS["target_modules"])
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (8, 8, {}, False)


def test_whole_names_where_some_layers_have_none(adapters: Any, tiny_base: Path) -> None:
    config, weights = weighed(adapters(FIRST_LAYER, FIRST_LAYER)).peft(bases.inspect(tiny_base).tensors, "tiny")
    assert config["target_modules"] == [f"model.layers.0.self_attn.{kind}_proj" for kind in "kq"]
    assert len(weights) == 4


def test_a_sum_beyond_fp32_is_refused(adapters: Any) -> None:
    with pytest.raises(ModelError, match="not finite"):
        weigh.weigh(read(adapters(PLAIN, OTHER)), (1e39, 1.0), Options(), lambda done, of: None)


def test_the_words_are_pefts() -> None:
    from peft.tuners.lora import LoraModel

    hints = typing.get_type_hints(LoraModel.add_weighted_adapter)
    assert set(weigh.METHODS) == set(typing.get_args(hints["combination_type"]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "tie"}, ["did you mean 'ties'"]),
        ({"method": "linear", "density": 0.5}, ["linear keeps every value"]),
        ({"method": "ties", "density": 0.0, "rank": 4}, ["above 0 and at most 1", "use --method ties_svd"]),
        ({"method": "dare_ties", "density": 1.5}, ["above 0"]),
        ({"method": "ties", "density": float("nan")}, ["above 0"]),
        ({"method": "linear", "rank": 4}, ["use --method svd"]),
        ({"method": "svd", "rank": 0}, ["1 or more"]),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Options(**options).check()
    assert len(caught.value.faults) == len(said)
    assert all(word in str(caught.value) for word in said)


@pytest.mark.parametrize("method", weigh.METHODS)
def test_options_that_can(method: str) -> None:
    Options(method=method, density=None if method in weigh.EXACT else 0.3).check()
    Options(method=method, rank=3 if method.endswith("svd") else None).check()
