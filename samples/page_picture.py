"""Takes the picture of the page that the README shows: two questions to a package, its card beside them.

    python samples/page_picture.py PACKAGE roundexport/docs/page.png

Needs `pip install 'roundexport[onnx,serve]' playwright` and a Chromium on the PATH. The times in the picture are those
of the machine that it is taken on, so take it while nothing else runs.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from roundexport.runtime.benchmarking.server_process import ServerProcess

QUESTIONS = ("How many days are in a week?", "Write a Python function that adds two numbers.")
WIDTH, HEIGHT = 1400, 900


def take(url: str, picture: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(url)
        tab.wait_for_selector("#front h2")
        tab.click("#open-settings")
        tab.fill("#temperature", "0")
        for question in QUESTIONS:
            tab.fill("#message", question)
            tab.press("#message", "Enter")
            tab.wait_for_selector('#send:text-is("Send")', timeout=600_000)
            told = [tab.locator(name).last.inner_text() for name in (".answer", ".meter")]
            print(question, *told, sep="\n", end="\n\n")
        tab.click("#open-card")
        tab.evaluate("document.activeElement.blur()")
        tab.screenshot(path=str(picture))
        browser.close()


if __name__ == "__main__":
    with ServerProcess([sys.argv[1]]) as server:
        take(server.url, Path(sys.argv[2]))
