"""What a merge begins with: an adapter, the base that it was trained on in its form, and rows to ask both models.

Of a finished run all of it is known. A bare adapter folder says which base it belongs to; whether that was quantised
is known of our own (their ``finetune.json``), of others only by who trained them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from finetune import (
    adapter_file,
    checkpoint,
    finished,
    forms,
    gather,
    hardware,
    manifest,
    merge,
    model,
    source,
    tokenizer,
    whole,
)
from finetune import base as bases
from finetune.base import Base
from finetune.conversation import TEXT, Conversation, Turn
from finetune.dataset import Example, Reader, Row, Source, read_rows
from finetune.errors import ModelError
from finetune.loading import BaseForm
from finetune.model import Policy
from finetune.renderer import Renderer
from finetune.run import Run
from finetune.runfolder import read_json
from finetune.terminal import ByteBar, Terminal

if TYPE_CHECKING:
    from collections.abc import Mapping

RECORDS = (checkpoint.PROVENANCE, "blend.json")
_LONGEST = 1024
_PROBES = (
    "Write the date in words: 2026-11-28", "The twenty-eighth of November, two thousand and twenty-six.",
    "为什么天空是蓝色的？", "因为空气分子对蓝光的散射比对红光强得多。",
    "Explain what a pointer is.", "A pointer is a value that names a place in memory; `int *p = &x;` lets *p read x.",
    "Summarise: the meeting was moved from Monday to Thursday because two of five people were ill.",
    "Two people were ill, so the meeting is on Thursday.",
    "Sortiere 9, 4 und 7 der Größe nach.", "4, 7, 9. Ist noch etwas zu tun?",
    'Return JSON with the keys "name" and "age".', '{"name": "Ada", "age": 36}',
)  # fmt: skip
"""Questions and answers of several kinds, where no rows are given: the two models need not be right, but agree."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An adapter on its base. ``folder`` is the adapter's; ``run`` the finished run that it is of, if one is known;
    ``sha256``: the digests of the base's files; ``by_peft``: its effect is not in pairs of matrices alone."""

    base: Base
    name: str
    commit: str | None
    sha256: Mapping[str, str]
    rope: str | None
    form: BaseForm
    folder: Path
    rows: Sequence[Example]
    run: Run | None
    by_peft: bool = False

    def live(self, terminal: Terminal, *, wide: bool = False) -> Policy:
        """The trained model as it trained; ``wide``: the same weights, activations in fp32.

        Raises as ``model.attach_saved``.
        """
        base = model.load_base(self.base, self.form, ByteBar(terminal, "loading the base").at)
        if wide:
            # What is packed stays packed, and is dequantised as it was. The model's own ``float`` refuses to do this.
            torch.nn.Module.float(base.model)
        if self.by_peft:
            return replace(base, model=whole.attach(base.model, self.folder), adapted=True)
        return model.attach_saved(base, self.folder)

    def is_quantised(self) -> bool:
        """Whether the base as it was trained against is another one than the published."""
        return self.form.weights in forms.MADE


def of(folder: Path, terminal: Terminal, **bare: Any) -> Trained:
    """A finished run's folder, or a bare adapter's; ``bare`` as of ``of_adapter``.

    Raises:
        ModelError: it is neither, or already merged; more as of the two below.
    """
    if (folder / "adapter_config.json").is_file():
        return of_adapter(folder, terminal, **bare)
    if (folder / "config.json").is_file():
        note = read_json(folder / checkpoint.PROVENANCE) or {}
        what = (
            f"the adapter {note['adapter_sha256'][:12]} is merged into it already" if "adapter_sha256" in note else ""
        )
        raise ModelError(what or "this is a model, not an adapter", str(folder), "name a run or an adapter")
    if given := [name for name, value in bare.items() if value is not None]:
        what = f"{given[0].replace('_', '-')} is for a bare adapter; a run knows it"
        raise ModelError(what, str(folder), "leave it out")
    return of_run(folder, terminal)


def of_run(folder: Path, terminal: Terminal) -> Trained:
    """A finished run's. Raises as ``finished.open_run``."""
    prepared, files = finished.open_run(folder, terminal)
    run = finished.run_of(prepared, files, terminal)
    held_out = prepared.held_out
    return Trained(
        base=run.base, name=prepared.recipe.model, commit=prepared.commit, sha256=run.identity.base,
        rope=prepared.recipe.rope, form=run.form(), folder=files.adapter,
        rows=held_out.examples if held_out else run.samples, run=run,
        by_peft=prepared.recipe.adapter.method != "lora",
    )  # fmt: skip


