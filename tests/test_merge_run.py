"""``finetune merge``: a folder that is whole or not there, never made twice, and refused when it is not the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune import base as bases
from finetune import certify, hardware, layouts, manifest, merge
from finetune.errors import ModelError
from finetune.forms import bitsandbytes
from finetune.tokenizer import load_tokenizer
from tests import runs
from tests.runs import MERGED, OUTPUT, awake, finetune, merge_run

Build = Callable[..., Path]


@pytest.mark.parametrize(("compute", "code"), [("bf16", 0), ("fp32", 1)])
def test_rows_that_turn_in_bf16_are_asked_again_in_fp32(work: Path, compute: str, code: int) -> None:
    """The live model's score of before is falsified: in fp32 already there is nothing more exact to ask."""
    assert runs.train(f"quantize.compute={compute}").code == 0
    scores = json.loads((OUTPUT / "scores.json").read_text())
    scores["after"]["exact_match"] = 1.0 - round(scores["after"]["exact_match"])
    (OUTPUT / "scores.json").write_text(json.dumps(scores))
    said = merge_run()
    assert said.code == code, said.err
    assert ("rows apart in bf16" in said.out) == (compute == "bf16")
    assert ("answers 4 of 4 rows differently" in said.err) == (compute == "fp32")


def test_the_merged_folder_is_whole(finished: Path) -> None:
    before = runs.snapshot(finished / "base")
    said = merge_run()
    assert (said.code, said.err) == (0, "")
    assert "proof: mean KL" in said.out
    assert manifest.faults(MERGED) == []
    names = {path.name for path in MERGED.iterdir()}
    assert names == {path.name for path in Path("base").iterdir()} | {"finetune.json", "manifest.json"}
    note = json.loads((MERGED / "finetune.json").read_text())
    assert note["adapter_sha256"] == runs.adapter_digest()
    assert (note["base_choice"], note["quantised_as"], note["folded_tensors"]) == ("replayed", "nf4", 14)
    assert note["base_asked"] == "auto"
    choices = note["choices"]
    assert set(choices) == {"live", "replayed", "original"}
    assert abs(choices["replayed"]["mean_kl"]) < choices["original"]["mean_kl"]
    # what was measured before anything was written is what was then read from the disk
    assert choices["replayed"]["mean_kl"] == pytest.approx(note["proof"]["mean_kl"], abs=1e-9)
    assert choices["replayed"]["loss"] == pytest.approx(choices["live"]["loss"], abs=0.05)
    assert "← taken" in said.out
    assert note["proof"]["holds"]
    assert set(json.loads((OUTPUT / "scores.json").read_text())) == {"before", "after", "merged"}
    assert runs.snapshot(finished / "base") == before


def test_the_merged_model_ends_its_answers(finished: Path) -> None:
    generation = Path("base/generation_config.json")
    tokenizer = load_tokenizer(Path("base"))
    stop, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for given, wanted in ((end, [stop, end]), ([end, stop], [stop, end]), (None, [stop])):
        source = {"eos_token_id": given} if given is not None else {}
        merge_source = finished / "source"
        shutil.rmtree(merge_source, ignore_errors=True)
        shutil.copytree("base", merge_source)
        (merge_source / generation.name).write_text(json.dumps({**source, "temperature": 0.7, "do_sample": True}))
        target = finished / "out"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        layouts.write(bases.inspect(merge_source), target, "native")
        written = json.loads((target / generation.name).read_text())
        assert written == {"eos_token_id": wanted, "temperature": 0.7, "do_sample": True}


def test_the_same_merge_again_changes_nothing(finished: Path) -> None:
    assert merge_run().code == 0
    before = runs.snapshot(MERGED)
    said = merge_run()
    assert (said.code, said.err) == (0, "")
    assert "already: nothing to do" in said.out
    assert runs.snapshot(MERGED) == before
    assert merge_run("--base", "original").code == 5  # another merge in the same place
    assert runs.snapshot(MERGED) == before


