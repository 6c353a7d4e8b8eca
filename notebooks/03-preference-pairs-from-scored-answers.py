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
# # Preference pairs from scored answers
#
# You begin with questions that have several answers each, score the answers, and end with a file of pairs (a chosen and
# a rejected ending) that is checked, that you have looked at token by token, and that does not teach length by mistake.
#
# `finetune` reads, checks and shows such pairs, and `objective: {method: dpo}` (or orpo, simpo) trains on them.
#
# The questions are the committed dates (Unicode CLDR, through `babel`; Unicode License v3).

# %%
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from datetime import date
from difflib import SequenceMatcher
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from babel.dates import format_date

from finetune import datacheck, datashow, look
from finetune.dataset import Reader, Source

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars of libraries, not ours

# %% [markdown]
# Everything is written into a folder that is removed at the end. Where the 135M base has been fetched (`make base`) its
# tokenizer is used, else that of a tiny base made on the spot.

# %%
root = next(folder for folder in (Path.cwd(), Path.cwd().parent) if (folder / "recipes").is_dir())
plt.style.use(root / "notebooks/plain.mplstyle")
place = tempfile.TemporaryDirectory(prefix="finetune-notebook-")
os.chdir(place.name)
os.environ["XDG_CACHE_HOME"] = place.name
real = root / "data/bases/smollm2-135m-instruct"
if real.is_dir():
    Path("base").symlink_to(real)
    print("tokenizer and template of SmolLM2-135M-Instruct")
else:
    subprocess.run(
        [sys.executable, root / "data/make_tiny_base.py", "--into", "base"], check=True, stdout=subprocess.DEVNULL
    )
    print("tokenizer and template of the tiny base: nearly one token a byte (make base fetches a real one)")

# %% [markdown]
# ## Several answers to each question
#
# In practice they are drawn from a model. Here each question gets the right answer and five that go wrong in the ways
# in which models do.

