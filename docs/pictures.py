"""The README's pictures of pages, from two finished runs: ``make pictures RUNS="runs/quickstart runs/gentle"``.

Each is what Chromium shows of the page as it is today; Pillow packs it into few colours.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from finetune import compare, comparepage, runpage
from finetune.runfolder import RunFolder

DOCS = Path(__file__).parent
COMMAND = [sys.executable, "-P", "-c", "from finetune.cli import main; main()"]
_COLOURS, _MOST = 128, 200_000


def picture(browser: Browser, address: str, name: str, width: int, height: int, wait: str = "main") -> None:
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
    page.goto(address)
    page.wait_for_selector(wait)
    page.wait_for_timeout(1500)
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    shown.quantize(_COLOURS, dither=Image.Dither.NONE).save(DOCS / name, optimize=True)
    size = (DOCS / name).stat().st_size
    assert size < _MOST, f"{name} takes {size} bytes"
    print(f"{DOCS / name}: {size:,} bytes")


def main(runs: list[Path]) -> None:
    """Draw the report of the first run, the comparison of all, and the dashboard of the folder that they are in."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), chromium_sandbox=False)
        picture(browser, runpage.write(RunFolder(runs[0])).absolute().as_uri(), "report.png", 1000, 1330)
        comparison = Path(folder) / "comparison.html"
        comparison.write_text(comparepage.page(compare.compare(runs)), encoding="utf-8")
        picture(browser, comparison.as_uri(), "compare.png", 1000, 1330)
        command = [*COMMAND, "dashboard", str(runs[0].parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
            try:
                found = re.search(r"http://\S+", serving.stdout.readline() if serving.stdout else "")
                assert found is not None, "the dashboard did not start: train with `tracker: trackio`"
                picture(browser, found[0], "dashboard.png", 1280, 800, "canvas")
            finally:
                serving.kill()
        browser.close()


if __name__ == "__main__":
    main([Path(one) for one in sys.argv[1:]])
