"""A Modelfile's template, run by Go's own text/template, writes what the tokenizer's template writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune import endings
from finetune.errors import ModelError
from finetune.exporters import ollama
from finetune.gguf_file import GGUF
from finetune.tiktoken_file import CHAT_TEMPLATE

TEMPLATES = Path(__file__).parents[1] / "templates"
PROGRAM = r"""
package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Job struct { Template, System string; Messages []Message }

// What Ollama does around the template: the Modelfile's system prompt goes first where the first message is no system
// message; neighbours of one role become one message.
func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
	var answers []string
	for _, job := range jobs {
		messages := job.Messages
		if job.System != "" && messages[0].Role != "system" {
			messages = append([]Message{{"system", job.System}}, messages...)
		}
		var joined []*Message
		for i := range messages {
			if n := len(joined); n > 0 && joined[n-1].Role == messages[i].Role {
				joined[n-1].Content += "\n\n" + messages[i].Content
			} else {
				joined = append(joined, &messages[i])
			}
		}
		var text strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
		if err := parsed.Execute(&text, map[string]any{"Messages": joined}); err != nil { panic(err) }
		answers = append(answers, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(answers)
}
"""
FAMILIES = {
    "chatml": (TEMPLATES / "smollm2.jinja").read_text(),
    "qwen1": CHAT_TEMPLATE,
    "qwen2.5": (TEMPLATES / "qwen2.5.jinja").read_text(),
    "qwen3": (TEMPLATES / "qwen3.jinja").read_text(),
    "llama3": (TEMPLATES / "llama3.jinja").read_text(),
}
"""Every family's template; which of them name a default system prompt."""
DEFAULTS = {"chatml", "qwen1", "qwen2.5"}


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[str]]:
    """Templates and messages → what Go renders."""
    compiler = shutil.which("go")
    if compiler is None:
        pytest.skip("Go is not installed (apt-get install golang-go): its text/template cannot be run")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM)
    environment = os.environ | {
        "GOCACHE": str(folder / "cache"),
        "GO111MODULE": "off",
        "GOFLAGS": "",
        "GOPATH": str(folder),
    }
    subprocess.run([compiler, "build", "-o", "render", "main.go"], cwd=folder, env=environment, check=True)

    def render(jobs: list[dict[str, Any]]) -> list[str]:
        done = subprocess.run([folder / "render"], input=json.dumps(jobs), capture_output=True, text=True, check=True)
        return list(json.loads(done.stdout))

    return render


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "model"))


def with_template(folder: Path, family: str, text: str | None = None) -> Path:
    """The tiny model with that family's template, and its special tokens where they are others."""
    (folder / "chat_template.jinja").write_text(FAMILIES[family] if text is None else text)
    if family == "llama3":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            path = folder / name
            stored = path.read_text().replace("<|im_end|>", "<|eot_id|>").replace("<|im_start|>", "<|begin_of_text|>")
            path.write_text(stored)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|begin_of_text|>"}))
    return folder


def gguf(folder: Path, **values: Any) -> GGUF:
    """What a GGUF of that folder says of its tokens."""
    ends = endings.end_tokens(folder)
    types = [1] * 320
    for end in ends:
        types[end.id] = 3
    said = {"tokenizer.ggml.eos_token_id": ends[0].id, "tokenizer.ggml.token_type": types}
    return GGUF(folder / "model.gguf", said | values, {})


@pytest.fixture
def modelfile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, list[str]], dict[str, Any]]]:
    """folder → (the Modelfile's commands as Ollama reads them, the report)."""

    def write(folder: Path, **values: Any) -> tuple[dict[str, list[str]], dict[str, Any]]:
        monkeypatch.setattr(ollama.gguf_file, "read", lambda path: gguf(folder, **values))
        text, report = ollama.modelfile(folder, folder / "model.gguf")
        return parsed(text), report

    return write


def parsed(text: str) -> dict[str, list[str]]:
    """A Modelfile as Ollama's parser reads it: comments, names, values bare or in one or three quotes."""
    found: dict[str, list[str]] = {}
    while text:
        if comment := re.match(r"#([^\n]*)\n|\s+", text):
            found.setdefault("#", []).extend([comment[1]] if comment[1] else [])
            text = text[comment.end() :]
            continue
        command = re.match(r'(PARAMETER \w+|[A-Z]+) (?:"""(.*?)"""|"([^"\n]*)"|([^"\s][^\n]*))\n', text, re.DOTALL)
        assert command, text[:80]
        found.setdefault(command[1], []).append(next(value for value in command.groups()[1:] if value is not None))
        text = text[command.end() :]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_go_renders_what_the_tokenizer_renders(
    family: str, folder: Path, modelfile: Callable[..., Any], go: Callable[..., list[str]]
) -> None:
    bos = family == "llama3"
    commands, report = modelfile(with_template(folder, family), **{"tokenizer.ggml.add_bos_token": bos})
    (system,) = commands.get("SYSTEM", [""])
    assert (system != "") == (family in DEFAULTS)
    jobs = [
        {"Template": commands["TEMPLATE"][0], "System": system, "Messages": messages}
        for messages in ollama.CONVERSATIONS
    ]
    tokenizer = endings.tokenizer_of(folder)
    wanted = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in ollama.CONVERSATIONS
    ]
    # llama.cpp itself puts the token that begins a text there.
    assert [("<|begin_of_text|>" if bos else "") + text for text in go(jobs)] == wanted
    assert commands["PARAMETER stop"] == report["stops"] == [end.token for end in endings.end_tokens(folder)]
    assert commands["FROM"] == ["./model.gguf"]