def of_adapter(
    folder: Path, terminal: Terminal, *,
    name: str | None = None, quantised_as: str | None = None, rows: Path | None = None,
) -> Trained:  # fmt: skip
    """A bare adapter folder's: ours, a weighted merge, or another program's in PEFT's format.

    Args:
        name: the base, where it is not the one that the folder names.
        quantised_as: of ``forms.MADE``, where its base was quantised in training and the folder does not say so.
        rows: a data file to compare on.

    Raises:
        ModelError: no LoRA, or no base, or not the base that it was trained on.
        DataError: rows that cannot be used.
    """
    config = _config(folder)
    record: dict[str, Any] = next((found for each in RECORDS if (found := read_json(folder / each))), {})
    made = record.get("base") if isinstance(record.get("base"), dict) else None
    known = made or {"name": record.get("base"), "commit": record.get("commit"), "sha256": record.get("base_sha256")}
    asked = name or known["name"] or config.get("base_model_name_or_path")
    if not isinstance(asked, str) or not asked:
        raise ModelError("this adapter names no base", str(folder), "name it: --model FOLDER or owner/name")
    found = source.find(asked, known["commit"] if asked == known["name"] else None)
    if found is None:
        fix = "name its folder with --model, or fetch it: finetune plan with `model:` set to it says how"
        raise ModelError(f"the base {asked} is not on this disk", str(folder), fix)
    base = bases.inspect(found.folder, record.get("rope"))
    base = bases.as_scorer(base) if config.get("task_type") == "SEQ_CLS" else base
    if faults := merge.empty(checkpoint.read_adapter(folder).weights):
        raise ModelError.of([fault._replace(where=str(folder)) for fault in faults[:20]])
    digests = base.digests(ByteBar.over(terminal, "verifying the base", base.files()).more)
    if known["sha256"] and known["sha256"] != digests:
        raise ModelError("the base is not the one that this adapter was trained on", asked, "name that one: --model")
    form = _form(record.get("form"), quantised_as, base)
    return Trained(
        base=base, name=asked, commit=found.commit, sha256=digests, rope=record.get("rope"), form=form, folder=folder,
        rows=rows_for(base, rows), run=None, by_peft=not _folds(folder, base, form),
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    """PEFT's config of an adapter folder. Raises ModelError where the adapter is none, or damaged."""
    config = read_json(folder / adapter_file.CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ModelError("adapter_config.json is no config of PEFT's", str(folder), "fetch the adapter again")
    if not (folder / adapter_file.WEIGHTS).is_file():
        what, fix = f"no {adapter_file.WEIGHTS} here", "fetch the adapter again"
        if (folder / "adapter_model.bin").is_file():
            what, fix = (
                "its weights are pickled, which can run code",
                "let PEFT load it and save it anew (save_pretrained)",
            )
        raise ModelError(what, str(folder), fix)
    if faults := manifest.faults(folder) if (folder / manifest.NAME).is_file() else []:
        raise ModelError(faults[0], str(folder), "fetch the adapter again")
    try:
        checkpoint.read_adapter(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"its weights cannot be read: {error}", str(folder), "fetch the adapter again") from None
    return config


def _folds(folder: Path, base: Base, form: BaseForm) -> bool:
    """Whether the fold alone knows all that this adapter does; of what is left, PEFT does."""
    read = checkpoint.read_adapter(folder)
    if read.config["peft_type"] != "LORA":
        return False
    try:
        adapter_file.read(folder)
        merge.make_plan(base, form, read.weights, read.config, replayed=True)
    except ModelError:
        return False
    return True


def _form(stored: Any, quantised_as: str | None, base: Base) -> BaseForm:
    """How the base is held for the comparison: as it was in training, as far as that is known."""
    machine = hardware.detect()
    kinds = [tensor.dtype for tensor in base.tensors.values()]
    own = "fp32" if max(set(kinds), key=kinds.count) == "F32" else "bf16"
    form: dict[str, Any] = {"weights": own, "double": True, "compute": own if machine.bf16 else "fp32"}
    form |= {"weights": base.shape.packing.kind} if base.shape.packing else {}
    form |= stored if isinstance(stored, dict) else {}
    form |= {"weights": quantised_as} if quantised_as else {}
    forms.refuse(form["weights"], base.shape.packing, "--quantised-as" if quantised_as else str(base.folder))
    return BaseForm(weights=form["weights"], double=form["double"], compute=form["compute"], device=machine.device)


def rows_for(base: Base, file: Path | None) -> list[Example]:
    """The rows of a data file, or the probes, as a model of this base is asked them; every token of a probe counts."""
    made = Renderer(
        tokenizer.of(base), base.stop_token, piecewise=base.piecewise, train_on="assistant" if file else "all"
    )
    if file is not None:
        found = read_rows(Reader(Source(path=str(file)), gather.special_tokens(made)))
    else:
        found = [Row(conversation=Conversation(turns), where=f"probe:{at}") for at, turns in enumerate(_talks(made), 1)]
    longest = min(_LONGEST, base.shape.max_positions)
    samples = [example for row in found for example in made.examples(row) if len(example.ids) <= longest]
    if not samples:
        raise ModelError(f"no row fits {longest} tokens", str(file), "give shorter rows")
    return samples


def _talks(renderer: Renderer) -> list[tuple[Turn, ...]]:
    """The probes as conversations where the base has a template, as plain texts where it has none."""
    if not renderer.tokenizer.chat_template:
        return [(Turn(role=TEXT, content=text),) for text in _PROBES]
    pairs = zip(_PROBES[::2], _PROBES[1::2], strict=True)
    return [(Turn(role="user", content=ask), Turn(role="assistant", content=answer)) for ask, answer in pairs]
