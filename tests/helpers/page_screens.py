"""Pictures for the documentation, of the page of a running server and of a report:

    python tests/helpers/page_screens.py http://127.0.0.1:8000 docs/images
    python tests/helpers/page_screens.py runs/demo/report.html docs/images

Out: page-{desktop,phone}-{light,dark}.png, of both answers to the page's own prompt; report-desktop-light.png, of the report's top.
Needs playwright and a Chromium.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SETTLE_MS = 2000  # a browser that still starts takes processor time from the first answer, the dense one
REPORT_HEIGHT = 1640  # of the report's top
TOKEN = 41  # which the maps show, counted from 1


def report(path: Path, folder: Path) -> None:
    """Take the picture of a report."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": SIZES["desktop"][0], "height": REPORT_HEIGHT}, color_scheme="light")
        page.goto(path.resolve().as_uri())
        picture = folder / "report-desktop-light.png"
        page.screenshot(path=picture)
        chromium.close()
    print(f"{picture}: {picture.stat().st_size:,} bytes")


def main(url: str, folder: Path) -> None:
    """Take the pictures of the page; each runs both answers anew."""
    playwright = importlib.import_module("playwright.sync_api")
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for device, (width, height) in SIZES.items():
            for scheme in ("light", "dark"):
                phone = device == "phone"
                screen = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone)
                page = screen.new_page()
                page.goto(url)
                page.wait_for_timeout(SETTLE_MS)
                page.click("#run:enabled")
                page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Sparse ran')", timeout=120_000)
                page.locator("#token").fill(str(TOKEN))
                page.locator("#token").blur()
                page.mouse.move(0, 0)
                page.wait_for_function(f"() => document.querySelector('#token-number').textContent.startsWith('{TOKEN} ')")
                path = folder / f"page-{device}-{scheme}.png"
                page.screenshot(path=path, full_page=phone)
                screen.close()
                print(f"{path}: {path.stat().st_size:,} bytes")
        chromium.close()


if __name__ == "__main__":
    source, images = sys.argv[1], Path(sys.argv[2])
    report(Path(source), images) if source.endswith(".html") else main(source, images)
