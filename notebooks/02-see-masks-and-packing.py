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
# # See masks and packing
#
# You see what a model will see: which tokens of a row are in the loss, how long the samples are, how they are packed
# into micro-batches, and what stands in the data twice. Nothing is trained, and no weights are loaded into a model.
#
# The rows are the committed dates (Unicode CLDR, Unicode License v3) and the Python language reference that CPython
# carries in `pydoc_data.topics` (PSF License Version 2).

# %%
import html
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.colors import ListedColormap

from finetune import datacheck, datashow, look, plan, prepare, schedule
from finetune.dataset import Reader, Source

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars of libraries, not ours
logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # lengths are judged by finetune

# %% [markdown]
# Everything is written into a folder that is removed at the end; rows as ids are kept there too, not in your own cache.
# Where the 135M base has been fetched (`make base`) its tokenizer is used, else that of a tiny base made on the spot.

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
# ## Two sources and a recipe
#
# Of the dates we make talks of three questions each. In every talk the second answer is context only, and the third
# counts half: that is how a row says that an answer is doubtful.

# %%
dates = [
    json.loads(line)["messages"] for line in (root / "data/dates/train.jsonl").read_text(encoding="utf-8").splitlines()
]
talks = []
for one, two, three in zip(dates[0:600:3], dates[1:600:3], dates[2:600:3], strict=True):
    context, half = {**two[2], "train": False}, {**three[2], "weight": 0.5}
    talks.append({"messages": [*one, two[1], context, three[1], half]})
