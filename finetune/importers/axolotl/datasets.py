"""axolotl's data sets: their paths, what their ``type`` makes of them, and which part is held out.

Facts of axolotl 0.19.0: `utils/schemas/datasets.py` (keys), `utils/data/rl.py` and `prompt_strategies/` with their
folders `dpo`, `kto`, `orpo` and `bradley_terry` (types and columns of rows that judge answers).
"""

from __future__ import annotations

from typing import Any

from finetune import importers
from finetune.foreign import Draft, Settings, short
from finetune.foreignparts import Origin, eval_rows, kept_back, train_rows

_LOST = ("shards", "drop_system_message", "message_field_training", "train_on_eos", "train_on_eot", "split_thinking")
_OWN_TEXT = {
    "instruction": "field_instruction",
    "input": "field_input",
    "output": "field_output",
    "system": "field_system",
}


def rows(made: Draft, settings: Settings, method: str) -> None:
    """``data:``, for rows that ``method`` trains on."""
    listed = settings.raw("datasets")
    if not isinstance(listed, list) or not listed:
        raise settings.stop("datasets", "missing", "name the data sets: a list of path and type")
    roles: set[str] = set()
    origins = [_origin(made, settings, "datasets", declared, roles, method) for declared in listed]
    train_rows(made, origins, "datasets")
    tests = settings.raw("test_datasets")
    tests = tests if isinstance(tests, list) else []
    judged = [_origin(made, settings, "test_datasets", one, roles, method) for one in tests]
    eval_rows(made, judged, "test_datasets")
    kept_back(made, settings, "val_set_size", "test_datasets" if judged else None)
    everything = settings.truth("train_on_inputs", default=False) or "user" in roles
    if method == "sft":
        made.put("data.train_on", "all" if everything else "assistant", "train_on_inputs", value=everything)
    template = settings.text("chat_template")
    if template and not template.startswith("tokenizer_default"):
        made.differs("chat_template", f"{short(template)} is axolotl's own text, not the tokenizer's template; here "
                                      "the "
                     "tokenizer's is used: compare one row with `finetune data show`")  # fmt: skip
    if settings.has("special_tokens", "tokens"):
        made.lost(
            "special_tokens", "the tokenizer is taken as it is published; trainable_tokens trains rows of its tokens"
        )
        settings.used.add("tokens")


def _origin(made: Draft, settings: Settings, key: str, declared: object, roles: set[str], method: str) -> Origin:
    if not isinstance(declared, dict) or not isinstance(declared.get("path"), str):
        raise settings.stop(key, "each must be a mapping with a path", "write `- path: …`")
    known = importers.known("axolotl.datasets")
    for word in declared:
        if word not in known:
            near = importers.near(str(word), known)
            made.differs(
                key,
                f"{short(str(word))} is no key of a data set there, and dropped without a word; {near}".rstrip("; "),
            )
    path, files = declared["path"], declared.get("data_files")
    if isinstance(files, list) and len(files) == 1:
        files = files[0]
    if path in ("json", "csv", "parquet") and isinstance(files, str):
        path = files
    elif files:
        made.lost(key, f"data_files of {short(path)}: name the files themselves in data.sources")
    for word in _LOST:
        if declared.get(word):
            made.lost(key, f"{word} of {short(path)}: every answer ends with its trained stop token here, and "
                           "`train: false` of a "
                      "message keeps it out of the loss")  # fmt: skip
    roles.update(map(str, declared.get("roles_to_train") or ()))
    path = settings.find(path)
    kind = {"sft": _kind, "kto": _labelled, "reward": _scored}.get(method, _pairs)
    format_name, columns = kind(made, key, path, declared)
    return Origin(
        path=path, format=format_name, columns=columns, split=str(declared.get("split") or "train"),
        subset=str(declared.get("name") or ""), revision=str(declared.get("revision") or ""),
    )  # fmt: skip


