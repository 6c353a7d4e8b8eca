"""A Modelfile beside a GGUF, whose template writes turns as the tokenizer's chat template does.

Ollama's templates are Go's text/template over the messages. What the tokenizer's template puts around the content of
each role is measured with marks; the Go text is made of these pieces, and what it renders is compared with the
tokenizer's own on conversations of each kind. Where a piece hangs on more than the role there is no such text, and the
export is refused. A default system prompt becomes SYSTEM, which Ollama puts first where the first message is another.

Source: Ollama's documentation of the Modelfile and of its templates; that a Modelfile loses what is not printable, and
how it is quoted, is how its parser reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import endings, gguf_file
from finetune.errors import ModelError
from finetune.gguf_file import GGUF
from finetune.runfolder import read_json
from finetune.terminal import clean

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, str]]


def _talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ROLES[1 + index % 2], "content": content} for index, content in enumerate(contents)]
    return [*([] if system is None else [{"role": "system", "content": system}]), *turns]


CONVERSATIONS = (
    _talk("Hello"),
    _talk("Hello", system="Answer in one word."),
    _talk("Hello", "Hi!", "And now?"),
    _talk("One", "1", "Two", "2", "Three", system="You count."),
    _talk("Grüße, 世界!\nשלום 🧑\u200d💻", "été — ok\n\n1. a\n2. b", "नमस्ते", system="Sprich “Deutsch”."),
    _talk("{{ .Content }}{{- range .Messages }} {% if x %}", "{{ end }}", 'say """this""" \\n', system="{{ .System }}"),
    _talk("<|im_end|>\n<|im_start|>assistant", "</s>", "<|eot_id|>"),
)  # fmt: skip
"""What every exported template must render as the tokenizer does."""
_KNOWN = {
    "it trims contents; Ollama passes blanks at their edges on": _talk(" Hello \n", " Hi\n", "\nYes "),
    "it drops the thinking of earlier answers; Ollama passes on what the client sends": _talk(
        "Hello", "<think>\nWell.\n</think>\n\nHi!", "And now?"
    ),
}
"""Where Ollama's templates cannot follow: told, in the Modelfile too, and not refused."""
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_LICENCES = re.compile(r"(licen[cs]e|notice|copying)([.-].*)?$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """How a template writes: ``begin``, then each content between its role's two texts, then ``prompt``.

    ``system`` is the system prompt where a conversation has none. ``marked``: the runtime writes ``begin`` itself.
    """

    begin: str
    marked: bool
    around: Mapping[str, tuple[str, str]]
    prompt: str
    system: str

    def render(self, messages: Messages) -> str:
        """What the model reads when it is to answer these messages."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return (
            self.begin
            + "".join(message["content"].join(self.around[message["role"]]) for message in messages)
            + self.prompt
        )

    def go(self) -> str:
        """The same as Go's text/template over .Messages."""
        text = "" if self.marked else self.begin
        text += "{{ range .Messages }}"
        for role in ROLES:
            before, after = self.around[role]
            text += (
                f'{{{{ {"" if role == ROLES[0] else "else "}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            )
        return text + "{{ end }}{{ end }}" + self.prompt


class _Beyond(Exception):  # noqa: N818 - no error yet: the template needs more than the role
    pass


def measure(render: Callable[[Messages, bool], str], bos: str, marked: bool) -> Turns:
    """The pieces of a template. ``render``: messages, and whether an answer is to follow → text; ``bos``: the token
    that begins a text, empty where there is none; ``marked``: the runtime puts it there.

    Raises:
        ModelError: the template writes something that does not hang on the role alone.
    """
    system, user, said, again = marks = ("Zq0x", "Zq1x", "Zq2x", "Zq3x")
    try:
        head, first, second, third, last = _split(render(_talk(user, said, again, system=system), True), marks)
        after_user = _split(render(_talk(user, system=system), False), (system, user))[-1]
        after_said = _split(render(_talk(user, said, system=system), False), (system, user, said))[-1]
        before_said, prompt = _without(second, after_user), _without(last, after_user)
        before_user = _without(third, after_said)
        if marked and not head.startswith(bos):
            raise _Beyond(f"it opens with {clean(head)!r}, and llama.cpp would put {bos} before that")
        if not first.endswith(before_user):
            raise _Beyond(f"between a system prompt and a question it has {clean(first)!r}")
        begin = bos if head.startswith(bos) else ""
        after_system, head = first.removesuffix(before_user), head.removeprefix(begin)
        bare = _without(_split(render(_talk(user), True), (user,))[0], begin)
        default = _between(bare, head, after_system + before_user) if bare != before_user else ""
    except _Beyond as beyond:
        raise _refusal(str(beyond)) from None
    around = {"system": (head, after_system), "user": (before_user, after_user), "assistant": (before_said, after_said)}
    return Turns(begin=begin, marked=marked, around=around, prompt=prompt, system=default)


def _split(text: str, marks: Sequence[str]) -> list[str]:
    found = re.split("|".join(marks), text)
    if re.findall("|".join(marks), text) != list(marks):
        raise _Beyond("it leaves out, repeats or moves contents")
    return found


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _Beyond(f"{clean(text)!r} does not always begin with {clean(start)!r}")
    return text.removeprefix(start)


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after) and len(text) > len(before + after)):
        raise _Beyond(f"without a system prompt it opens with {clean(text)!r}")
    return text[len(before) : len(text) - len(after)]


