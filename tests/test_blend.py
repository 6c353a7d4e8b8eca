"""A weighted merge of runs: a folder that PEFT loads, whole or not there, and each run's loss before and after."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import blend, checkpoint, evaluate, finished, manifest, model
from finetune.errors import DataError, EnvironmentFault, FinetuneError, ModelError, RecipeError
from finetune.terminal import Terminal
from finetune.weigh import Options
from tests import runs
from tests.runs import awake

A, B, OUT = Path("runs/a"), Path("runs/b"), Path("out")
SHORT = ("train.steps=1", "train.save_every=1")
RUNS = {
    "a": (),
    "b": ("train.seed=4", "adapter.r=8", "adapter.use_rslora=true", "data.eval_path=other.jsonl"),
    "dora": (*SHORT, "adapter.use_dora=true", "quantize.weights=fp32"),
    "whole": (*SHORT, "adapter.modules_to_save=[lm_head]", "model=base-two"),
    "rows": (*SHORT, 'trainable_tokens=["<|im_end|>"]'),
    "bare": (*SHORT, "data.eval_path=null"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, build_tiny: Callable[..., Path]) -> Path:
    """Five finished runs, four of them on one base."""
    folder = tmp_path_factory.mktemp("blend") / "work"
    runs.furnish(folder)
    shutil.copytree(tiny_base, folder / "base")
    build_tiny(folder / "base-two", seed=1)
    runs.write_rows(folder / "other.jsonl", [runs.chat(f"And {n}?", f"no {n}") for n in range(5)])
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, overrides in RUNS.items():
            said = runs.train(f"output=runs/{name}", "evaluate.metrics=[loss]", *overrides)
            assert said.code == 0, said.err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workplace as the working folder."""
    shutil.copytree(workplace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def go(*given: str, out: Path = OUT, **options: Any) -> tuple[dict[str, Any], str]:
    """The record, and what was said."""
    said = io.StringIO()
    note = blend.blend(blend.parse(given), out, Terminal(said, quiet=True), Options(**options))
    return note, said.getvalue()


def refused(*given: str, kind: type[FinetuneError] = ModelError) -> list[str]:
    """The faults of a merge that must write nothing."""
    before = runs.snapshot(Path())
    with pytest.raises(FinetuneError) as caught:
        go(*given)
    assert type(caught.value) is kind
    assert runs.snapshot(Path()) == before
    return [f"{fault.where}: {fault.what}; {fault.fix}" for fault in caught.value.faults]


def own_loss(run: Path, adapter: Path) -> float:
    """The run's held-out rows, judged with an adapter on a base of its own."""
    prepared, files = finished.open_run(run, Terminal(io.StringIO(), quiet=True))
    this, _ = finished.live(prepared, files, Terminal(io.StringIO(), quiet=True))
    policy = model.attach_saved(model.load_base(this.base, this.form()), adapter)
    how = evaluate.How(
        metrics=["loss"], max_new_tokens=1, batch_rows=1, micro_batch_tokens=this.how().micro_batch_tokens
    )
    assert prepared.held_out is not None
    return float(evaluate.judge(policy, prepared.held_out, how, progress=lambda *_: None).scores["loss"])


def test_the_folder_is_a_plain_adapter(here: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = runs.snapshot(here / "runs")
    note, said = go("runs/a:0.7", "runs/b:0.3")
    assert runs.snapshot(here / "runs") == before
    assert manifest.faults(OUT) == []
    names = {path.name for path in OUT.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "blend.json",
        "manifest.json",
    } <= names
    assert json.loads((OUT / "blend.json").read_text()) == note
    assert (note["method"], note["rank"], note["density"], note["seed"]) == ("linear", 12, None, None)
    assert [part["adapter_sha256"] for part in note["parts"]] == [runs.adapter_digest(A), runs.adapter_digest(B)]
    assert "14 modules of rank 12, the exact weighted sum" in said
    AutoTokenizer.from_pretrained(OUT)
    total: dict[str, torch.Tensor] = {}
    for folder, share in ((A / "adapter", 0.7), (B / "adapter", 0.3), (OUT, -1.0)):
        plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
        wrapped = PeftModel.from_pretrained(plain, str(folder))
        for module, layer in wrapped.get_base_model().named_modules():
            if hasattr(layer, "lora_A"):
                change = layer.get_delta_weight("default").detach().double()
                total[module] = total.get(module, torch.zeros(())) + share * change
    assert max(float(rest.abs().max()) for rest in total.values()) < 1e-6


def test_the_table_is_what_evaluate_says(here: Path) -> None:
    note, said = go("runs/a:0.7", "runs/b:0.3", method="ties")
    assert note["method"] == "ties_svd"
    for part, run, rows in zip(note["parts"], (A, B), (4, 5), strict=True):
        stored = json.loads((run / "scores.json").read_text())
        assert part["rows"] == rows
        assert part["base"] == stored["before"]["loss"]
        assert part["before"] == pytest.approx(stored["after"]["loss"], abs=1e-6)
        assert part["after"] == pytest.approx(own_loss(run, OUT), abs=1e-6)
        assert part["difference"] == part["after"] - part["before"]
        assert part["after"] != part["before"]
        assert f"{part['before']:.4f}" in said
        assert f"{part['after']:.4f}" in said
        assert f"{part['difference']:+.4f}" in said
    assert "the ranks differ: ties is done as ties_svd" in said
    assert "density 0.5" in said
    assert "ties divides" in said


def test_the_same_command_gives_the_same_bytes(here: Path) -> None:
    for out, seed in (("one", 3), ("two", 3), ("three", 4)):
        torch.rand(5)
        note, _ = go("runs/a:1", "runs/b:1", out=Path(out), method="dare_ties", seed=seed, density=0.7)
        assert (note["seed"], note["density"]) == (seed, 0.7)
    one, two, three = (Path(name, "adapter_model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_the_written_adapter_folds_into_the_base(here: Path) -> None:
    """Its keys and config are those that ``merge`` reads: every tensor has its place and its scale."""
    from finetune import base as bases
    from finetune import merge
    from finetune.loading import BaseForm

    go("runs/a:0.7", "runs/b:-0.3")
    made, base = checkpoint.read_adapter(OUT), bases.inspect(Path("base"))
    form = BaseForm(weights="nf4", double=True, compute="fp32", device="cpu")
    plan = merge.make_plan(base, form, made.weights, made.config, replayed=False)
    folds = [fold for fold in plan.folds.values() if fold.lora_a]
    assert [fold.scaling for fold in folds] == [1.0] * 14


def test_everything_wrong_comes_at_once(here: Path) -> None:
    found = "\n".join(refused("runs/a:1", "runs/dora:1", "runs/whole:1", "runs/none:1"))
    assert len(found.splitlines()) == 5
    assert "runs/dora: DoRA's lengths cannot be added" in found
    assert "runs/dora: its base was held as fp32, computed in fp32, that of runs/a as nf4" in found
    assert "runs/whole: lm_head was trained whole" in found
    assert "runs/whole: its base is not that of runs/a" in found
    assert "runs/none: this is not a run folder" in found


def test_a_merged_folder_is_no_run(here: Path) -> None:
    go("runs/a:1", "runs/b:1", out=Path("sum"))
    Path("merged").mkdir()
    Path("merged/config.json").write_text("{}")
    found = refused("sum:1", "merged:1")
    assert found[0].startswith("sum: this is a weighted merge already")
    assert found[1].startswith("merged: this is a merged model, without its adapter")


def test_trained_rows_are_summed_as_the_updates_are(here: Path) -> None:
    """base + Σ w (row - base), which PEFT's arithmetic leaves out without a word; PEFT and a merge then read them."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    awake(Path("runs/rows/adapter"))
    _, said = go("runs/a:0.7", "runs/rows:0.25")
    assert "trained rows of" in said
    made, own = (load_file(folder / "adapter_model.safetensors") for folder in (OUT, Path("runs/rows/adapter")))
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    (token,) = json.loads((OUT / "adapter_config.json").read_text())["trainable_token_indices"]["lm_head"]
    for matrix in ("model.embed_tokens", "lm_head"):
        key = f"base_model.model.{matrix}.token_adapter.trainable_tokens_delta"
        before = base.get_submodule(matrix).weight[token]
        wanted = before + 0.25 * (own[key][0] - before)
        assert torch.allclose(made[key][0], wanted, atol=1e-6)
        assert not torch.allclose(wanted, before, atol=1e-3)
    assert PeftModel.from_pretrained(base, str(OUT)).peft_config["default"].trainable_token_indices
    assert runs.finetune("merge", str(OUT), "--out", "merged").code == 0
    with pytest.raises(ModelError, match=r"rows of embedding and head were trained, of which ties says nothing"):
        go("runs/a:0.7", "runs/rows:0.25", out=Path("other"), method="ties")


def test_another_method_is_refused(here: Path) -> None:
    config = A / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LOHA"}))
    manifest.write(A / "adapter", manifest.digests(A / "adapter"))
    assert "runs/a: LOHA has no weighted merge" in refused("runs/a:1", "runs/b:1")[0]


def test_changed_data_and_damaged_adapters_are_named(here: Path) -> None:
    with Path("other.jsonl").open("a") as file:
        file.write("\n")
    with (A / "adapter" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x42")
    found = refused("runs/a:1", "runs/b:1")
    assert len(found) == 2
    assert "damaged" in found[0]
    assert "other.jsonl" in found[1]
    assert "other.jsonl" in refused("runs/b:1", "runs/a:1", kind=DataError)[0]


def test_what_is_there_is_kept(here: Path) -> None:
    OUT.mkdir()
    (OUT / "thesis.doc").write_text("years")
    assert "something is there already" in refused("runs/a:1", "runs/b:1", kind=EnvironmentFault)[0]
    shutil.rmtree(OUT)
    OUT.symlink_to("nowhere")
    with pytest.raises(EnvironmentFault, match="something is there"):
        go("runs/a:1", "runs/b:1")
    assert OUT.is_symlink()


@pytest.mark.parametrize("moment", ["write_synced", "_losses", "manifest.write"])
def test_cut_short_it_leaves_nothing(moment: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = runs.snapshot(here)
    with monkeypatch.context() as patch:
        patch.setattr(f"finetune.blend.{moment}", stop)
        with pytest.raises(KeyboardInterrupt):
            go("runs/a:1", "runs/b:1")
    assert runs.snapshot(here) == before
    assert not list(here.glob("out*"))


def test_leftovers_of_a_killed_merge_are_cleared(here: Path) -> None:
    Path("out.tmp-1").mkdir()
    Path("out.tmp-1/adapter_model.safetensors").write_bytes(b"half")
    go("runs/a:1", "runs/b:1")
    assert not Path("out.tmp-1").exists()


def test_without_held_out_rows_nothing_is_measured(here: Path) -> None:
    shutil.copytree("runs/bare", "runs/bare-too")
    note, said = go("runs/bare:1", "runs/bare-too:1")
    assert [part["rows"] for part in note["parts"]] == [0, 0]
    assert "what the merge lost is not measured" in said
    shutil.rmtree(OUT)
    note, _ = go("runs/bare:1", "runs/a:1")
    assert [part["rows"] for part in note["parts"]] == [0, 4]
    assert "difference" in note["parts"][1]
    assert blend.table(note["parts"])[1].split() == ["runs/bare", "1", "-", "-", "-", "-", "0"]


def test_a_loss_that_is_no_number_is_refused(here: Path) -> None:
    assert "give smaller weights" in refused("runs/a:1e30", "runs/b:1")[0]


def test_words() -> None:
    parts = blend.parse(["runs/a:0.7", "odd:name/b:-3e-1"])
    assert parts == [blend.Part(Path("runs/a"), 0.7), blend.Part(Path("odd:name/b"), -0.3)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["runs/a", "runs/b"], ["give each run a weight: runs/a:0.7 runs/b:0.3"] * 2),
        (["runs/a:", "runs/b:much", ":0.5"], ["has no weight"] * 3),
        (["runs/a:0", "runs/b:inf", "runs/c:nan", "runs/d:1"], ["says nothing", "says nothing", "has no weight"]),
        (["runs/a:0.5", "runs/../runs/a:0.5"], ["named twice"]),
        (["runs/a:0.5"], ["needs several runs"]),
        ([], ["needs several runs"]),
    ],
)
def test_words_that_cannot_be(given: list[str], said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        blend.parse(given)
    assert len(caught.value.faults) == len(said)
    assert all(word in str(fault) for word, fault in zip(said, caught.value.faults, strict=True))
