# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From raw files to a checked data set
#
# You begin with two raw files as they come in real life and end with a folder that can be trained on: every row
# checked, mended or left out by name, nothing held out that is also trained, and a manifest that notices one changed
# byte. No model is needed, and it takes seconds.
#
# Both files are real data that Python packages ship:
#
# * dates written out in twelve languages, from Unicode CLDR through the package `babel` (Unicode License v3, BSD
#   3-Clause);
# * the Python language reference, which CPython carries for `help()` in `pydoc_data.topics` (PSF License Version 2).

# %%
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from datetime import date, timedelta
from pathlib import Path
from pydoc_data.topics import topics

from babel.dates import format_date

from finetune import datacheck, datafix, manifest
from finetune.dataset import Reader, Source
from finetune.repeats import Met

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars of libraries, not ours

# %% [markdown]
# Everything is written into a folder that is removed at the end.

# %%
root = next(folder for folder in (Path.cwd(), Path.cwd().parent) if (folder / "recipes").is_dir())
place = tempfile.TemporaryDirectory(prefix="finetune-notebook-")
os.chdir(place.name)

# %% [markdown]
# ## The raw files
#
# The first is what a quick script writes: a date drawn at random, written in one of CLDR's four lengths, and its ISO
# 8601 form as the answer.

# %%
locales = ("en", "de", "fr", "es", "it", "pt", "nl", "sv", "da", "pl", "tr", "id")
draw = random.Random(0)
days = [date(1950, 1, 1) + timedelta(draw.randrange(36_525)) for _ in range(1_200)]
texts = [
    format_date(day, draw.choice(("full", "long", "medium", "short")), locale=draw.choice(locales)) for day in days
]
rows = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": day.isoformat()}]}
    for text, day in zip(texts, days, strict=True)
]

# %% [markdown]
# Files that went through several hands have faults that babel does not make, so we plant some that every collector
# meets: a role that somebody misspelt, NUL characters from a database, an answer that never came, and rows that were
# appended twice.

# %%
for row in rows[100:140]:
    row["messages"][1]["role"] = "asistant"
for row in rows[200:210]:
    row["messages"][0]["content"] += "\0"