# %%
questions = []
for line in (root / "data/dates/train.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
    text, truth = (message["content"] for message in json.loads(line)["messages"][1:])
    day = date.fromisoformat(truth)
    wrong = {
        "in a sentence": f"{truth} is the date in ISO 8601 form.",
        "day and month exchanged": f"{day:%Y-%d-%m}",
        "another month": f"{day.year}-{day.month % 12 + 1:02}-{day.day:02}",
        "no leading zeros": f"{day.year}-{day.month}-{day.day}",
        "English words": format_date(day, "long", locale="en"),
    }
    questions.append((text, truth, wrong))
print(questions[0][0], "→", *questions[0][1:])

# %% [markdown]
# ## Scores
#
# The score says how near an answer comes to the truth, from 0 to 1: difflib's ratio of what both have in common. The
# exact answer has 1.

# %%
scored = []
for text, truth, wrong in questions:
    for mistake, answer in wrong.items():
        score = SequenceMatcher(None, answer, truth).ratio()
        scored.append({"prompt": text, "right": truth, "answer": answer, "mistake": mistake, "score": score})
Path("scored.jsonl").write_text("\n".join(map(json.dumps, scored)) + "\n")
for row in scored[:5]:
    print(f"{row['score']:.2f}  {row['answer']}")

# %% [markdown]
# ## Pairs, the quick way
#
# The right answer is chosen and every other one rejected. The check finds what is wrong with that: on the third of
# March both orders are the same text, and there is nothing to prefer.

# %%
quick = [{"prompt": row["prompt"], "chosen": row["right"], "rejected": row["answer"]} for row in scored]
Path("quick.jsonl").write_text("\n".join(map(json.dumps, quick)) + "\n")
report = datacheck.check(Reader(Source(path="quick.jsonl", format="preference"), datacheck.CONTROL))
print(report.lines()[0])
print(report.lines()[-1])

# %% [markdown]
# ## Pairs with a margin
#
# A pair is worth something where the scores are clearly apart. With a margin the equal answers go by themselves, and so
# do those that are only a little worse.

# %%
margin = 0.08
gaps = np.array([1 - row["score"] for row in scored])
mistakes = list(questions[0][2])
fig, ax = plt.subplots()
ax.hist([gaps[place :: len(mistakes)] for place in range(len(mistakes))], 40, stacked=True, label=mistakes)
ax.axvline(margin, color="#555555", linestyle=":")
ax.set(xlabel="score of the right answer minus score of the other", ylabel="pairs")
ax.set_title(f"A margin of {margin} keeps {(gaps >= margin).sum():,} of {len(gaps):,} pairs")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
kept = [row for row, gap in zip(quick, gaps, strict=True) if gap >= margin]
Path("pairs.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
report = datacheck.check(Reader(Source(path="pairs.jsonl", format="preference"), datacheck.CONTROL))
print(*report.lines(), sep="\n")

# %% [markdown]
# ## Both endings, token by token
#
# What is in ⟦brackets⟧ would be in the loss. The prompt is the same, and only the ending differs.

# %%
recipe = Path("recipe.yaml")
recipe.write_text("""\
model: base
quantize: {weights: nf4, compute: fp32}
adapter: {method: lora, r: 8, lora_alpha: 16}
objective: {method: dpo}
data: {train_path: pairs.jsonl, format: preference}
train: {epochs: 1, examples_per_step: 8, max_length: 256, learning_rate: 0.001}
tracker: none
output: run
""")
for one in look.rows(recipe, (), 1, 1):
    print(*datashow.lines(one, colour=False), sep="\n")

# %% [markdown]
# ## Length bias
#
# An objective on pairs also learns whatever else tells the two endings apart. If the rejected one tends to be longer,
# "shorter" is learned as "better", and no score said that. So compare their lengths, in the model's tokens.

# %%
sizes = np.array([sum(one.example.supervised) for one in look.rows(recipe, (), None, len(kept))]).reshape(-1, 2)
difference = sizes[:, 1] - sizes[:, 0]
fig, ax = plt.subplots()
ax.hist(difference, np.arange(difference.min(), difference.max() + 2) - 0.5)
ax.axvline(0, color="#555555", linestyle=":")
ax.set(xlabel="rejected minus chosen (tokens)", ylabel="pairs")
ax.set_title(f"The rejected ending is {difference.mean():.1f} tokens longer on average")
plt.show()

# %% [markdown]
# The sentences make it so. A remedy that loses no question: of each question keep one pair, any of those whose endings
# are nearest in length.

# %%
draw = random.Random(0)
by_length = sorted(zip(np.abs(difference), kept, strict=True), key=lambda one: (one[0], draw.random()))
even = {}
for _, pair in by_length:
    even.setdefault(pair["prompt"], pair)
Path("pairs.jsonl").write_text("\n".join(map(json.dumps, even.values())) + "\n")
print(len(even), "pairs")

# %%
sizes = np.array([sum(one.example.supervised) for one in look.rows(recipe, (), None, len(even))]).reshape(-1, 2)
after = sizes[:, 1] - sizes[:, 0]
edges = np.arange(min(difference.min(), after.min()), max(difference.max(), after.max()) + 2) - 0.5
fig, ax = plt.subplots()
ax.hist([difference, after], edges, density=True, label=["all pairs", "nearest in length"])
ax.axvline(0, color="#555555", linestyle=":")
ax.set(xlabel="rejected minus chosen (tokens)", ylabel="share of the pairs")
ax.set_title(f"Rejected endings are {after.mean():.1f} tokens longer, {difference.mean():.1f} before")
ax.legend()
plt.show()

# %% [markdown]
# The last look before such a file is used: is it still whole, and which mistakes are left in it?

# %%
report = datacheck.check(Reader(Source(path="pairs.jsonl", format="preference"), datacheck.CONTROL))
print(report.lines()[-1])
names = {(row["prompt"], row["answer"]): row["mistake"] for row in scored}
print(Counter(names[pair["prompt"], pair["rejected"]] for pair in even.values()))

# %% [markdown]
# Length tells nothing any more, and there is a price: mistakes of another length are gone from the file. A model that
# answers in sentences is better taught by rows that show the right form.

# %%
os.chdir(root)
place.cleanup()
