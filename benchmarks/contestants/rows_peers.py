"""`datasets` and TRL on the same rows: what one writes after reading their documentation, and the fastest of it.

Every contestant opens the file itself, with caches in the folder that it is given. Answers are marked as `finetune`
marks them: their tokens and the stop token behind each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from transformers import AutoTokenizer

from benchmarks.contestants.rows import Call, Told, digest, serve

IGNORED = -100
ROLES = {"system", "user", "assistant", "tool"}
_MARKED = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n'}}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The base's own template with TRL's marks around what is trained: without them neither library knows the answers."""


@cache
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@cache
def marked(folder: str) -> Any:
    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = found.apply_chat_template(probe, tokenize=False)
    found.chat_template = _MARKED
    if found.apply_chat_template(probe, tokenize=False) != plain:
        raise RuntimeError("the marked template renders other text than the base's own")
    return found


def opened(call: Call) -> Dataset:
    return load_dataset("json", data_files=call.file, split="train", cache_dir=call.folder)


def warm(call: Call) -> Told:
    """Load what a run would have loaded before its data."""
    tokenizer(call.base)
    marked(call.base)
    trainer(call.base)
    return dict


def mapped(call: Call) -> Told:
    """A function of a row, as written in most scripts: each answer is found by rendering what precedes it."""
    reads = tokenizer(call.base)

    def prepare(row: Mapping[str, Any]) -> dict[str, Any]:
        messages = row["messages"]
        ids = reads.apply_chat_template(messages, return_dict=False)
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = reads.apply_chat_template(messages[:index], add_generation_prompt=True, return_dict=False)
                upto = reads.apply_chat_template(messages[: index + 1], return_dict=False)
                labels[len(before) : len(upto)] = ids[len(before) : len(upto)]
        return {"input_ids": ids, "labels": labels, "length": len(ids)}

    rows = opened(call).map(prepare, num_proc=call.processes, remove_columns=["messages"])
    rows = rows.filter(lambda length: length <= call.window, input_columns="length", num_proc=call.processes)
    return lambda: told(rows, call)


def mapped_in_batches(call: Call) -> Told:
    """The fastest way there is in `datasets`: batches, marks in the template, long rows left out on the way."""
    reads = marked(call.base)

    def prepare(batch: Mapping[str, Any]) -> dict[str, Any]:
        found = reads.apply_chat_template(batch["messages"], return_dict=True, return_assistant_tokens_mask=True)
        pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
        kept = [(ids, mask) for ids, mask in pairs if len(ids) <= call.window]
        labels = [
            [token if mark else IGNORED for token, mark in zip(ids, mask, strict=True)] for ids, mask in kept
        ]  # fmt: skip
        return {"input_ids": [ids for ids, _ in kept], "labels": labels}

    rows = opened(call).map(prepare, batched=True, num_proc=call.processes, remove_columns=["messages"])
    return lambda: told(rows, call)


@cache
def trainer(folder: str) -> Any:
    """TRL's own trainer around a model of a few numbers, for the sake of how it prepares a data set."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

    reads = marked(folder)
    shape = LlamaConfig(
        vocab_size=len(reads), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    return SFTTrainer(
        model=LlamaForCausalLM(shape), processing_class=reads, train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=tempfile.gettempdir(), assistant_only_loss=True, report_to="none", use_cpu=True,
            disable_tqdm=True, bf16=False, save_strategy="no", shuffle_dataset=False,
        ),
    )  # fmt: skip


def trl(call: Call) -> Told:
    """What `SFTTrainer` does to a data set before it trains: it is the very method that its constructor calls."""
    made = trainer(call.base)
    args = made.args
    args.max_length, args.dataset_num_proc, args.packing = call.window, call.processes, bool(call.options["packing"])
    rows = made._prepare_dataset(opened(call), made.processing_class, args, args.packing, None, "train")
    return lambda: told(rows, call)


def told(rows: Dataset, call: Call) -> dict[str, Any]:
    """Counts of what came out; of packed rows the samples within."""
    columns = rows.with_format("arrow")
    samples = tokens = supervised = 0
    for table in columns.iter(batch_size=1000):
        tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
        supervised += pc.sum(pc.not_equal(pc.list_flatten(table["labels"]), IGNORED)).as_py()
        samples += len(pc.list_flatten(table["seq_lengths"])) if "seq_lengths" in table.column_names else len(table)
    found: dict[str, Any] = {"samples": samples, "tokens": tokens, "supervised": supervised}
    if call.options.get("digests"):
        stop = tokenizer(call.base).convert_tokens_to_ids("<|im_end|>")
        found["digests"] = [
            digest(row["input_ids"], [label != IGNORED for label in row["labels"]], stop) for row in rows
        ]
    return found


def check(call: Call) -> Told:
    """The checks that scripts write: a list of messages, known roles in turn, texts, an answer at the end."""
    rows = opened(call).map(lambda row: {"sound": sound(row["messages"])}, num_proc=call.processes)
    return lambda: {"rows": len(rows), "trainable": sum(rows["sound"])}


def sound(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages or messages[-1]["role"] != "assistant":
        return False
    before = None
    for message in messages:
        if message["role"] not in ROLES or message["role"] == before:
            return False
        if not isinstance(message["content"], str) or not message["content"].strip():
            return False
        before = message["role"]
    return True


def lay_out(call: Call) -> Told:
    """Tokenised rows of given lengths on the disk, as packing finds them. Not timed."""

    def rows() -> Iterator[dict[str, Any]]:
        for length in call.options["lengths"]:
            yield {"input_ids": list(range(length)), "labels": list(range(length))}

    Dataset.from_generator(rows, cache_dir=call.folder).save_to_disk(Path(call.folder, "rows"))
    return dict


def pack(call: Call) -> Told:
    """`pack_dataset`, whole batches of rows at a time: TRL's 1,000, or ``batch``."""
    from trl import pack_dataset  # type: ignore[attr-defined]  # exported lazily

    how = {"num_proc": call.processes, "load_from_cache_file": False}
    if call.options.get("batch"):
        how["batch_size"] = call.options["batch"]
    packed = pack_dataset(load_from_disk(str(Path(call.folder, "rows"))), call.window, "bfd", how)

    def found() -> dict[str, Any]:
        tokens = sum(map(sum, packed["seq_lengths"]))
        return {"packs": len(packed), "fill": tokens / (len(packed) * call.window)}

    return found


if __name__ == "__main__":
    disable_progress_bars()
    serve({
        "warm": warm, "mapped": mapped, "mapped_in_batches": mapped_in_batches, "trl": trl, "check": check,
        "lay_out": lay_out, "pack": pack,
    })  # fmt: skip