Path("talks.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n")
Path("reference.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in topics.values()) + "\n")
Path("recipe.yaml").write_text("""\
model: base
quantize: {weights: nf4, compute: fp32}
adapter: {method: lora, r: 8, lora_alpha: 16}
data:
  sources:
    - path: talks.jsonl
    - path: reference.jsonl
  over_length: split
train: {epochs: 1, tokens_per_step: 16384, micro_batch_tokens: 2048, max_length: 1024, learning_rate: 0.001}
tracker: none
output: run
""")
print(len(talks), "talks,", len(topics), "topics")

# %% [markdown]
# ## One row, token by token
#
# What is in ⟦brackets⟧ is trained: the first answer and the third one, each with the token that ends it. The second
# answer is read, and not learned.

# %%
recipe = Path("recipe.yaml")
for one in look.rows(recipe, (), 1, 1):
    print(*datashow.lines(one, colour=False), sep="\n")

# %% [markdown]
# The same as a page, with each token's id, turn and weight under the pointer. (A preview that takes frames out, like
# that of GitHub, shows nothing here.) `finetune data show recipe.yaml --html page.html` writes it to a file.

# %%
page = datashow.page("The first talk", look.rows(recipe, (), 1, 1))
display(
    HTML(f'<div><iframe sandbox srcdoc="{html.escape(page)}" style="width:100%;height:30rem;border:0"></iframe></div>')
)

# %% [markdown]
# ## Lengths
#
# `prepare` does what `finetune plan` does: it checks everything and returns the samples as they will be trained. A
# topic that is longer than `max_length` was split, and each piece begins with the last token of the one before.

# %%
prepared = prepare.prepare(recipe, training=False)
samples = prepared.samples
names = np.repeat([part.name for part in samples.part_list()], [part.samples for part in samples.part_list()])
talk, text = names == "talks.jsonl", names == "reference.jsonl"
for note in prepared.plan.notes:
    print("-", note)

# %%
share = samples.lengths[text].sum() / samples.lengths.sum()
edges = np.geomspace(samples.lengths.min(), samples.lengths.max() + 1, 30)
fig, ax = plt.subplots()
ax.hist([samples.lengths[talk], samples.lengths[text]], edges, stacked=True, label=["talks", "reference"])
ax.set(xscale="log", xlabel="length of a sample (tokens)", ylabel="samples")
ax.set_title(f"{text.mean():.0%} of the samples are reference, but {share:.0%} of the tokens")
ax.legend()
plt.show()

# %% [markdown]
# So a mixture by rows is not a mixture by tokens. What the model learns from goes by tokens; that is why `data.sources`
# mixes by share of the tokens ([04](04-mix-sources.ipynb)).
#
# ## How much of it is trained

# %%
trained = samples.supervised / samples.lengths
total = {
    name: samples.supervised[one].sum() / samples.lengths[one].sum()
    for name, one in (("talks", talk), ("reference", text))
}
fig, ax = plt.subplots()
ax.hist([trained[talk], trained[text]], np.linspace(0, 1, 41), stacked=True, label=["talks", "reference"])
ax.set(xlabel="share of a sample's tokens that is in the loss", ylabel="samples")
ax.xaxis.set_major_formatter("{x:.0%}")
ax.set_title(f"{total['talks']:.0%} of a talk's tokens are trained, {total['reference']:.0%} of plain text's")
ax.legend()
plt.show()

# %% [markdown]
# ## Packing
#
# A step takes samples up to `tokens_per_step`; they are packed into as few micro-batches as best fit finds. A sample
# sees only itself in there, so packing changes what a step costs and not what it learns.

# %%
steps = plan.course_steps(prepared.recipe, samples.lengths.tolist(), samples.part_list())
limit = prepared.plan.micro_batch_tokens
packs = [
    [[step[place] for place in pack] for pack in schedule.pack(samples.lengths[list(step)].tolist(), limit)]
    for step in steps
]
print(f"{len(steps)} steps, {sum(map(len, packs))} micro-batches of at most {limit} tokens")

# %%
grid = np.zeros((len(packs[0]), limit))
for row, pack in enumerate(packs[0]):
    marks = [2 + turn % 2 if inside else 1 for turn, sample in enumerate(pack) for inside in samples[sample].supervised]
    grid[row, : len(marks)] = marks
fill = np.count_nonzero(grid) / grid.size
colours = ListedColormap(["white", "#aaaaaa", "#0072B2", "#56B4E9"])  # room, read, trained, trained
fig, ax = plt.subplots()
ax.imshow(grid, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=3)
ax.hlines(np.arange(len(packs[0]) - 1) + 0.5, 0, limit, color="white")
ax.set(xlabel="token of the micro-batch", ylabel="micro-batch", yticks=range(len(packs[0])))
ax.set_title(f"The first step's micro-batches are {fill:.0%} full: grey is read, blue is trained")
plt.show()

# %% [markdown]
# Light and dark blue change from sample to sample. The usual other way is padding: batches of eight samples in the
# order they come, each as wide as its longest one.

# %%
packed, padded = [], []
for step, found in zip(steps, packs, strict=True):
    lengths = samples.lengths[list(step)]
    batches = [lengths[start : start + 8] for start in range(0, len(lengths), 8)]
    packed.append(lengths.sum() / (len(found) * limit))
    padded.append(lengths.sum() / sum(len(batch) * batch.max() for batch in batches))
fig, ax = plt.subplots()
ax.plot(range(1, len(steps) + 1), packed, "o-", label="packed: of the room in its micro-batches")
ax.plot(range(1, len(steps) + 1), padded, "s--", label="padded: of the tokens computed")
ax.set(xlabel="step", ylabel="share of real tokens", ylim=(0, 1.05))
ax.yaxis.set_major_formatter("{x:.0%}")
ax.set_title(f"Real tokens: {np.mean(packed):.0%} of packed micro-batches, {np.mean(padded):.0%} of padded batches")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# Room that a packed micro-batch leaves free is not computed; it only says how evenly the work is spread. Padding is
# computed and thrown away.
#
# ## What stands there twice
#
# The reference once more, by paragraphs: topics of `help()` share whole sections.

# %%
pieces = [(topic, part) for topic, text in topics.items() for part in text.split("\n\n") if len(part) > 120]
Path("paragraphs.jsonl").write_text("\n".join(json.dumps({"text": text}) for _, text in pieces) + "\n")
report = datacheck.check(Reader(Source(path="paragraphs.jsonl")))
again = {finding.row for finding in report.findings if finding.code in ("duplicate", "near_duplicate")}
print(report.counts)

# %%
twice = Counter(topic for row, (topic, _) in enumerate(pieces, 1) if row in again)
every = Counter(topic for topic, _ in pieces)
top = [topic for topic, _ in twice.most_common(10)][::-1]
fig, ax = plt.subplots()
ax.barh(top, [every[topic] for topic in top], color="#bbbbbb", label="all paragraphs")
ax.barh(top, [twice[topic] for topic in top], label="said before, in an earlier topic or this one")
ax.set(xlabel="paragraphs", ylabel="topic of help()")
ax.set_title(f"{len(again) / len(pieces):.0%} of the paragraphs were said before, most of them in a few topics")
ax.legend()
plt.show()

# %%
os.chdir(root)
place.cleanup()
