"""A minimal conversation with a finished run's model or a merged folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from finetune import manifest
from finetune.conversation import Conversation, Turn
from finetune.errors import ModelError
from finetune.model import Policy
from finetune.terminal import Terminal, clean


def load(folder: Path, terminal: Terminal) -> Policy:
    """The policy of a run folder, or of a plain model folder."""
    from finetune import base, finished, hardware, loading, model

    if (folder / "config.json").is_file():
        _refuse_damaged(folder)
        found, machine = base.inspect(folder), hardware.detect()
        compute = "bf16" if machine.bf16 else "fp32"
        form = loading.BaseForm(weights=compute, double=False, compute=compute, device=machine.device)
        return model.load_base(found, form)
    prepared, files = finished.open_run(folder, terminal)
    policy = finished.live(prepared, files, terminal)[1]
    policy.renderer.thinking = prepared.recipe.data.thinking  # asks as the run was trained to be asked
    return policy


def _refuse_damaged(folder: Path) -> None:
    """A merged folder that says what belongs in it must hold just that."""
    faults = manifest.faults(folder) if (folder / manifest.NAME).is_file() else []
    if faults:
        raise ModelError(faults[0], str(folder), "merge again")


def talk(folder: Path, terminal: Terminal, max_new_tokens: int = 256) -> None:
    """Read lines until end of input; the whole conversation is the context. Greedy answers, streamed."""
    policy = load(folder, terminal)
    terminal.say("type a message; an empty line starts anew, Ctrl-D ends")
    turns: tuple[Turn, ...] = ()
    while True:
        sys.stdout.write("> ")
        sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            terminal.say()
            return
        if not line.strip():
            turns = ()
            continue
        turns = (*turns, Turn(role="user", content=line.strip()))
        prompt = policy.renderer.prompt(Conversation(turns))
        room = policy.positions - len(prompt)
        if room < 1:
            terminal.say(f"this conversation has outgrown the model's {policy.positions} positions: it starts anew")
            turns = ()
            continue
        with policy.evaluating():
            ids = policy.generate([prompt], min(max_new_tokens, room), _Stream(policy))[0]
        terminal.say()
        turns = (*turns, Turn(role="assistant", content=policy.tokenizer.decode(ids, skip_special_tokens=True)))


class _Stream:
    """Prints an answer as it grows; transformers calls ``put`` with new ids and ``end`` at the end."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._ids, self._shown, self._prompt = policy, [], "", True  # type: tuple[Policy, list[int], str, bool]

    def put(self, value: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self._ids += value.reshape(-1).tolist()
        text = self._policy.tokenizer.decode(self._ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            sys.stdout.write(clean(text[len(self._shown) :], 10_000))
            sys.stdout.flush()
            self._shown = text

    def end(self) -> None:
        sys.stdout.write("\n")
