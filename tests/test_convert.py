"""Original Qwen ⇄ native: the reference model's own numbers on the way in, the same bytes on the way out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import base as bases
from finetune import convert, layouts, shards
from finetune.errors import EnvironmentFault, ModelError
from tests import qwen1, runs
from tests.qwen1 import PICKLED, SAFE

Build = Callable[..., Path]
EXACT = {"tiny-safetensors": 0.0, "tiny-bin-bf16": 0.0}


@pytest.fixture(scope="module", params=[SAFE, PICKLED], ids=lambda path: path.name)
def source(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture(scope="module")
def native(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "out"
    said = runs.finetune("convert", str(source), str(out), "--to", "native")
    assert said.code == 0, said.err
    return out


def plain(folder: Path) -> Any:
    """What anybody gets from the folder: no trust flag."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def apart(model: Any, source: Path) -> float:
    """Largest difference of logits from the reference model's, over real positions."""
    given = qwen1.reference(source)
    with torch.no_grad():
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
    return float((logits - given["logits"])[given["attention_mask"].bool()].abs().max())


def test_plain_transformers_computes_the_reference_models_logits(source: Path, native: Path) -> None:
    given, model = qwen1.reference(source), plain(native)
    assert apart(model, source) <= 1e-4
    for row, mask in zip(range(2), given["attention_mask"].bool(), strict=True):
        if bool(mask.all()):
            with torch.no_grad():
                logits = model(input_ids=given["input_ids"][row : row + 1]).logits
            assert float((logits - given["logits"][row : row + 1]).abs().max()) <= 1e-5


def test_training_loss_and_gradient_are_the_references(source: Path, native: Path) -> None:
    given, model = qwen1.reference(source), plain(native).train()
    model.requires_grad_(True)
    found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"])
    found.loss.backward()
    assert abs(float(found.loss.detach()) - float(given["train_loss"])) <= 1e-5
    first = model.model.layers[0].self_attn
    fused = torch.cat([first.q_proj.weight.grad, first.k_proj.weight.grad, first.v_proj.weight.grad])
    assert float((fused - given["grad_l0_c_attn_weight"]).abs().max()) <= 1e-5


def test_swapped_branches_are_seen(tmp_path: Path) -> None:
    """The comparison can fail: w1 and w2 exchanged give another model."""
    folder = qwen1.copy(SAFE, tmp_path / "swapped")
    stored = qwen1.tensors(folder)
    for name, value in stored.items():
        if ".mlp.w1." in name:
            other = name.replace(".w1.", ".w2.")
            qwen1.change(folder, name, lambda _, value=stored[other]: value)
            qwen1.change(folder, other, lambda _, value=value: value)
    assert runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native").code == 0
    assert apart(plain(tmp_path / "out"), SAFE) > 1


@pytest.mark.parametrize(("rope", "mode"), [("plain", "train"), ("bucket-4096+logn", "eval")])
def test_beyond_its_length_each_choice_is_the_references(source: Path, native: Path, rope: str, mode: str) -> None:
    from finetune import loading, model

    given = qwen1.reference(source)
    ids = given["long_input_ids"]
    base = bases.inspect(native, rope, weights_only=True)
    found = loading.load(base, loading.BaseForm(weights="fp32", double=False, compute="fp32", device="cpu"))
    wanted = given[f"long_logits_{mode}_last64"]
    policy = model.Policy(model=found, tokenizer=None, renderer=None, stop_token="", adapted=False)  # type: ignore[arg-type]
    with torch.no_grad():
        packed = policy.hidden(ids, torch.arange(ids.shape[1])[None], (0, ids.shape[1]))
        assert float((policy.head(packed[:, -64:]) - wanted).abs().max()) <= 1e-4
        assert float((found(input_ids=ids).logits[:, -64:] - wanted).abs().max()) <= 1e-4
        # With a cache, token by token at the end, as generation goes.
        begun = found(input_ids=ids[:, :-2], use_cache=True)
        for place in (-2, -1):
            step = ids[:, place : place + 1 or None]
            begun = found(input_ids=step, past_key_values=begun.past_key_values, use_cache=True)
            assert float((begun.logits[:, -1] - wanted[:, place]).abs().max()) <= 1e-4
        assert float((plain(native)(input_ids=ids).logits[:, -64:] - wanted).abs().max()) > 1 or mode == "train"


