"""What a merge begins with: a run, or an adapter folder of ours or of another program."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import trained
from finetune.errors import ModelError
from tests import runs
from tests.runs import MERGED, OUTPUT, awake, finetune, merge_run

BARE = Path("bare")
IDS = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])


def merge(*options: str, folder: Path = BARE, out: str = "out") -> runs.Said:
    return finetune("merge", str(folder), "--out", out, *options)


def note(out: str = "out") -> dict[str, Any]:
    made: dict[str, Any] = json.loads(Path(out, "finetune.json").read_text())
    return made


def foreign(**fields: Any) -> None:
    """An adapter as PEFT writes it, that knows nothing of quantisation."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    made = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **fields))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves the head too
        made.save_pretrained(BARE)


def logits(folder: str, adapter: Path | None = None) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter)))(IDS).logits


def test_our_adapter_alone_merges_as_its_run_does(finished: Path) -> None:
    """The folder says what its base was held as, and which base it was."""
    awake(OUTPUT / "adapter")
    shutil.copytree(OUTPUT / "adapter", BARE)
    assert merge_run("--base", "replayed").code == 0
    shutil.rmtree("runs")
    said = merge("--base", "replayed")
    assert (said.code, said.err) == (0, "")
    assert load_file("out/model.safetensors").keys() == load_file(MERGED / "model.safetensors").keys()
    assert Path("out/model.safetensors").read_bytes() == (MERGED / "model.safetensors").read_bytes()
    assert note()["quantised_as"] == "nf4"
    assert (note()["base"], note()["adapter_sha256"]) == (note("merged")["base"], note("merged")["adapter_sha256"])


def test_an_adapter_of_peft_merges_as_peft_does(work: Path) -> None:
    foreign(target_modules=["q_proj", "down_proj"], use_rslora=True)
    said = merge()
    assert (said.code, said.err) == (0, "")
    assert (note()["base_choice"], note()["quantised_as"], note()["choices"]) == ("replayed", "bf16", {})
    wanted = logits("base", BARE)
    apart, effect = ((logits(folder) - wanted).abs().mean() for folder in ("out", "base"))
    assert float(apart) < 0.05 * float(effect)  # what rounding to bf16 does, and what the adapter does


