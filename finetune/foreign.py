"""Another trainer's settings, read key by key, and the recipe that is drafted from them with what became of each key.

Nothing here knows a trainer. A setting is *taken* (it has a counterpart here), *lost* (it has none, and why), or said
to *differ*: it meant something there that its writer may not have known.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import Fault, FinetuneError, RecipeError

_YES = ("true", "yes", "on", "y", "1")
_NO = ("false", "no", "off", "n", "0")
_MOST = 1e15
_SAME = object()
ONE_UPDATE = "a recipe names no devices (`--processes N` takes several); all rows of a step still make one update"
"""Of what a trainer spreads over devices."""

# Words of keys that no recipe has, and why; the first that fits is said.
_REASONS = (
    (r"hub|push_", "publishing is a verb of its own: finetune push"),
    (r"trust_remote_code", "code that comes with a model or a data set is never run here"),
    (r"token$|api_key|secret|webhook", "secrets come from the environment alone (HF_TOKEN, WANDB_API_KEY)"),
    (r"^(env|ENV)$|env_|model_kwargs", "a recipe sets no environment variables"),
    (r"logging|report|run_name|wandb|mlflow|swanlab|comet|trackio|tensorboard|plot_loss|tqdm|^log_|profil|project",
     "every run writes metrics.jsonl and report.html; curves go where `tracker:` says"),
    (r"deepspeed|fsdp|ddp|device_map|parallel|^ray|local_rank|accelerator|zero_|max_memory|world_size|tpu|backend$",
     ONE_UPDATE),
    (r"checkpointing|flash|attn|attention|liger|kernel|compil|tf32|low_cpu|dataloader|num_proc|num_workers|processes|"
     r"pad_to|padding|group_by_length|offload|vllm|fused|lazy|unsloth|memory|pin|use_cache|dtype|empty_cache|bf16_full",
     "it says how numbers are computed, not which: `finetune plan` chooses that and prints it"),
    (r"cache|overwrite|prepared_path|tokenized_path|^do_|save_only|safetensors|remove_unused|add_version|strict",
     "housekeeping of that program"),
    (r"early_stop|load_best", "it needs held-out rows and evaluations on the way: evaluate.every"),
    (r"predict|generat|eval_batch|device_eval|eval_table|eval_max|beams|temperature|top_|metric|eval_",
     "held-out rows are judged as `evaluate:` says, base against adapter"),
    (r"resume", "the same command goes on where a run was interrupted"),
)  # fmt: skip


class Taken(NamedTuple):
    """A setting that has a counterpart: its keys there, the effective value, whether it was written or a default."""

    keys: tuple[str, ...]
    value: Any
    written: bool
    recipe: str
    becomes: Any
    note: str

    def __str__(self) -> str:
        source = "" if self.written else " (its default)"
        left = f"{' × '.join(self.keys)} = {short(self.value)}{source}"
        note = f"   {self.note}" if self.note else ""
        return f"{left} → {self.recipe}: {short(self.becomes)}{note}"


class Remark(NamedTuple):
    """``kind``: lost (no counterpart here), or differs (it silently meant something else there)."""

    kind: str
    key: str
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" if self.key else self.what


@dataclass(frozen=True, kw_only=True)
class Place:
    """What can be asked about this machine without running or fetching anything.

    ``columns``: of a data file's first row, None where it is not here. ``reach``: a model's longest context, likewise.
    """

    columns: Callable[[str], Sequence[str] | None]
    reach: Callable[[str], int | None]


@dataclass(kw_only=True)
class Settings:
    """The keys of one file. A value of the wrong kind becomes a fault with its place; ``refuse`` raises them all.

    ``program``: the word of a command line that named the program, such as dpo; empty where there was none.
    """

    trainer: str
    file: Path
    values: Mapping[str, Any]
    place: Place
    lines: Mapping[str, int] = field(default_factory=dict)
    program: str = ""
    devices: int | None = None
    used: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    def where(self, key: str) -> str:
        line = self.lines.get(key)
        return f"{self.file}:{line}: {key}" if line else f"{self.file}: {key}"

    def has(self, *keys: str) -> bool:
        """Whether one of them is written; an empty key is as good as none."""
        return any(self.values.get(key) is not None for key in keys)

    def raw(self, key: str) -> Any:
        self.used.add(key)
        return self.values.get(key)

    def fault(self, key: str, what: str, fix: str = "") -> None:
        self.faults.append(Fault(what, self.where(key), fix))

    def refuse(self) -> None:
        if self.faults:
            raise RecipeError.of(self.faults)

    def stop(self, key: str, what: str, fix: str = "") -> FinetuneError:
        """The error of something that has no meaning here at all, with whatever was wrong before it."""
        return RecipeError.of([*self.faults, Fault(what, self.where(key), fix)])

    def number(self, key: str, default: float) -> float:
        found = self.given(key)
        return default if found is None else found

    def given(self, key: str) -> float | None:
        """A number, also as text (PyYAML reads 1e-4 as text, and the trainers turn it into a number); else None."""
        value = self.raw(key)
        if value is None:
            return None
        try:
            number = None if isinstance(value, bool | list | dict) else float(value)
        except (ValueError, OverflowError):
            number = None
        if number is None or not abs(number) < _MOST:
            self.fault(key, f"must be a number; found {short(value)}")
            return None
        return value if isinstance(value, int | float) else number

    def count(self, key: str, default: int, least: int = 1) -> int:
        number = self.number(key, default)
        if number != int(number) or number < least:
            self.fault(key, f"must be a whole number, at least {least}; found {short(number)}")
            return default
        return int(number)

    def truth(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        word = str(value).lower()
        if word not in (*_YES, *_NO):
            self.fault(key, f"must be true or false; found {short(value)}")
            return default
        return word in _YES

    def text(self, key: str, default: str = "") -> str:
        value = self.raw(key)
        if isinstance(value, list | dict):
            self.fault(key, "must be one word")
            return default
        if isinstance(value, bool):
            return str(value).lower()
        return default if value is None else str(value)

    def items(self, key: str) -> list[str]:
        """A list, or words between commas."""
        value = self.raw(key)
        if isinstance(value, list):
            if any(isinstance(one, list | dict) or one is None for one in value):
                self.fault(key, "must be a list of words")
                return []
            return [str(one) for one in value]
        if isinstance(value, dict):
            self.fault(key, "must be a list of words")
            return []
        return [] if value is None else [word.strip() for word in str(value).split(",") if word.strip()]

    def find(self, name: str) -> str:
        """A path as it is reached from here: as written, or from the folder of the file or one of those above it."""
        if not name or Path(name).is_absolute() or Path(name).exists():
            return name
        for folder in list(self.file.absolute().parents)[:5]:
            if (folder / name).exists():
                try:
                    return str((folder / name).relative_to(Path.cwd()))
                except ValueError:
                    return str(folder / name)
        return name


@dataclass(kw_only=True)
class Course:
    """How long and how much at a time, before the rows are counted; ``hftrainer.settle`` makes steps of shares.

    ``warmup``, ``save``, ``evaluate``: a number of steps, or below 1 a share of all; ``save`` and ``evaluate`` may be
    ``epoch`` or ``no``. ``passes``: what becomes of a pass's last, short step: taken, dropped, or filled (joined).
    ``held``: rows held out, or a share of them.
    """

    micro: int
    accumulation: int
    devices: int
    steps: int | None
    epochs: float
    warmup: float
    warmup_keys: tuple[str, ...]
    save: float | str
    evaluate: float | str
    save_keys: tuple[str, ...] = ("save_strategy", "save_steps")
    evaluate_keys: tuple[str, ...] = ("eval_strategy", "eval_steps")
    packed: bool = False
    passes: str = "taken"
    least_warmup: Callable[[int], int] = lambda steps: steps
    rounding: Callable[[float], int] = int
    held: float = 0.0
    held_key: str = ""

    @property
    def per_step(self) -> int:
        return self.micro * self.accumulation * self.devices


@dataclass(kw_only=True)
class Draft:
    """The recipe so far: its keys with value and comment, and what is to be said about the settings."""

    settings: Settings
    version: str
    lines: dict[str, tuple[Any, str]] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    remarks: list[Remark] = field(default_factory=list)
    course: Course | None = None

    def put(self, recipe: str, becomes: Any, *keys: str, value: Any = _SAME, note: str = "") -> None:
        """A recipe's key, from the keys that it had there; ``value``: what that was, where it is not the same."""
        written = self.settings.has(*keys)
        self.taken = [one for one in self.taken if one.recipe != recipe]  # a later reading knows better
        self.taken.append(Taken(keys, becomes if value is _SAME else value, written, recipe, becomes, note))
        origin = " × ".join(keys) if written else f"{keys[0]} was not set: {self.settings.trainer}'s default"
        self.lines[recipe] = (becomes, f"{origin}; {note}" if note else origin)

    def add(self, recipe: str, becomes: Any, comment: str) -> None:
        """A recipe's key that has none there."""
        self.lines[recipe] = (becomes, comment)

    def lost(self, key: str, what: str) -> None:
        self.settings.used.add(key)
        self.remarks.append(Remark("lost", key, what))

    def differs(self, key: str, what: str) -> None:
        self.remarks.append(Remark("differs", key, what))

    def leftovers(self, known: Sequence[str], unknown: str) -> None:
        """Every key that was written and not read: one without counterpart, or (``unknown``: then what?) a slip."""
        for key, value in self.settings.values.items():
            if key in self.settings.used or value is None:
                continue
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
                meant = f"; did you mean {near[0]!r}?" if near else ""
                self.differs(key, f"{unknown}{meant}")
            elif value is not False:
                self.lost(key, reason(key))


def reason(key: str) -> str:
    """Why a recipe has no such key."""
    return next((why for words, why in _REASONS if re.search(words, key)), "there is no such choice here")


def short(value: Any) -> str:
    """A value as a recipe would write it, on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(short, value))}]"
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