def test_the_way_back_gives_the_same_tensors_and_files(source: Path, native: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    said = runs.finetune("convert", str(native), str(back), "--to", "original")
    assert said.code == 0, said.err
    stored = qwen1.tensors(source) or _pickled(source)
    found = qwen1.tensors(back)
    assert set(found) == set(stored)
    for name, value in stored.items():
        assert found[name].dtype == value.dtype
        assert found[name].contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8)), name
    names = {path.name for path in source.iterdir()} - {"reference.safetensors"}
    assert {path.name for path in back.iterdir()} == {_safe(name) for name in names}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    (index,) = source.glob("*.index.json")
    wanted = {name: _safe(shard) for name, shard in json.loads(index.read_bytes())["weight_map"].items()}
    assert json.loads((back / "model.safetensors.index.json").read_bytes())["weight_map"] == wanted


def _safe(name: str) -> str:
    return (
        name.replace("pytorch_model.bin.index", "model.safetensors.index")
        .replace("pytorch_", "")
        .replace(".bin", ".safetensors")
    )


def _pickled(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in sorted(folder.glob("*.bin"))
        for name, value in torch.load(path, weights_only=True).items()
    }


def test_a_folder_with_a_tokenizer_goes_there_and_back(tmp_path: Path, build_tiny: Build) -> None:
    source = qwen1.build(tmp_path / "base", build_tiny)
    (source / "LICENSE").write_text("terms")
    (source / "modeling_qwen.py").write_text("raise SystemExit('run')\n")
    assert runs.finetune("convert", str(source), str(tmp_path / "n"), "--to", "native").code == 0
    assert runs.finetune("convert", str(tmp_path / "n"), str(tmp_path / "o"), "--to", "original").code == 0
    assert _digests(source) == _digests(tmp_path / "o")
    assert not list((tmp_path / "n").glob("*.py"))
    from transformers import AutoTokenizer

    from finetune import tokenizer

    assert tokenizer.agrees(AutoTokenizer.from_pretrained(tmp_path / "n"), source)
    assert "auto_map" not in (tmp_path / "n" / "config.json").read_text()
    assert bases.inspect(tmp_path / "n").stop_token == bases.inspect(source).stop_token == "<|im_end|>"
    assert bases.inspect(tmp_path / "n").piecewise


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_what_plain_transformers_tokenises_otherwise_is_said(tmp_path: Path, build_tiny: Build) -> None:
    """The trap: a qwen2 folder's tokenizer is rebuilt with Qwen's own split pattern, whatever its file says."""
    source = qwen1.build(tmp_path / "base", build_tiny)
    path = source / "tokenizer.json"
    content = json.loads(path.read_bytes())
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    path.write_text(json.dumps(content))
    said = runs.finetune("convert", str(source), str(tmp_path / "n"), "--to", "native")
    assert said.code == 0, said.err
    assert "load it with PreTrainedTokenizerFast" in said.out
    from finetune import tokenizer

    assert tokenizer.agrees(tokenizer.load_tokenizer(tmp_path / "n"), source)
    assert json.loads((tmp_path / "n" / "tokenizer.json").read_bytes()) == content