def _kind(made: Draft, key: str, path: str, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """``type`` of a data set: the format, and its columns where they are called otherwise."""
    kind = declared.get("type")
    if isinstance(kind, dict):
        made.differs(key, f"{short(path)} fills in a text of its own for each row there; here its fields become "
                          "turns of the "
                     "tokenizer's template")  # fmt: skip
        fields = {ours: str(kind.get(theirs) or ours) for ours, theirs in _OWN_TEXT.items()}
        return "alpaca", {ours: column for ours, column in fields.items() if column != ours}
    word = str(kind or "").partition(".")[0].partition(":")[0]
    if word == "completion":
        made.differs(
            key, f"{short(path)}: texts longer than sequence_len are cut into several there; here see data.over_length"
        )
        column = str(declared.get("field") or "text")
        return "text", {} if column == "text" else {"text": column}
    if word.startswith("alpaca"):
        made.differs(key, f"{short(path)}: type {short(kind)} writes its own text around the instruction (### "
                          "Instruction and the "
                     "like), with no chat template; here the tokenizer's template is used")  # fmt: skip
        return "alpaca", {}
    if word in ("chat_template", "sharegpt"):
        column = str(declared.get("field_messages") or ("conversations" if word == "sharegpt" else "messages"))
        if word == "sharegpt":
            made.differs(key, "type sharegpt is refused by axolotl now: it is read as type chat_template")
        if column == "conversations":
            return "sharegpt", {}
        return "chat", {} if column == "messages" else {"messages": column}
    made.lost(
        key, f"{short(path)}: type {short(kind)} has no format of its name here; the columns decide (data.format: auto)"
    )
    return "auto", {}


def _pairs(made: Draft, key: str, path: str, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """``type`` of a data set of pairs: its columns where they are called otherwise."""
    kind, here = declared.get("type"), made.settings.place.columns(path)
    if isinstance(kind, dict):
        return "preference", _fields(made, key, path, kind, ("prompt", "chosen", "rejected"))
    word, _, way = str(kind or "").partition(".")
    if word == "chat_template":
        asked = {} if way == "argilla_chat" else {"messages": "messages"}
        names = {**asked, "chosen": "chosen", "rejected": "rejected"}
        fields = {ours: str(declared.get(f"field_{ours}") or column) for ours, column in names.items()}
        return "preference", {ours: column for ours, column in fields.items() if column != ours}
    _own_text(made, key, path, word, kind)
    found: dict[str, str] = {}
    if here is not None and "chosen" not in here and "chosen_response" in here:
        found = {"chosen": "chosen_response", "rejected": "rejected_response"}
    if way == "icr" or (here is not None and "input" in here and not set(here) & {"prompt", "instruction", "question"}):
        found["prompt"] = "input"
    return "preference", found


def _scored(made: Draft, key: str, path: str, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The same of a reward model, whose one type has one question under ``input``."""
    kind = declared.get("type")
    if str(kind or "").partition(".")[0] == "bradley_terry":
        return "preference", {"prompt": "input"}
    made.differs(key, f"{short(path)}: reward_model needs type bradley_terry.chat_template there; type "
                 f"{short(kind)} is read as pairs")  # fmt: skip
    return _pairs(made, key, path, declared)


def _labelled(made: Draft, key: str, path: str, declared: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """The same of answers with a label."""
    kind = declared.get("type")
    if isinstance(kind, dict):
        return "kto", _fields(made, key, path, kind, ("prompt", "completion", "label"))
    word, _, way = str(kind or "").partition(".")
    _own_text(made, key, path, word, kind)
    asked = {"argilla": "instruction", "intel": "question"}.get(way)
    if way == "argilla_chat":
        return "kto", {"messages": "completion"}
    return "kto", {"prompt": asked} if asked else {}


def _fields(made: Draft, key: str, path: str, kind: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    if any(kind.get(f"{part}_format") for part in names):
        made.differs(key, f"{short(path)} writes a text of its own around each part there; here they are turns of the "
                     "tokenizer's template")  # fmt: skip
    fields = {ours: str(kind.get(f"field_{ours}") or ours) for ours in names}
    return {ours: column for ours, column in fields.items() if column != ours}


def _own_text(made: Draft, key: str, path: str, word: str, kind: object) -> None:
    if word in ("chatml", "llama3", "zephyr"):
        made.differs(key, f"{short(path)}: type {short(kind)} writes {word}'s marks itself, whatever the tokenizer's "
                     "template is; here that template is used")  # fmt: skip
    elif word in ("", "passthrough"):
        made.differs(key, f"{short(path)}: prompt and answers were taken as they stand, with no template and no stop "
                     "token; here the tokenizer's template is used")  # fmt: skip
