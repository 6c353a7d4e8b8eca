"""finetune from Python: the page's examples as they stand, the verbs' own results, and nothing printed."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from finetune import api
from tests import runs
from tests.runs import OUTPUT, ROOT, finetune
from tests.test_release import KNOWN, OUT, licensed, release

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def test_every_example_of_the_page_runs(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    shutil.copytree(ROOT / "data" / "dates", "data/dates")
    model = api.load_recipe("recipes/tiny.yaml").model
    shutil.copytree(tiny_base, model)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    printed = []
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), {})  # the page's own text
        printed.append(capsys.readouterr().out.splitlines())
    assert len(printed[0]) == 2
    assert printed[1] == [
        f"{json.loads(Path('runs/from-python-merged/finetune.json').read_text())['proof']['mean_kl']} True"
    ]
    assert "did you mean" in printed[2][0]


def test_they_give_what_the_verbs_give(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = api.train("r.yaml")
    assert run.root == OUTPUT
    assert api.plan("r.yaml").to_dict().keys() == json.loads(finetune("plan", "r.yaml", "--json").out).keys()
    assert set(api.evaluate(OUTPUT, fresh=True)["scores"]) == {"base", "adapter"}
    assert api.evaluate(OUTPUT) == json.loads(finetune("eval", str(OUTPUT), "--json").out)
    assert api.predict(OUTPUT, "eval.jsonl", "answers.jsonl", max_new_tokens=4)["rows"] == len(
        Path("answers.jsonl").read_text().splitlines()
    )
    shutil.copytree(OUTPUT, "runs/two")
    compared = json.loads(json.dumps(api.compare([OUTPUT, "runs/two"])))
    assert compared == json.loads(finetune("compare", str(OUTPUT), "runs/two", "--json").out)
    assert api.merge(OUTPUT, "merged", base="replayed")["base_choice"] == "replayed"
    licensed()
    assert release("--what", "adapter", *KNOWN).code == 0
    assert api.verify(OUT) == []
    (OUT / "NOTICE").unlink()
    assert api.verify(OUT) == ["NOTICE is missing"]
    assert capsys.readouterr() == ("", "")


def test_faults_are_raised_with_their_code(finished: Path) -> None:
    with pytest.raises(api.FinetuneError) as caught:
        api.plan("r.yaml", ["train.stepz=1"])
    assert (caught.value.exit_code, len(caught.value.faults)) == (2, 1)
    with pytest.raises(api.FinetuneError, match="something is there already"):
        api.export(OUTPUT, OUTPUT)
    with pytest.raises(api.FinetuneError, match="no such folder"):
        api.verify("nowhere")


def test_progress_prints_what_the_verb_prints(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.train("r.yaml", progress=True)
    assert "this run is finished" in capsys.readouterr().out


def test_a_thread_may_train(work: Path) -> None:
    """Signals reach the main thread alone; a call from another one works without them."""
    found: list[object] = []

    def call() -> None:
        try:
            found.append(api.train("r.yaml", ["train.steps=1", "evaluate.metrics=[loss]"]))
        except BaseException as error:  # noqa: BLE001 - told below
            found.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    (said,) = found
    assert isinstance(said, list), said
    assert len(runs.metrics(OUTPUT)) == 1


def test_importing_it_is_light_and_everything_is_documented() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, finetune.api; sys.exit('torch' in sys.modules)"], check=False
    )
    assert done.returncode == 0
    for name in api.__all__:
        one = getattr(api, name)
        assert one.__doc__
        if inspect.isfunction(one):
            for parameter in inspect.signature(one).parameters:
                assert parameter == "runs" or f"\n        {parameter}: " in one.__doc__, (name, parameter)
