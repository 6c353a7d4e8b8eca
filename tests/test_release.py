"""``finetune release``: what ships is what was trained, with its terms, its facts, and digests to check it by."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import families, manifest, terms, verify
from finetune.base import inspect
from finetune.card import Card
from finetune.dataset import Source
from finetune.errors import EnvironmentFault
from tests import runs
from tests.runs import OUTPUT, ROOT, finetune

OUT = Path("published")
KNOWN = ("--data-licence", "cc0-1.0")


def licensed(text: str = "Apache License\nVersion 2.0, January 2004\n") -> None:
    """The base gets the text of a licence, as a published one has it."""
    Path("base/LICENSE").write_text(text)


def release(*options: str) -> runs.Said:
    return finetune("release", str(OUTPUT), "--out", str(OUT), *options)


def header(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    return found


@pytest.fixture
def published(finished: Path) -> Path:
    licensed()
    said = release("--what", "both", *KNOWN)
    assert said.code == 0, said.err
    return finished


def test_a_release_is_whole_and_verifies(published: Path) -> None:
    names = {str(path.relative_to(OUT)) for path in OUT.rglob("*") if path.is_file()}
    assert names >= {
        "README.md", "LICENSE", "NOTICE", "manifest.json", "SHA256SUMS", "model.safetensors", "config.json",
        "tokenizer.json", "finetune.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
    }  # fmt: skip
    assert verify.faults(OUT) == []
    assert finetune("verify", str(OUT)).code == 0
    done = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=OUT, capture_output=True, check=False)
    assert done.returncode == 0
    made = json.loads((OUT / "manifest.json").read_text())["provenance"]
    identity = json.loads((OUTPUT / "identity.json").read_text())
    assert made["base"]["sha256"] == identity["base"]
    assert made["data"] == identity["data"]
    assert made["recipe"]["adapter.r"] == 4
    assert made["merge"]["proof"]["holds"]
    assert made["scores"] == json.loads((OUTPUT / "scores.json").read_text())
    assert (OUT / "adapter/adapter_model.safetensors").read_bytes() == (
        OUTPUT / "adapter/adapter_model.safetensors"
    ).read_bytes()


def test_a_flipped_bit_is_named_by_the_command(published: Path) -> None:
    weights = bytearray((OUT / "model.safetensors").read_bytes())
    weights[-5] ^= 4
    (OUT / "model.safetensors").write_bytes(weights)
    said = finetune("verify", str(OUT))
    assert said.code == 1
    assert "model.safetensors" in said.err
    assert finetune("verify", "base").code == 4


def test_the_cards_facts_are_the_runs(published: Path) -> None:
    card = (OUT / "README.md").read_text()
    assert header(OUT)["license"] == "apache-2.0"
    assert "base_model" not in header(OUT)  # a folder's name means nothing to others
    assert "the digests of its files are in `manifest.json`" in card
    scores = json.loads((OUTPUT / "scores.json").read_text())
    assert f"| | {' | '.join(scores)} |" in card
    exact = [
        f"{one['exact_match']:.3f} ({' – '.join(f'{x:.3f}' for x in one['confidence_interval'])})"
        for one in scores.values()
    ]
    assert f"| exact match | {' | '.join(exact)} |" in card
    assert f"| loss | {' | '.join(format(one['loss'], '.4f') for one in scores.values())} |" in card
    assert "It learned from" not in card
    digest = json.loads((OUTPUT / "identity.json").read_text())["data"]["train.jsonl"]
    assert f"| `train.jsonl` | cc0-1.0 | `{digest[:16]}…` |" in card
    assert "learning_rate: 0.005" in card
    assert "pip install" not in card


def test_the_card_says_how_it_is_served(published: Path) -> None:
    """Only as it can be: an engine that reads no rsLoRA flag would serve another model."""
    card = (OUT / "README.md").read_text()
    assert "`vllm serve .`" in card
    assert "`vllm serve base --enable-lora --max-lora-rank 8 --lora-modules adapter=adapter`" in card
    assert "`finetune export . --to ollama --out DIR`" in card
    config = json.loads((OUTPUT / "adapter" / "adapter_config.json").read_text())
    (OUTPUT / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    digests = json.loads((OUTPUT / "adapter" / "manifest.json").read_text())
    digests["sha256"]["adapter_config.json"] = manifest.digest(OUTPUT / "adapter" / "adapter_config.json")
    (OUTPUT / "adapter" / "manifest.json").write_text(json.dumps(digests))
    shutil.rmtree(OUT)
    assert release("--what", "adapter", *KNOWN).code == 0
    assert "vllm" not in (OUT / "README.md").read_text()


def test_the_same_release_again_changes_nothing(published: Path) -> None:
    before = runs.snapshot(OUT)
    said = release("--what", "both", *KNOWN)
    assert (said.code, said.err) == (0, "")
    assert "already: nothing to do" in said.out
    assert release("--what", "merged", *KNOWN).code == 5
    (OUT / "LICENSE").write_text("other")
    said = release("--what", "both", *KNOWN)
    assert said.code == 5
    assert "LICENSE is damaged" in said.err
    (OUT / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    assert runs.snapshot(OUT).keys() == before.keys()


def test_the_cards_code_runs(published: Path) -> None:
    """As a reader would paste it: merged weights, and the adapter on its base."""
    blocks = re.findall(r"```python\n(.*?)```", (OUT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree("base", OUT / "base")  # what the card names by the id of the hub
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", block], cwd=OUT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]


def test_an_adapter_alone_is_released_with_its_tokenizer(finished: Path) -> None:
    licensed()
    assert release("--what", "adapter", *KNOWN).code == 0
    assert not (OUT / "model.safetensors").exists()
    assert (OUT / "adapter_config.json").is_file()
    assert (OUT / "tokenizer.json").is_file()
    assert header(OUT)["library_name"] == "peft"
    assert verify.faults(OUT) == []


def test_unknown_licences_are_refused_by_name(finished: Path) -> None:
    said = release()
    assert said.code == 5
    for what in ("licence of the base base is not known", "without the text", "licence of the data train.jsonl"):
        assert what in said.err
    assert not OUT.exists()
    assert release("--allow-unknown-licence").code == 0
    notice = (OUT / "NOTICE").read_text()
    assert "Not known when this was written" in notice
    assert "**Not known**: the licence of the base base" in (OUT / "README.md").read_text()
    assert header(OUT)["license_name"] == "unknown"
    assert not (OUT / "LICENSE").exists()  # nothing is invented


def test_data_that_allows_no_derivatives_is_refused(finished: Path) -> None:
    licensed()
    said = release("--data-licence", "cc-by-nd-4.0", "--allow-unknown-licence")
    assert said.code == 5
    assert "allows no derivatives" in said.err


def test_the_first_qwens_agreement_is_carried_as_it_demands(finished: Path) -> None:
    base = inspect(Path("base"))
    licensed("Tongyi Qianwen LICENSE AGREEMENT\nthe whole text\n")
    Path("base/NOTICE").write_text("parts of others")
    found = terms.find(base, "Qwen/Qwen-14B", [Source(path="train.jsonl")], "cc0-1.0")
    assert found.missing() == []
    OUT.mkdir()
    (OUT / "NOTICE").write_text("copied with the base")
    terms.write(found, OUT, ["- folded"])
    assert sorted(path.name for path in OUT.iterdir()) == ["LICENSE", "Notice"]
    assert (OUT / "LICENSE").read_text().endswith("the whole text\n")
    notice = (OUT / "Notice").read_text()
    assert notice.startswith(families.TONGYI.notice)
    assert "Copyright (c) Alibaba Cloud. All Rights Reserved." in notice
    for what in ("derivative of Qwen/Qwen-14B", "- folded", "improve another LLM", "parts of others", "cc0-1.0"):
        assert what in notice


def test_texts_beside_the_data_are_carried(tmp_path: Path, finished: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/LICENSE").write_text("free for all")
    (tmp_path / "set/train.jsonl").write_text("{}")
    found = terms.find(
        inspect(Path("base")), "SmolLM2-135M-Instruct", [Source(path=str(tmp_path / "set/train.jsonl"))], None
    )
    terms.refuse(found, allow_unknown=False)
    OUT.mkdir()
    terms.write(found, OUT, [])
    assert (OUT / "data-licences/1-LICENSE").read_text() == "free for all"
    assert "its text is data-licences/1-LICENSE" in (OUT / "NOTICE").read_text()
    assert (OUT / "LICENSE").read_text() == (ROOT / "finetune/families/apache-2.0.txt").read_text()
    with pytest.raises(EnvironmentFault, match="licence of the data"):
        terms.refuse(terms.find(inspect(Path("base")), "SmolLM2-135M-Instruct", [Source(path="train.jsonl")], None),
                     allow_unknown=False)  # fmt: skip


def test_nothing_is_overwritten(finished: Path) -> None:
    OUT.mkdir()
    (OUT / "thesis.doc").write_text("years")
    licensed()
    assert release(*KNOWN).code == 5
    assert [path.name for path in OUT.iterdir()] == ["thesis.doc"]


def test_an_adapter_is_exported_for_its_consumer(finished: Path) -> None:
    from safetensors.torch import load_file

    said = finetune("export", str(OUTPUT), "--out", str(OUT), "--target", "vllm")
    assert said.code == 0, said.err
    assert "--max-lora-rank 8" in said.out
    assert {path.name for path in OUT.iterdir()} >= {"adapter_config.json", "tokenizer.json", "manifest.json"}
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (OUT, OUTPUT / "adapter"))
    assert one.keys() == two.keys()
    assert all(one[key].equal(two[key]) for key in one)
    assert finetune("export", str(OUTPUT), "--out", str(OUT)).code == 5
    assert finetune("export", str(OUTPUT), "--out", "x", "--to", "gguff").code == 2
    config = json.loads((OUTPUT / "adapter/adapter_config.json").read_text())
    (OUTPUT / "adapter/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert finetune("export", str(OUTPUT), "--out", "x", "--target", "vllm").code == 4  # the adapter was altered


@pytest.mark.parametrize(("parts", "relation"), [(("merged",), "finetune"), (("adapter",), "adapter")])
def test_a_base_of_the_hub_is_named_in_the_header(finished: Path, parts: tuple[str, ...], relation: str) -> None:
    licensed()
    found = terms.find(inspect(Path("base")), "Qwen/Qwen3-14B", [Source(path="train.jsonl")], "cc0-1.0")
    made = {"base": {"name": "Qwen/Qwen3-14B", "commit": "c" * 40}, "data": {}, "recipe": {}}
    card = Card(
        name="x", terms=found, parts=parts, recipe="", scores={"after": {"loss": 1.0}}, provenance=made, chat=True,
        thinking="strip", end=("kept: step 3 (loss 1.0000); last: step 6 (loss 2.0000)",),
    ).text()  # fmt: skip
    assert "\nKept: step 3 (loss 1.0000); last: step 6 (loss 2.0000).\n" in card
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["base_model_relation"]) == ("Qwen/Qwen3-14B", relation)
    assert "at commit `cccc" in card
    assert "enable_thinking=False" in card