rows[300]["messages"][1]["content"] = ""
rows += rows[400:430]
Path("dates-raw.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
print(len(rows), "rows, for example", rows[0]["messages"])

# %% [markdown]
# The second is the reference, cut into paragraphs. Nothing is planted in it: it brings its own surprise.

# %%
pieces = [{"text": part} for text in topics.values() for part in text.split("\n\n") if len(part) > 120]
Path("reference-raw.jsonl").write_text("\n".join(map(json.dumps, pieces)) + "\n")
print(len(pieces), "paragraphs of", len(topics), "topics, for example:\n")
print(pieces[2]["text"])

# %% [markdown]
# ## Check
#
# `datacheck.check` reads a source once and reports every row that cannot be trained (an error) or perhaps should not be
# (a warning), each with its line, its column, a code and what to do.

# %%
reports = [
    datacheck.check(Reader(Source(path=f"{name}-raw.jsonl"), datacheck.CONTROL)) for name in ("dates", "reference")
]
for report in reports:
    print(report.lines()[-1])
    print("   ", dict(report.counts))

# %% [markdown]
# The first finding of each kind, in full:

# %%
first = {(report.file, finding.code): finding for report in reports for finding in reversed(report.findings)}
print(*first.values(), sep="\n")

# %% [markdown]
# The surprise: one paragraph in five of the reference stands there twice, because topics of `help()` share their
# sections. A model would see those more often than anybody meant, and if a paragraph is held out while its copy is
# trained on, the score flatters.
#
# The same check from the command line, as one would run it in CI. It exits with 3 where there is an error.

# %%
command = [Path(sys.executable).with_name("finetune"), "data", "check", "dates-raw.jsonl"]
done = subprocess.run(command, capture_output=True, text=True)
print(done.stdout.splitlines()[0])
print(done.stdout.splitlines()[-1])
print("exit code", done.returncode)

# %% [markdown]
# ## Mend
#
# `datafix.fix` writes a repaired copy and a log. It changes only what is certain (a misspelt role, NUL), leaves out
# what cannot be trained and what stands there twice, and never touches the source.

# %%
for name in ("dates", "reference"):
    reader = Reader(Source(path=f"{name}-raw.jsonl"), datacheck.CONTROL)
    print(name, datafix.fix(reader, Path(f"{name}-mended.jsonl")))

# %%
log = [json.loads(line) for line in Path("dates-mended.jsonl.log.jsonl").read_text().splitlines()]
for (done, code), count in Counter((entry["done"], entry["code"]) for entry in log).items():
    print(f"{count:>3} {done}: {code}")
print(log[0])

# %% [markdown]
# ## What no check can know
#
# A check sees form, not truth. In the short form `3/5/19` is March in English and May in Spanish: the same question has
# two right answers, and without the language nobody can tell. Which texts of ours have several readings?

# %%
readings = defaultdict(set)
for day in (date(2019, 1, 1) + timedelta(n) for n in range(365)):
    for locale in locales:
        for form in ("full", "long", "medium", "short"):
            readings[format_date(day, form, locale=locale)].add((day, form))
doubtful = [found for found in readings.values() if len({day for day, _ in found}) > 1]
print("texts with several readings:", dict(Counter(form for found in doubtful for form in {form for _, form in found})))

# %% [markdown]
# Only the short form is ambiguous, so rows in it go. (`data/dates/make.py` makes the committed data set with the same
# rule, over every kind of year.) They are those without a letter.

# %%
mended = [json.loads(line) for line in Path("dates-mended.jsonl").read_text().splitlines()]
clear = [row for row in mended if any(char.isalpha() for char in row["messages"][0]["content"])]
print(len(mended), "rows,", len(clear), "of them clear; left out, for example:")
print([row["messages"][0]["content"] for row in mended if row not in clear][:6])

# %% [markdown]
# Near copies are left to you as well: whether a row that says nearly the same is wanted depends on the task. A finding
# names its row, so they can be looked at, and taken out, by number.

# %%
again = datacheck.check(Reader(Source(path="reference-mended.jsonl"), datacheck.CONTROL))
copies = {finding.row for finding in again.findings if finding.code == "near_duplicate"}
lines = Path("reference-mended.jsonl").read_text().splitlines()
paragraphs = [json.loads(line) for number, line in enumerate(lines, 1) if number not in copies]
print(f"{len(lines)} paragraphs, {len(copies)} of them near copies; two that are alike:\n")
row, other = next((f.row, int(f.message.split("row ")[1].split()[0])) for f in again.findings if "nearly" in f.message)
print(json.loads(lines[other - 1])["text"], json.loads(lines[row - 1])["text"], sep="\n\n")

# %% [markdown]
# The two differ in a few words, and those are all that matters: a machine that threw one away unasked would be wrong.
# We take such rows out all the same. They are few, and no held-out row shall nearly be a trained one.
#
# ## Split, and look for leaks
#
# What a careless split would have done, on the raw paragraphs: one in ten is held out, and then looked up among the
# rows that are trained.

# %%
raw = Path("reference-raw.jsonl").read_text().splitlines()
draw.shuffle(raw)
Path("careless-train.jsonl").write_text("\n".join(raw[len(raw) // 10 :]) + "\n")
Path("careless-eval.jsonl").write_text("\n".join(raw[: len(raw) // 10]) + "\n")
search = datacheck.Search()
trained = Met(near=search.near)
datacheck.check(Reader(Source(path="careless-train.jsonl")), search=search, met=trained)
leaks = datacheck.check(Reader(Source(path="careless-eval.jsonl")), search=search, trained=trained).counts["leak"]
print(f"{leaks} of {len(raw) // 10} held-out paragraphs are training rows too")

# %% [markdown]
# The same split of the rows that are left, into the folder of the finished data set.

# %%
Path("dataset").mkdir()
for name, kept in (("dates", clear), ("reference", paragraphs)):
    draw.shuffle(kept)
    held = len(kept) // 10
    Path(f"dataset/{name}-train.jsonl").write_text("\n".join(map(json.dumps, kept[held:])) + "\n")
    Path(f"dataset/{name}-eval.jsonl").write_text("\n".join(map(json.dumps, kept[:held])) + "\n")

# %%
for name in ("dates", "reference"):
    trained = Met(near=search.near)
    for part, met in (("train", {"met": trained}), ("eval", {"trained": trained})):
        source = Source(path=f"dataset/{name}-{part}.jsonl")
        report = datacheck.check(Reader(source, datacheck.CONTROL), search=search, **met)
        print(f"{source.path}: {report.rows} rows, {report.errors} errors, {dict(report.counts) or 'no findings'}")

# %% [markdown]
# No error, no copy, no leak.
#
# ## Seal it
#
# Whose data it is travels with the data. A manifest of digests, written last, says what belongs in the folder: the same
# bytes anywhere have the same digests.

# %%
shutil.copy(root / "data/dates/LICENSE", "dataset/LICENSE-dates")
Path("dataset/LICENSE-reference").write_text(
    "reference-*.jsonl: paragraphs of the Python language reference, from pydoc_data.topics of CPython "
    f"{sys.version_info.major}.{sys.version_info.minor}.\nCopyright Python Software Foundation, PSF License Version 2: "
    "https://docs.python.org/3/license.html\n"
)
manifest.write(Path("dataset"), manifest.digests(Path("dataset")))
for name, digest in manifest.digests(Path("dataset")).items():
    print(digest[:16], name)

# %%
print("as written:", manifest.faults(Path("dataset")) or "all holds")
with Path("dataset/dates-eval.jsonl").open("a") as file:
    file.write("\n")
print("one byte more:", manifest.faults(Path("dataset")))

# %% [markdown]
# In a recipe this data set is two sources, and every run records the digests of the files that it read:
#
# ```yaml
# data:
#   sources:
#     - path: dataset/dates-train.jsonl
#     - path: dataset/reference-train.jsonl
#   eval_path: dataset/dates-eval.jsonl
# ```
#
# How the model will see the rows is shown in [02](02-see-masks-and-packing.ipynb); how much of which source it should
# see, in [04](04-mix-sources.ipynb).

# %%
os.chdir(root)
place.cleanup()
