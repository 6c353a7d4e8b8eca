"""A GGUF through llama.cpp's own converter is the model, tensor for tensor and token for token; else there is none.

The converters are those of FINETUNE_LLAMA_CPP, or those that an export left in the user's cache: no test fetches them.
llama.cpp was not told of the tiny tokenizers, so the tests name their split to it, which is Qwen's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from finetune import gguf_file, llamacpp, model
from finetune.errors import EnvironmentFault, ModelError
from finetune.exporters import adapter as plain_adapter
from finetune.exporters import gguf, ollama
from tests import qwen1, runs, tiny


def say(text: str) -> None:
    pass


def nothing_left(folder: Path) -> bool:
    return not [path.name for path in folder.iterdir() if ".gguf" in path.name]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen2", {}),
        ("llama", {"dtype": "float32", "tie_word_embeddings": True, "max_shard_size": "100KB"}),
        ("qwen3", {"dtype": "float16"}),
    ],
    ids=["qwen2 bf16", "llama fp32 tied sharded", "qwen3 fp16"],
)
def test_the_file_is_the_model(
    family: str, fields: dict[str, Any], build_tiny: Callable[..., Path], knows: Any, runtime: str, tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path / "{model}", family=family, **fields)
    report = gguf.merged(folder, tmp_path / "m.gguf", None, say, name="tiny")
    file = gguf_file.read(tmp_path / "m.gguf")
    assert file.architecture == family
    assert file.values["general.name"] == "tiny"
    assert file.values["tokenizer.ggml.eos_token_id"] == gguf.endings.end_tokens(folder)[0].id
    assert report["ends"] == ["<|im_end|>", "<|endoftext|>"]
    assert report["tensors"] == len(file.tensors)
    if runtime:
        assert report["llama.cpp"] == {"not_compared": runtime}
    else:
        assert report["llama.cpp"]["tokens"] == 4 * gguf.TOKENS
        assert report["llama.cpp"]["near_ties"] == 0
    if family == "qwen2":  # and a Modelfile fits it
        text, _ = ollama.modelfile(folder, tmp_path / "m.gguf")
        assert 'PARAMETER stop "<|im_end|>"' in text


def test_a_converter_that_errs_leaves_nothing(
    build_tiny: Callable[..., Path], knows: Callable[..., None], tmp_path: Path
) -> None:
    end = "lambda self, index: self.add_uint32('tokenizer.ggml.eos_token_id', 5)"
    knows(planted=f"llama.LlamaModel.undo_permute = False\nbase.gguf.GGUFWriter.add_eos_token_id = {end}")
    folder = build_tiny(tmp_path / "model", family="llama", dtype="float32")
    with pytest.raises(ModelError) as raised:
        gguf.merged(folder, tmp_path / "m.gguf", None, say)
    found = [str(fault) for fault in raised.value.faults]
    assert len(found) == 5  # q and k of two layers, and the end
    assert all(any(what in one for one in found) for what in ("attn_k.weight holds other", "ends a text with token 5"))
    assert nothing_left(tmp_path)


def test_a_tokenizer_that_llamacpp_splits_otherwise_is_refused(
    tiny_base: Path, knows: Callable[..., None], runtime: str, tmp_path: Path
) -> None:
    if runtime:
        pytest.skip(runtime)
    knows(split="gpt-2")
    with pytest.raises(ModelError, match=r"llama\.cpp reads .* where the model was trained on"):
        gguf.merged(tiny_base, tmp_path / "m.gguf", None, say)
    assert nothing_left(tmp_path)


def test_an_unknown_tokenizer_is_said_in_one_line(
    tiny_base: Path, converters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(llamacpp.VARIABLE, str(converters))
    with pytest.raises(ModelError, match=r"llama\.cpp does not know this tokenizer") as raised:
        gguf.merged(tiny_base, tmp_path / "m.gguf", None, say)
    assert "newer llama.cpp" in raised.value.faults[0].fix
    assert nothing_left(tmp_path)


def test_quantised(build_tiny: Callable[..., Path], knows: Any, runtime: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", hidden_size=256, head_dim=64, intermediate_size=256)
    if runtime:
        with pytest.raises(EnvironmentFault, match=r"finetune-qwen\[llamacpp\]"):
            gguf.merged(folder, tmp_path / "m.gguf", "q4_k_m", say)
        pytest.skip(runtime)
    report = gguf.merged(folder, tmp_path / "m.gguf", "q4_k_m", say)
    kinds = {tensor.tensor_type.name for tensor in gguf_file.read(tmp_path / "m.gguf").tensors.values()}
    assert {"F32", "Q4_K", "Q6_K"} <= kinds
    assert report["kind"] == "q4_k_m"
    assert report["llama.cpp"]["near_ties"] <= 4  # of 32, in bf16, where a random model's best two are close


def saved(folder: Path, base: Path, **fields: Any) -> Path:
    """A plain adapter of that base in a folder, as ``finetune export --to adapter`` writes it."""
    policy = tiny.adapt(tiny.load(base), **fields)
    weights, config = model.adapter_weights(policy.model), model.adapter_config(policy.model, "base")
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(plain_adapter.plain(config, weights)))
    return folder


def test_an_adapter_alone(build_tiny: Callable[..., Path], knows: Any, runtime: str, tmp_path: Path) -> None:
    """With rsLoRA and alphas of its own for some modules: llama.cpp has one alpha, so their ratio goes into B."""
    base = build_tiny(tmp_path / "base", family="llama", dtype="float32")
    fields = {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"o_proj": 3}}
    folder = saved(tmp_path / "adapter", base, **fields)
    report = gguf.adapter(folder, base, tmp_path / "a.gguf", say)
    assert report["tensors"] == 28
    if runtime:
        assert report["llama.cpp"] == {"not_compared": runtime}
        return
    assert report["llama.cpp"]["near_ties"] == 0
    # The base alone is another model: what was compared is the adapter's effect.
    whole = tmp_path / "b.gguf"
    gguf.merged(base, whole, None, say)
    with pytest.raises(ModelError, match="greedy token"):
        gguf.greedy(whole, tmp_path / "a.gguf", base, lambda reference: reference, 1e-3, say)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_an_adapter_that_is_not_plain_is_refused(
    change: dict[str, Any], what: str, tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    folder = saved(tmp_path / "adapter", tiny_base)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=f"GGUF cannot hold {what}"):
        gguf.adapter(folder, tiny_base, tmp_path / "a.gguf", say)
    assert nothing_left(tmp_path)


def test_the_first_qwen_goes_through_its_native_layout(
    build_tiny: Callable[..., Path], knows: Any, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    original = qwen1.build(tmp_path / "original", build_tiny)
    with pytest.raises(ModelError, match="native layout"):
        gguf.merged(original, tmp_path / "m.gguf", None, say)
    assert runs.finetune("convert", str(original), str(tmp_path / "native"), "--to", "native").code == 0
    report = gguf.merged(tmp_path / "native", tmp_path / "m.gguf", None, say)
    assert report["ends"][0] == "<|im_end|>"
    assert gguf_file.read(tmp_path / "m.gguf").architecture == "qwen2"


def test_what_the_converter_is_shown_names_no_code(tiny_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "evil.py").write_text("raise SystemExit")
    gguf.stage(folder, tmp_path / "staged", gguf.endings.end_tokens(folder)[1])
    assert sorted(path.name for path in (tmp_path / "staged").iterdir()) == [
        "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    shown = json.loads((tmp_path / "staged" / "tokenizer_config.json").read_text())
    assert (shown["tokenizer_class"], shown["eos_token"]) == ("PreTrainedTokenizerFast", "<|endoftext|>")
    assert "auto_map" not in (tmp_path / "staged" / "config.json").read_text() + json.dumps(shown)


@pytest.mark.real
@pytest.mark.timeout(1800)
def test_the_real_model_token_for_token(
    real_base: Path, converters: Path, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2 with its own tokenizer through the converters as they are: 12 prompts, every greedy token in fp32."""
    if runtime:
        pytest.skip(runtime)
    monkeypatch.setenv(llamacpp.VARIABLE, str(converters))
    report = gguf.merged(real_base, tmp_path / "f32.gguf", "f32", say)
    assert report["llama.cpp"]["near_ties"] == 0
    tokenizer = gguf.endings.tokenizer_of(real_base)
    questions = [
        *gguf.TEXTS,
        "List three colours.",
        "Who wrote Hamlet?",
        "2+2=",
        "Translate 'dog' into French.",
        "Why?",
    ]
    prompts = [gguf.endings.rendered(tokenizer, [{"role": "user", "content": text}], answer=True) for text in questions]
    assert len(prompts) == 12
    found = gguf.greedy(
        tmp_path / "f32.gguf", None, real_base, lambda same: same, gguf.MARGIN["f32"], say, texts=prompts
    )
    assert found == {"prompts": 12, "tokens": 96, "near_ties": 0, "margin": 1e-3}
    assert gguf.merged(real_base, tmp_path / "q4.gguf", "q4_k_m", say)["kind"] == "q4_k_m"
    text, made = ollama.modelfile(real_base, tmp_path / "q4.gguf")
    assert made["stops"] == ["<|im_end|>"]
    assert "SYSTEM" in text
    # Another model behind the same tokenizer is told apart.
    other = Path(shutil.copytree(real_base, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.3.self_attn.q_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="greedy"):
        gguf.greedy(tmp_path / "f32.gguf", None, other, lambda same: same, gguf.MARGIN["f32"], say, texts=prompts)
