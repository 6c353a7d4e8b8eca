"""Adapter fields are PEFT's own: the same names, annotations and defaults as its classes have when imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.recipe import adapter_fields, adapter_methods, adapter_source, adapter_targets
from finetune.recipe.adapter_source import FieldSource

REPOSITORY = Path(__file__).resolve().parents[2]
LORA: dict[str, Any] = {"method": "lora", "r": 8, "lora_alpha": 16}


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    adapter_source.methods.cache_clear()
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when PEFT is imported
def test_every_method_and_field_of_the_installed_peft() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    real = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    read = adapter_source.methods()
    assert set(read) == set(real)
    assert len(read) > 40
    for name, config in real.items():
        options = {one.name: one for one in dataclasses.fields(config) if one.init}
        assert set(read[name]) == set(options) - adapter_source.INTERNAL, name
        for key, source in read[name].items():
            written = options[key].default is not dataclasses.MISSING
            made = options[key].default_factory is not dataclasses.MISSING
            assert (source.default is not None) == (written or made), f"{name}.{key}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when PEFT is imported
def test_filled_defaults_make_the_config_that_peft_makes_alone() -> None:
    from peft import LoraConfig

    fields, findings = adapter_fields.check(LORA)
    assert findings == []
    assert LoraConfig(**fields).to_dict() == LoraConfig(r=8, lora_alpha=16).to_dict()


GOOD: list[dict[str, Any]] = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": ["model.layers.3.mlp.up_proj"]},
    {"target_modules": r".*\.self_attn\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.3\d\..*_proj$"},
    {"target_modules": None},
    {"exclude_modules": ["down_proj"]},
    {"use_rslora": True, "use_dora": True},
    {"rank_pattern": {"q_proj": 4, r"layers\.0\.mlp\.up_proj": 2}, "alpha_pattern": {"q_proj": 4, "v_proj": 1.5}},
    {"init_lora_weights": True},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": 3},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"bias": "none", "fan_in_fan_out": False},
    {"lora_dropout": 0},
    {"lora_dropout": 0.5},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_accepted(fields: dict[str, Any]) -> None:
    read, findings = adapter_fields.check({**LORA, **fields})
    assert findings == []
    assert {key: read[key] for key in fields} == fields


# written value → the faulty path within the section, a word of the message or of the remedy
BAD: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
    ({"method": "lroa"}, ("method",), "did you mean 'lora'?"),
    ({"method": "xyzzy"}, ("method",), "legal: lora"),
    ({"method": "xlora"}, ("method",), "xlora cannot be trained here: it mixes adapters"),
    ({"method": "LORA"}, ("method",), "did you mean 'lora'?"),
    ({"method": 3}, ("method",), "found 3"),
    ({"method": None}, ("method",), "found nothing"),
    ({"lora_rank": 4}, ("lora_rank",), "did you mean 'r'?"),
    ({"lora_alhpa": 4}, ("lora_alhpa",), "did you mean 'lora_alpha'?"),
    ({"peft_type": "LORA"}, ("peft_type",), "unknown key"),
    ({"trainable_token_indices": [1]}, ("trainable_token_indices",), "token rows are trained by name"),
    ({"loftq_config": {}}, ("loftq_config",), "merge cannot yet fold"),
    ({"lora_bias": True}, ("lora_bias",), "merge cannot yet fold"),
    ({"r": 0}, ("r",), "from 1"),
    ({"r": -8}, ("r",), "from 1"),
    ({"r": 10**9}, ("r",), "from 1"),
    ({"r": 8.0}, ("r",), "a whole number"),
    ({"r": True}, ("r",), "a whole number"),
    ({"r": "8"}, ("r",), "without quotes"),
    ({"r": None}, ("r",), "found nothing"),
    ({"lora_alpha": 0}, ("lora_alpha",), "above 0"),
    ({"lora_alpha": 0.5}, ("lora_alpha",), "a whole number"),
    ({"lora_dropout": 1}, ("lora_dropout",), "below 1"),
    ({"lora_dropout": 2.0}, ("lora_dropout",), "below 1"),
    ({"lora_dropout": -0.1}, ("lora_dropout",), "at least 0"),
    ({"lora_dropout": True}, ("lora_dropout",), "a number"),
    ({"lora_dropout": float("nan")}, ("lora_dropout",), "a number"),
    ({"bias": "all"}, ("bias",), "merge cannot yet fold"),
    ({"bias": "nome"}, ("bias",), "did you mean 'none'?"),
    ({"fan_in_fan_out": True}, ("fan_in_fan_out",), "must be false"),
    ({"fan_in_fan_out": 0}, ("fan_in_fan_out",), "must be false"),
    ({"use_dora": "yes"}, ("use_dora",), "true or false"),
    ({"use_dora": 1}, ("use_dora",), "true or false"),
    ({"init_lora_weights": False}, ("init_lora_weights",), "would not start at zero"),
    ({"init_lora_weights": 1}, ("init_lora_weights",), "found 1"),
    ({"init_lora_weights": "loftq"}, ("init_lora_weights",), "quantisation of its own"),
    ({"init_lora_weights": "pissa_niter_"}, ("init_lora_weights",), "one of gaussian"),
    ({"eva_config": {"roh": 1.0}}, ("eva_config", "roh"), "did you mean 'rho'?"),
    ({"corda_config": {"cache_file": "x.pt"}}, ("corda_config", "cache_file"), "none that a recipe may set"),
    ({"init_lora_weights": "gausian"}, ("init_lora_weights",), "did you mean 'gaussian'?"),
    ({"target_modules": []}, ("target_modules",), "empty"),
    ({"target_modules": ["q_prj"]}, ("target_modules", 0), "did you mean 'q_proj'?"),
    ({"target_modules": ["q_proj", "vproj"]}, ("target_modules", 1), "did you mean 'v_proj'?"),
    ({"target_modules": ["c_attn"]}, ("target_modules", 0), "no such module"),
    ({"target_modules": ["mlp.q_proj"]}, ("target_modules", 0), "no such module"),
    ({"target_modules": ["q_proj", "q_proj"]}, ("target_modules", 1), "twice"),
    ({"target_modules": ["q_proj", 3]}, ("target_modules",), "a list"),
    ({"target_modules": "q_proj"}, ("target_modules",), "[q_proj]"),
    ({"target_modules": "all_linear"}, ("target_modules",), "did you mean 'all-linear'?"),
    ({"target_modules": "(q_proj"}, ("target_modules",), "regular expression"),
    ({"exclude_modules": ["dwn_proj"]}, ("exclude_modules", 0), "did you mean 'down_proj'?"),
    ({"modules_to_save": ["lm_haed"]}, ("modules_to_save", 0), "did you mean 'lm_head'?"),
    ({"rank_pattern": {"q_proj": 0}}, ("rank_pattern", "q_proj"), "from 1"),
    ({"rank_pattern": {"q_prj": 4}}, ("rank_pattern", "q_prj"), "did you mean 'q_proj'?"),
    ({"rank_pattern": {"(": 4}}, ("rank_pattern", "("), "regular expression"),
    ({"rank_pattern": {"q_proj": 4.0}}, ("rank_pattern",), "section"),
    ({"alpha_pattern": {"q_proj": -1}}, ("alpha_pattern", "q_proj"), "above 0"),
    ({"alpha_pattern": {"q_proj": True}}, ("alpha_pattern",), "section"),
    ({"layers_to_transform": [0, 0]}, ("layers_to_transform",), "twice"),
    ({"layers_to_transform": [-1]}, ("layers_to_transform", 0), "layer number"),
    ({"layers_to_transform": []}, ("layers_to_transform",), "empty"),
    ({"layers_pattern": "layers"}, ("layers_pattern",), "needs layers_to_transform"),
    ({"target_modules": "all-linear", "layers_to_transform": 1}, ("layers_to_transform",), "target_modules is text"),
]


@pytest.mark.parametrize(("fields", "path", "words"), BAD, ids=lambda value: str(value)[:60])
def test_refused(fields: dict[str, Any], path: tuple[Any, ...], words: str) -> None:
    _, findings = adapter_fields.check({**LORA, **fields})
    assert [finding.path for finding in findings] == [path]
    assert words in f"{findings[0].what}; {findings[0].fix}"


@pytest.mark.parametrize("key", ["method", *adapter_fields.REQUIRED])
def test_required_fields_have_no_hidden_default(key: str) -> None:
    section = {name: value for name, value in LORA.items() if name != key}
    _, findings = adapter_fields.check(section)
    assert [(finding.path, finding.what) for finding in findings] == [((key,), "missing")]


def test_a_misspelt_required_field_is_not_reported_missing_too() -> None:
    _, findings = adapter_fields.check({"mehtod": "lora", "lora_rank": 8, "lora_alpa": 16})
    assert [finding.path for finding in findings] == [("mehtod",), ("lora_rank",), ("lora_alpa",)]


OTHERS = sorted(set(adapter_source.methods()) - {"lora"})


@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_is_known_or_refused_with_its_reason(method: str) -> None:
    section = {"method": method, **dict.fromkeys(adapter_fields.required(method), 8)} if method in FREE else None
    _, findings = adapter_fields.check(section or {"method": method, "r": 8})
    if method in adapter_methods.NOT_HERE:
        assert [finding.path for finding in findings] == [("method",)]
        assert findings[0].what == f"{method} cannot be trained here: {adapter_methods.NOT_HERE[method]}"
    else:
        assert findings == []
        _, typed = adapter_fields.check({**(section or {}), "target_moduls": ["q_proj"]})
        assert [(one.path, one.fix) for one in typed] == [(("target_moduls",), "did you mean 'target_modules'?")]


FREE = set(adapter_fields.trainable()) - {"lora"}


def test_every_reason_is_of_a_method_that_peft_has() -> None:
    assert set(adapter_methods.NOT_HERE) <= set(adapter_source.methods())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when PEFT is imported
def test_the_keys_of_sections_within_the_section_are_pefts() -> None:
    from peft.tuners.lora import config

    kinds = {"eva_config": config.EvaConfig, "corda_config": config.CordaConfig, "lora_ga_config": config.LoraGAConfig}
    for key, kind in kinds.items():
        assert set(adapter_methods.NESTED[key]) <= {one.name for one in dataclasses.fields(kind)}


OTHER_BAD: list[tuple[dict[str, Any], tuple[Any, ...], str]] = [
    ({"method": "loha"}, ("r",), "missing"),
    ({"method": "loha", "r": 8, "lora_alpha": 16}, ("lora_alpha",), "did you mean 'alpha'?"),
    ({"method": "loha", "r": 8, "rank_dropout": 1.5}, ("rank_dropout",), "below 1"),
    ({"method": "loha", "r": 8, "target_modules": ["q_prj"]}, ("target_modules", 0), "did you mean 'q_proj'?"),
    ({"method": "ln_tuning", "target_modules": ["q_proj"]}, ("target_modules", 0), "no such module"),
    ({"method": "vera", "r": 8, "save_projection": False}, ("save_projection",), "must be true"),
    ({"method": "oft", "oft_block_size": "32"}, ("oft_block_size",), "without quotes"),
    ({"method": "oft", "bias": "all"}, ("bias",), "must be none"),
    ({"method": "vblora", "r": 4, "save_only_topk_weights": True}, ("save_only_topk_weights",), "must be false"),
]


@pytest.mark.parametrize(("section", "path", "words"), OTHER_BAD, ids=lambda value: str(value)[:60])
def test_fields_of_other_methods_are_judged_too(section: dict[str, Any], path: tuple[Any, ...], words: str) -> None:
    _, findings = adapter_fields.check(section)
    assert [finding.path for finding in findings] == [path]
    assert words in f"{findings[0].what}; {findings[0].fix}"


def test_every_lora_field_is_either_folded_or_refused() -> None:
    for key in adapter_source.methods()["lora"]:
        if key not in adapter_fields.FOLDED:
            _, findings = adapter_fields.check({**LORA, key: None})
            assert [finding.path for finding in findings] == [(key,)]
    assert set(adapter_fields.FOLDED) <= set(adapter_source.methods()["lora"])


def test_cache_is_written_once_and_read(cache_home: Path) -> None:
    first = adapter_source.methods()
    [file] = list((cache_home / "finetune").iterdir())
    assert file.name == f"peft-{adapter_source.version()}.json"
    content = json.loads(file.read_text())
    content["methods"]["lora"]["planted"] = ["int", "1"]
    file.write_text(json.dumps(content))
    adapter_source.methods.cache_clear()
    assert adapter_source.methods()["lora"]["planted"] == FieldSource("int", "1")
    assert "planted" not in first["lora"]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1, "stamp": "", "methods": {}}', b'{"methods": {"lora": 3}}']
)
def test_damaged_or_foreign_cache_is_rebuilt(cache_home: Path, damage: bytes) -> None:
    good = adapter_source.methods()
    [file] = list((cache_home / "finetune").iterdir())
    whole = file.read_bytes()
    file.write_bytes(damage or whole[: len(whole) // 2])
    adapter_source.methods.cache_clear()
    assert adapter_source.methods() == good
    assert file.read_bytes() == whole
    assert [entry.name for entry in (cache_home / "finetune").iterdir()] == [file.name]


@pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null", "relative"])
def test_works_where_no_cache_can_be_written(home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    adapter_source.methods.cache_clear()
    assert "lora" in adapter_source.methods()
    assert not (tmp_path / "relative").exists()


def test_reading_fields_imports_neither_peft_nor_torch(cache_home: Path) -> None:
    code = (
        "import sys; from finetune.recipe import adapter_fields; adapter_fields.check({'method': 'lora'}); "
        "sys.exit(','.join({'peft', 'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("pattern", "endless"),
    [
        (r"(.*)*(.*)*x$", True),
        (r"((a+)b)+", True),
        (r"(.*\.)*(.*\.)*q_proj", True),
        (r"(x{1,9}){1,9}", True),
        (r".*.*.*.*.*q", True),
        (r".*self_attn\.(q|v)_proj", False),
        (r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj", False),
        (r".*\.([qkvo]_proj|gate_proj)", False),
        (r".*[*+]q\*", False),
    ],
)
def test_patterns_that_could_match_for_hours_are_refused(pattern: str, endless: bool) -> None:
    assert adapter_targets._endless(pattern) is endless
    if endless:
        _, findings = adapter_fields.check({"method": "lora", "r": 2, "lora_alpha": 2, "target_modules": pattern})
        assert [finding.what.startswith("repeats within repeats") for finding in findings] == [True]
