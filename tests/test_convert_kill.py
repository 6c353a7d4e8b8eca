"""A conversion killed at any of its file operations: never half a model, and the same command completes it."""

from __future__ import annotations

import json
from pathlib import Path

from tests import runs
from tests.qwen1 import SAFE

SWEEP = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from finetune import convert, runfolder, shards
from finetune.terminal import Terminal

source, work, layout = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
out = work / "out"

def digests(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

def arm(at):
    calls = 0
    def watched(given):
        def call(*arguments, **more):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return given(*arguments, **more)
        return call
    for owner, name in ((shards.ShardWriter, "_write"), (os, "fsync"), (Path, "rename"), (shutil, "copyfile"),
                        (Path, "mkdir"), (shutil, "rmtree")):
        setattr(owner, name, watched(getattr(owner, name)))
    return lambda: calls

def run(at=0):
    pid = os.fork()
    if pid == 0:
        count = arm(at)
        convert.convert(source, out, layout, Terminal(quiet=True))
        (work / "count").write_text(str(count()))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert run() == 0
total, whole = int((work / "count").read_text()), digests(out)
shutil.rmtree(out)
killed = 0
for at in range(1, total + 1):
    code = run(at)
    assert code == -signal.SIGKILL, (at, code)
    killed += 1
    assert not out.exists() or digests(out) == whole, at
    if not out.exists():
        assert run() == 0, at
    assert digests(out) == whole, at
    shutil.rmtree(out)
    # What a kill leaves after the last rename is cleared by the next conversion to that name.
    assert run() == 0
    assert {path.name for path in work.iterdir()} == {"out", "count"}, at
    shutil.rmtree(out)
print(json.dumps({"operations": total, "killed": killed}))
"""


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    native = tmp_path / "source"
    assert runs.finetune("convert", str(SAFE), str(native), "--to", "native").code == 0
    for source, layout in ((SAFE, "native"), (native, "original")):
        work = tmp_path / layout / "work"
        work.mkdir(parents=True)
        done = runs.process(SWEEP, str(source), str(work), layout, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["killed"] == found["operations"] > 50
        print(layout, found)