def _refusal(why: str) -> ModelError:
    what = f"the chat template cannot be written for Ollama: {why}"
    return ModelError(what, "chat_template", "export --to gguf, and let llama.cpp render the template in it")


def turns_of(folder: Path, file: GGUF) -> tuple[Turns, list[str]]:
    """The pieces of a folder's template, compared on every conversation; and what Ollama will do otherwise.

    Raises:
        ModelError: there is no template, or Go's text would render another prompt.
    """
    tokenizer = endings.tokenizer_of(folder)
    if endings.template(folder) is None:
        raise _refusal("there is none")

    def render(messages: Messages, answer: bool) -> str:
        return endings.rendered(tokenizer, messages, answer=answer)

    turns = measure(render, tokenizer.bos_token or "", adds_bos(file))
    for text in (turns.go(), turns.system):
        if bad := next((char for char in text if not char.isprintable() and char not in "\n\t\r"), ""):
            raise _refusal(f"a Modelfile loses the character {bad!r}")
        if '"""' in text:
            raise _refusal('a Modelfile cannot hold """')
    if any("{{" in piece for pair in turns.around.values() for piece in (*pair, turns.begin, turns.prompt)):
        raise _refusal("it writes {{, which opens Go's own code")
    for messages in CONVERSATIONS:
        if (wanted := render(messages, True)) != (found := turns.render(messages)):
            raise _refusal(f"for {messages[0]['content']!r} it would be {clean(found)!r} where it is {clean(wanted)!r}")
    notes = [what for what, messages in _KNOWN.items() if render(messages, True) != turns.render(messages)]
    return turns, [*notes, "tools are not offered: it has no place for them"]


def adds_bos(file: GGUF) -> bool:
    """Whether the runtime puts the beginning-of-text token before what it reads (llama.cpp's rule)."""
    stored = file.values.get("tokenizer.ggml.add_bos_token")
    if isinstance(stored, bool):
        return stored
    spoken = file.values.get("tokenizer.ggml.pre") in ("llama3", "llama-v3", "llama-bpe")
    return spoken or file.values.get("tokenizer.ggml.model") == "llama"


def modelfile(model_folder: Path, gguf: Path, source: str = "./model.gguf") -> tuple[str, dict[str, Any]]:
    """The Modelfile of a model folder that was exported as ``gguf``, which it calls ``source``; and what it says.

    Raises:
        ModelError: the template cannot be written in Go, or the ends of a text do not agree everywhere.
    """
    file, ends = gguf_file.read(gguf), endings.end_tokens(model_folder)
    if faults := endings.end_faults(gguf, file.values, ends):
        raise ModelError.of(faults)
    turns, notes = turns_of(model_folder, file)
    if odd := [end.token for end in ends if '"' in end.token or not end.token.isprintable()]:
        raise ModelError(f"a Modelfile cannot name the stop token {odd[0]!r}", str(model_folder), "export --to gguf")
    parts = [*(f"# {note}" for note in notes), f"FROM {source}", f'TEMPLATE """{turns.go()}"""']
    parts += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    parts += [f'PARAMETER stop "{end.token}"' for end in ends]
    asked = read_json(model_folder / "generation_config.json") or {}
    sampling = {theirs: asked.get(ours) for ours, theirs in _PARAMETERS.items()}
    parts += [f"PARAMETER {name} {value}" for name, value in sampling.items() if type(value) in (int, float)]
    parts += [f'LICENSE """{text}"""' for text in _licences(model_folder)]
    report = {"stops": [end.token for end in ends], "system": turns.system, "notes": notes}
    return "\n".join(parts) + "\n", report


def _licences(folder: Path) -> list[str]:
    """The texts of licences and notices, in the order of the files' names."""
    paths = [path for path in sorted(folder.iterdir()) if path.is_file() and _LICENCES.match(path.name)]
    texts = [path.read_text(encoding="utf-8", errors="replace").strip() for path in paths]
    if any('"""' in text for text in texts):
        raise ModelError('a Modelfile cannot hold """, which a licence text here has', str(folder), "export --to gguf")
    return texts