def test_weights_without_a_vocabulary_are_converted_and_it_is_said(native: Path, tmp_path: Path) -> None:
    said = runs.finetune("convert", str(SAFE), str(tmp_path / "n"), "--to", "native")
    assert "no vocabulary file here: only the weights were converted" in said.out
    assert not (tmp_path / "n" / "tokenizer.json").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"no_bias": False}, "no_bias is not true"),
    "part of a head": ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    "channels": ({"kv_channels": 16}, "kv_channels 16 × 4 heads is not hidden_size 128"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    "pictures": ({"visual": {}}, "this is a visual model"),
    "sound": ({"audio": {}}, "this is a audio model"),
    "quantised": ({"quantization_config": {}}, "already quantised"),
    "odd width": ({"intermediate_size": 703}, "intermediate_size"),
    "no length": ({"seq_length": None}, "cannot be"),
    "not a number": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "text for a number": ({"layer_norm_epsilon": "1e-6"}, "layer_norm_epsilon is '1e-6'"),
    "no channels": ({"kv_channels": None}, "kv_channels is None"),
    "no rotation": ({"rotary_emb_base": 0}, "rotary_emb_base is 0"),
    "too deep": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    "a list for a type": ({"model_type": ["qwen"]}, "unknown model_type"),
    "unscaled": ({"scale_attn_weights": False}, "scale_attn_weights is not true"),
    "no such choice": ({"finetune_rope": "bucket-999"}, "finetune_rope is 'bucket-999'"),
}


@pytest.mark.parametrize(("values", "what"), REFUSED.values(), ids=REFUSED)
def test_what_native_layers_cannot_express_is_refused(values: dict[str, Any], what: str, tmp_path: Path) -> None:
    folder = qwen1.copy(SAFE, tmp_path / "base")
    qwen1.config(folder, **values)
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native")
    assert (said.code, said.err.count("\n")) == (4, 1), said.err
    assert what in said.err
    assert "config.json" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


STRAYED: dict[str, tuple[str, dict[str, Any], str]] = {
    "record, base": ("original/config.json", {"rotary_emb_base": 20000}, "rope_parameters"),
    "record, eps": ("original/config.json", {"layer_norm_epsilon": 1e-5}, "rms_norm_eps"),
    "record, heads": ("original/config.json", {"num_attention_heads": 2, "kv_channels": 64}, "num_attention_heads"),
    "native, base": (
        "config.json",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        "rope_parameters",
    ),
    "native, positions": ("config.json", {"max_position_embeddings": 4096}, "max_position_embeddings"),
}