def test_what_an_adapter_does_not_say_can_be_said(work: Path, build_tiny: Callable[..., Path]) -> None:
    shutil.rmtree("base")
    build_tiny(Path("base"), dtype="float32")
    foreign(target_modules=["q_proj"])
    config = json.loads((BARE / "adapter_config.json").read_text())
    (BARE / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    said = merge()
    assert said.code == 4
    assert "this adapter names no base" in said.err
    said = merge("--model", "base", "--quantised-as", "nf4", "--rows", "eval.jsonl")
    assert (said.code, said.err) == (0, "")
    assert set(note()["choices"]) == {"live", "replayed", "original"}
    assert note()["quantised_as"] == ("nf4" if note()["base_choice"] == "replayed" else None)


def test_what_is_not_what_it_belongs_to_is_refused(finished: Path) -> None:
    shutil.copytree(OUTPUT / "adapter", BARE)
    assert "--rows" in merge("--rows", "nowhere.jsonl").err or merge("--rows", "nowhere.jsonl").code == 3
    weights = load_file("base/model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    said = merge()
    assert said.code == 4
    assert "the base is not the one that this adapter was trained on" in said.err
    assert merge("--model", "no/such").code == 4
    assert not Path("out").exists()


def test_a_merged_model_is_not_merged_again(finished: Path) -> None:
    assert merge_run().code == 0
    said = merge(folder=MERGED)
    assert said.code == 4
    assert f"the adapter {runs.adapter_digest()[:12]} is merged into it already" in said.err
    assert "this is a model, not an adapter" in merge(folder=Path("base")).err
    said = merge("--quantised-as", "fp4", folder=OUTPUT)
    assert "quantised-as is for a bare adapter" in said.err
    assert not Path("out").exists()


def test_the_probes_fit_every_base(work: Path) -> None:
    from finetune import base as bases

    rows = trained.rows_for(bases.inspect(Path("base")), None)
    assert len(rows) == 6
    assert all(sum(row.supervised) == len(row.ids) - 1 for row in rows)
    Path("long.jsonl").write_text(json.dumps(runs.chat("x" * 5000, "y")) + "\n")
    with pytest.raises(ModelError, match="no row fits"):
        trained.rows_for(bases.inspect(Path("base")), Path("long.jsonl"))


@pytest.mark.parametrize("method", ["IA3", "LoHa", "OFT"])
@pytest.mark.parametrize("quantised_as", [None, "nf4"])
def test_any_other_method_is_merged_by_peft(
    work: Path, build_tiny: Callable[..., Path], method: str, quantised_as: Any
) -> None:
    """The whole model in memory, and the same proof."""
    import peft
    from transformers import AutoModelForCausalLM

    shutil.rmtree("base")
    build_tiny(Path("base"), dtype="float32", max_shard_size="100KB")
    torch.manual_seed(5)
    fields: dict[str, Any] = {
        "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        "LoHa": {"target_modules": ["q_proj", "v_proj"], "r": 4},
        "OFT": {"target_modules": ["q_proj"], "oft_block_size": 16},
    }[method]
    plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    made = peft.get_peft_model(plain, getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for value in made.parameters():
            if value.requires_grad:
                value.add_(torch.randn(value.shape) * 0.05)
    made.save_pretrained(BARE)
    options = ("--quantised-as", quantised_as) if quantised_as else ()
    said = merge(*options)
    assert (said.code, said.err) == (0, "")
    assert "is merged by PEFT itself: the whole model in memory" in said.out
    if not quantised_as:
        wanted = logits("base", BARE)
        assert float((logits("out") - wanted).abs().max()) < 1e-4
        assert float((logits("base") - wanted).abs().max()) > 1e-2


def test_what_the_fold_cannot_carry_goes_through_peft(work: Path, build_tiny: Callable[..., Path]) -> None:
    """Trained biases, a head that PEFT saved with its update: no pair of matrices, and a merge all the same."""
    shutil.rmtree("base")
    build_tiny(Path("base"), dtype="float32", attention_bias=True, family="llama")
    for fields in ({"bias": "all", "target_modules": ["q_proj"]}, {"target_modules": ["q_proj", "lm_head"]}):
        shutil.rmtree(BARE, ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        foreign(**fields)
        said = merge()
        assert said.code == 0, said.err
        wanted = logits("base", BARE)
        assert float((logits("out") - wanted).abs().max()) < 1e-4 < float((logits("base") - wanted).abs().max())
    assert "is merged by PEFT itself" in said.out


def test_a_damaged_adapter_is_named_before_it_is_merged(finished: Path) -> None:
    """Its proof could not see it: both sides of the comparison would have the damage."""
    shutil.copytree(OUTPUT / "adapter", BARE)
    path = BARE / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "adapter_model.safetensors is damaged" in merge().err
    (BARE / "manifest.json").unlink()
    config = BARE / "adapter_config.json"
    whole = json.loads(config.read_text())
    for change, what in (
        ({"lora_alpha": 1e30}, "alpha or the weights are damaged"),
        ({"r": 0}, "PEFT cannot attach it"),
        ({"r": None}, "PEFT cannot attach it"),
        ({"peft_type": "NOPE"}, "PEFT does not load this adapter"),
    ):
        config.write_text(json.dumps(whole | change))
        said = merge()
        assert said.code == 4, change
        assert what in said.err
    path.rename(BARE / "adapter_model.bin")
    assert "its weights are pickled" in merge().err
    assert {entry.name for entry in Path().iterdir() if entry.name.startswith("out")} == set()


def test_options_of_several_runs_are_refused_for_one(finished: Path) -> None:
    said = finetune("merge", str(OUTPUT), "--out", "out", "--density", "0.5")
    assert said.code == 2
    Path("out").symlink_to("nowhere")
    said = finetune("merge", str(OUTPUT), "--out", "out")
    assert said.code == 5
    assert "something is there already" in said.err