def test_the_same_merge_gives_the_same_weights(finished: Path) -> None:
    assert merge_run().code == 0
    assert merge_run(out=Path("again")).code == 0
    assert Path("again/model.safetensors").read_bytes() == (MERGED / "model.safetensors").read_bytes()


def test_other_content_in_the_way_is_kept(finished: Path) -> None:
    MERGED.mkdir()
    (MERGED / "thesis.doc").write_text("years")
    said = merge_run()
    assert said.code == 5
    assert "something is there already" in said.err
    assert (MERGED / "thesis.doc").read_text() == "years"
    shutil.rmtree(MERGED)
    MERGED.write_text("a file")
    assert merge_run().code == 5
    assert MERGED.read_text() == "a file"


def test_a_damaged_merge_is_not_taken_for_done(finished: Path) -> None:
    assert merge_run().code == 0
    with (MERGED / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x42")
    assert merge_run().code == 5


def test_leftovers_of_a_killed_merge_are_cleared(finished: Path) -> None:
    leftover = Path("merged.tmp-1")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert merge_run().code == 0
    assert not leftover.exists()


def test_into_the_published_weights(work: Path) -> None:
    """A 4-bit run moves by design when it is folded into weights that it never saw; a looser bound says nonsense only.

    The quantisation error of a random model is large, so the base here holds values that nf4 keeps nearly.
    """
    weights = load_file("base/model.safetensors")
    for name, value in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = bitsandbytes.replay("nf4", value.float(), double=True).to(value.dtype)
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    assert runs.train().code == 0
    said = merge_run("--base", "original")
    assert said.code == 0, said.err
    note = json.loads((MERGED / "finetune.json").read_text())
    assert (note["base_choice"], note["quantised_as"], note["proof"]["bound"]) == ("original", None, 0.1)
    adapter, config = load_file(OUTPUT / "adapter" / "adapter_model.safetensors"), {"scaling": 2.0}
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    wanted = weights[f"{name}.weight"].float() + config["scaling"] * b @ a
    found = load_file(MERGED / "model.safetensors")[f"{name}.weight"].float()
    step = wanted.abs().clamp(min=2**-126) * 2**-7  # a bf16 step at most: its neighbour on one side or the other
    assert bool(((found - wanted).abs() < step).all())
    assert abs(float((found - wanted).mean())) < 0.05 * float(step.mean())  # as often up as down


@pytest.mark.parametrize("choice", ["replayed", "original"])
def test_a_wrong_fold_is_found_and_cannot_be_used(finished: Path, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    awake(OUTPUT / "adapter")
    real = merge._scaling
    monkeypatch.setattr(merge, "_scaling", lambda *arguments: 5 * real(*arguments))
    said = merge_run("--base", choice)
    assert said.code == 1
    assert said.err.startswith("check failed: merged: the merged model differs: mean KL ")
    assert len(said.err.splitlines()) == 1
    assert not (MERGED / "config.json").exists()
    assert (MERGED / "config.json.unusable").exists()
    assert "merged" not in json.loads((OUTPUT / "scores.json").read_text())
    with pytest.raises(ModelError, match=r"no config\.json"):
        bases.inspect(MERGED)
    assert finetune("chat", str(MERGED)).code == 4
    monkeypatch.undo()
    monkeypatch.chdir(finished)
    assert merge_run("--base", choice).code == 5  # what failed stays to be looked at


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_smaller_errors_are_found_too(finished: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    awake(OUTPUT / "adapter")
    real = merge._scaling
    monkeypatch.setattr(merge, "_scaling", lambda *arguments: factor * real(*arguments))
    assert merge_run().code == 1


def test_a_base_that_is_not_replayed_is_found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S10: the fold goes into weights that the run never saw."""
    monkeypatch.setattr(bitsandbytes, "replay", lambda word, value, **_: value)
    assert merge_run().code == 1


def test_one_flipped_bit_of_the_adapter_is_refused(finished: Path) -> None:
    path = OUTPUT / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    said = merge_run()
    assert said.code == 4
    assert "adapter_model.safetensors is damaged (its digest differs)" in said.err
    assert not MERGED.exists()


def test_another_base_is_refused(finished: Path, build_tiny: Build) -> None:
    shutil.rmtree("base")
    build_tiny(Path("base"), seed=1)  # the same shapes, other weights: PEFT would load it without a word
    said = merge_run()
    assert said.code == 4
    assert "the base is not the one that this run trained on" in said.err
    assert not MERGED.exists()


def test_changed_data_is_refused(finished: Path) -> None:
    with Path("eval.jsonl").open("a") as file:
        file.write(json.dumps(runs.chat("a", "b")) + "\n")
    said = merge_run()
    assert said.code == 3
    assert "eval.jsonl: this file is not the one that the run began with" in said.err


def test_an_unfinished_run_is_refused(finished: Path) -> None:
    (OUTPUT / "finished.json").unlink()
    said = merge_run()
    assert said.code == 4
    assert "this run is not finished" in said.err
    assert finetune("merge", "base", "--out", "merged").code == 4


def test_a_full_disk_is_refused_before_the_work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = hardware.free_disk
    monkeypatch.setattr(hardware, "free_disk", lambda path: 1000 if "merged" in str(path) else real(path))
    said = merge_run()
    assert said.code == 5
    assert "the merged model needs" in said.err
    assert not MERGED.exists()


def test_a_merged_model_that_does_not_fit_is_compared_layer_by_layer(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = merge_run()
    assert whole.code == 0, whole.err
    monkeypatch.setattr(certify, "fits", lambda merged, form: False)
    said = merge_run(out=Path("streamed"))
    assert said.code == 0, said.err
    assert "compared layer by layer, its rows are not scored" in said.out
    notes = [json.loads((folder / "finetune.json").read_text()) for folder in (MERGED, Path("streamed"))]
    assert notes[0]["proof"] == notes[1]["proof"]


def test_a_damaged_or_unusable_merge_is_told(finished: Path) -> None:
    assert merge_run().code == 0
    weights = MERGED / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    said = finetune("chat", str(MERGED))
    assert said.code == 4
    assert "model.safetensors is damaged" in said.err
    said = merge_run()
    assert said.code == 5
    assert "model.safetensors is damaged" in said.err
    (MERGED / "config.json").rename(MERGED / "config.json.unusable")
    assert "did not pass its proof" in finetune("chat", str(MERGED)).err
    assert "did not pass its proof" in merge_run().err


def test_the_published_base_is_corrected_towards_the_quantised_one(finished: Path) -> None:
    """A third row of the table, measured as the others are; nearer to the live model than without."""
    said = merge_run("--correct", "32")
    assert (said.code, said.err) == (0, "")
    note = json.loads((MERGED / "finetune.json").read_text())
    choices = note["choices"]
    assert set(choices) == {"live", "replayed", "original", "corrected"}
    assert abs(choices["replayed"]["mean_kl"]) < choices["corrected"]["mean_kl"] < choices["original"]["mean_kl"]
    assert (note["base_choice"], note["correct_rank"]) == ("replayed", 32)
    assert "the same, corrected" in said.out
    said = merge_run("--correct", "32", "--base", "original", out=Path("corrected"))
    assert "with a rank-32 correction towards nf4" in said.out
    note = json.loads((Path("corrected") / "finetune.json").read_text())
    assert (note["base_choice"], note["choices"], note["quantised_as"]) == ("corrected", {}, None)
    assert note["proof"]["mean_kl"] == pytest.approx(choices["corrected"]["mean_kl"], rel=1e-3)
    assert merge_run("--correct", "32", "--base", "replayed", out=Path("no")).code == 4
    assert merge_run("--correct", "8").code == 5  # another merge in the same place