@pytest.mark.parametrize(("file", "values", "key"), STRAYED.values(), ids=STRAYED)
def test_a_native_folder_and_its_record_must_tell_of_one_model(
    file: str, values: dict[str, Any], key: str, tmp_path: Path
) -> None:
    """Or the way back would write another model without a word."""
    assert runs.finetune("convert", str(SAFE), str(tmp_path / "n"), "--to", "native").code == 0
    path = tmp_path / "n" / file
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))
    said = runs.finetune("convert", str(tmp_path / "n"), str(tmp_path / "o"), "--to", "original")
    assert (said.code, said.err.count("\n")) == (4, 1), said.err
    assert f"{key} is" in said.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("headers.json", "[1]"),
        ("headers.json", json.dumps({"model-00001-of-00004.safetensors": "[" * 100_000})),
        ("headers.json", None),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../../evil"}}'),
        ("model.safetensors.index.json", "{"),
    ],
)
def test_a_damaged_record_costs_the_files_bytes_and_not_the_model(
    name: str, content: str | None, tmp_path: Path
) -> None:
    assert runs.finetune("convert", str(SAFE), str(tmp_path / "n"), "--to", "native").code == 0
    record = tmp_path / "n" / "original" / name
    if content is None:  # offsets that no file has
        value = json.loads(record.read_bytes())
        shard = "model-00001-of-00004.safetensors"
        header = json.loads(value[shard])
        header[list(header)[-1]]["data_offsets"] = [0, 4]
        content = json.dumps(value | {shard: json.dumps(header)})
    record.write_text(content)
    said = runs.finetune("convert", str(tmp_path / "n"), str(tmp_path / "o"), "--to", "original")
    assert said.code == 0, said.err
    wanted = qwen1.tensors(SAFE)
    found = qwen1.tensors(tmp_path / "o")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    assert bases.inspect(tmp_path / "o", weights_only=True).layout == "original"


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant cannot be told, and taking the last would be another model without a word."""
    from safetensors.torch import save_file

    folder = qwen1.copy(SAFE, tmp_path / "base")
    name = "transformer.h.0.ln_1.weight"
    other = folder / "model-00004-of-00004.safetensors"
    save_file(load_file(other) | {name: torch.zeros(128)}, other, {"format": "pt"})
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native")
    assert said.code == 4
    assert f"tensor {name} lies in model-00001-of-00004.safetensors too" in said.err


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def _drop(folder: Path) -> None:
    from safetensors.torch import save_file

    path = folder / "model-00002-of-00004.safetensors"
    kept = dict(list(load_file(path).items())[1:])
    save_file(kept, path, {"format": "pt"})


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "model-00002-of-00004.safetensors: this shard cannot be read"),
    "missing shard": (
        lambda folder: (folder / "model-00003-of-00004.safetensors").unlink(),
        "model-00003-of-00004.safetensors: this shard is missing",
    ),
    "missing key": (_drop, "is missing"),
    "wrong shape": (
        lambda folder: qwen1.change(folder, "transformer.h.1.attn.c_attn.weight", lambda value: value[:-1]),
        "transformer.h.1.attn.c_attn.weight is [383, 128]",
    ),
    "other shape": (
        lambda folder: qwen1.change(folder, "transformer.h.1.mlp.w1.weight", lambda value: value[:-1]),
        "transformer.h.1.mlp.w1.weight is [351, 128]",
    ),
}


@pytest.mark.parametrize(("damage", "what"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named_by_file_and_tensor(damage: Callable[[Path], object], what: str, tmp_path: Path) -> None:
    folder = qwen1.copy(SAFE, tmp_path / "base")
    damage(folder)
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native")
    assert said.code == 4
    assert what in said.err, said.err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_never_half_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off anywhere between tensors: no folder of that name, and the same command then completes it."""
    given = shards.ShardWriter.add
    for stop in (0, 7, 50):
        count = 0

        def add(self: shards.ShardWriter, name: str, value: torch.Tensor, stop: int = stop) -> None:
            nonlocal count
            if count == stop:
                raise KeyboardInterrupt
            count += 1
            given(self, name, value)

        monkeypatch.setattr(shards.ShardWriter, "add", add)
        assert runs.finetune("convert", str(SAFE), str(tmp_path / "out"), "--to", "native").code == 6
        assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    for name in ("out.tmp-123", "out.tmp-7-old", "out.tmp-7-unpacked", "out.tmp-precious", "out.tmp-notes.txt"):
        (tmp_path / name).mkdir()  # what kills leave, and what is somebody's
    assert runs.finetune("convert", str(SAFE), str(tmp_path / "out"), "--to", "native").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.tmp-precious", "out.tmp-notes.txt"}


def test_nothing_to_convert_is_said(native: Path, tmp_path: Path) -> None:
    for source, layout in ((SAFE, "original"), (native, "native")):
        said = runs.finetune("convert", str(source), str(tmp_path / "out"), "--to", layout)
        assert (said.code, f"in the {layout} layout already" in said.err) == (4, True)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_refused(native: Path, tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(EnvironmentFault, match="something is there already"):
        convert.convert(SAFE, tmp_path, "native", None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no such folder"):
        convert.convert(tmp_path / "nothing", tmp_path / "out", "native", None)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="never had the original Qwen layout"):
        layouts.refuse_impossible(bases.inspect(tiny_base), "original")
    with pytest.raises(ModelError, match="logn attention cannot be expressed"):
        layouts.refuse_impossible(bases.inspect(native, "plain+logn", weights_only=True), "native")


PEAK = """
import resource, sys
from pathlib import Path
from finetune import convert
from finetune.terminal import Terminal
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), "native", Terminal(quiet=True))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_holds_a_shard_and_not_the_model(tmp_path: Path) -> None:
    """The true widths of Qwen-14B at a depth of one, in sparse files: 3.7 GB of which the disk holds nothing."""
    script = Path(__file__).parents[1] / "benchmarks" / "rehearsal_14b.py"
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    made = subprocess.run([sys.executable, str(script), "sparse", str(tmp_path / "base"), "--layers", "1"], check=False)
    assert made.returncode == 0
    largest = max(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    done = runs.process(PEAK, str(tmp_path / "base"), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1])
    assert peak <= 2.2 * largest + 1e9, f"{peak / 1e9:.2f} GB for shards of {largest / 1e9:.2f} GB"