def test_what_ollama_does_otherwise_is_said(folder: Path, modelfile: Callable[..., Any]) -> None:
    commands, report = modelfile(with_template(folder, "qwen3"))
    assert any("thinking of earlier answers" in note for note in report["notes"])
    commands, report = modelfile(with_template(folder, "llama3"), **{"tokenizer.ggml.add_bos_token": True})
    assert any("trims contents" in note for note in report["notes"])
    assert [line.strip() for line in commands["#"]] == report["notes"]


def test_the_runtime_writes_the_beginning_once(folder: Path, modelfile: Callable[..., Any]) -> None:
    """llama.cpp puts the token there or the template does, never both and never neither."""
    with_template(folder, "llama3")
    theirs, _ = modelfile(folder, **{"tokenizer.ggml.add_bos_token": True})
    assert "<|begin_of_text|>" not in theirs["TEMPLATE"][0]
    ours, _ = modelfile(folder, **{"tokenizer.ggml.add_bos_token": False})
    assert ours["TEMPLATE"][0].count("<|begin_of_text|>") == 1
    silent = FAMILIES["llama3"].replace("{{- '<|begin_of_text|>' -}}", "")
    with_template(folder, "llama3", silent)
    with pytest.raises(ModelError, match="it opens with"):
        modelfile(folder, **{"tokenizer.ggml.add_bos_token": True})


PLAIN = FAMILIES["chatml"].partition("{%- endif -%}\n")[2]
"""ChatML without a default system prompt."""
TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (TURN, TURN.replace("message.role", "message.role + (loop.index | string)"), "cannot be written"),
        (TURN, TURN.replace("message.content", "message.content | upper"), "leaves out, repeats or moves"),
        (TURN, TURN.replace("message.content", "message.content | replace('Hello', 'hello')"), "for 'Hello' it would"),
        (TURN, TURN.replace("message.content", "message.content | replace('{{', '')"), "it would be"),
        (TURN, TURN.replace("message.role +", "message.role + '{{' +"), "opens Go's own code"),
        (TURN, TURN.replace("message.role +", "message.role + '\u200b' +"), "loses the character"),
        (TURN, TURN.replace("message.role +", "message.role + '\"\"\"' +"), "cannot hold"),
        ("{%- for message", "{{ raise_exception('no more') if messages[2] }}{%- for message", "no more"),
    ],
)  # fmt: skip
def test_a_template_that_go_cannot_write_is_refused(
    folder: Path, modelfile: Callable[..., Any], old: str, new: str, why: str
) -> None:
    assert PLAIN.count(old) == 1
    with_template(folder, "chatml", PLAIN.replace(old, new))
    with pytest.raises(ModelError, match=re.escape(why)):
        modelfile(folder)


def test_a_base_without_a_template_is_refused(folder: Path, modelfile: Callable[..., Any]) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="there is none"):
        modelfile(folder)


def test_licences_and_sampling_go_along(folder: Path, modelfile: Callable[..., Any]) -> None:
    (folder / "LICENSE").write_text('Do as "you" like.\n\nBut say so.\n')
    (folder / "Notice").write_text("Made from X.")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.7, "top_k": 20, "do_sample": True}))
    commands, _ = modelfile(folder)
    assert commands["LICENSE"] == ['Do as "you" like.\n\nBut say so.', "Made from X."]
    assert (commands["PARAMETER temperature"], commands["PARAMETER top_k"]) == (["0.7"], ["20"])
    (folder / "LICENSE").write_text('"""')
    with pytest.raises(ModelError, match="licence text"):
        modelfile(folder)


def test_ends_must_agree_with_the_gguf(folder: Path, modelfile: Callable[..., Any]) -> None:
    assert modelfile(folder)[1]["stops"][0] == "<|im_end|>"
    with pytest.raises(ModelError, match="ends a text with token 7"):
        modelfile(folder, **{"tokenizer.ggml.eos_token_id": 7})
