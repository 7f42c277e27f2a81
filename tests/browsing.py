"""Pages as a browser takes them: parsed, and opened in Chromium where there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text in each section."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, list[str]] = {"": []}
        self._section = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
            self.sections[self._section] = []

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.sections[self._section].append(data.strip())

    def text(self, section: str) -> str:
        return " ".join(self.sections[section])


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--enable-logging=stderr",
    "--v=0",
    "--dump-dom",
)


def chromium() -> str:
    """The browser; without one the test is skipped, unless LORAZIP_REQUIRE_CHROMIUM is set."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"):
        found = shutil.which(name)
        if found:
            return found
    if os.environ.get("LORAZIP_REQUIRE_CHROMIUM"):
        pytest.fail("LORAZIP_REQUIRE_CHROMIUM is set and there is no chromium")
    pytest.skip("no chromium (apt-get install chromium); set LORAZIP_REQUIRE_CHROMIUM to make this an error")


def visit(html: str, folder: Path, width: int = 1200) -> tuple[str, list[str]]:
    """Open a page: the document after everything ran, and the lines of its console."""
    folder.mkdir()
    file = folder / "page.html"
    file.write_text(html, encoding="utf-8")
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# Chromium writes the document out once the page has loaded, which waits for pictures in the page and for no promise. So
# the pictures of the drawings stand in the page once more, and all is measured at once, in the handler of that event.
PROBE = """<script>
const pictures = [...document.querySelectorAll("img, image")].map((node) => {
  const picture = document.createElement("img");
  picture.src = node.getAttribute("src") || node.getAttribute("href") || node.getAttribute("xlink:href");
  picture.style.position = "absolute";
  picture.style.width = picture.style.height = "0";
  document.body.append(picture);
  return picture;
});
addEventListener("load", () => {
  const paper = document.createElement("canvas").getContext("2d");
  const sizes = pictures.map((picture) => {
    paper.drawImage(picture, 0, 0);  // an error for a picture that is broken
    return [picture.naturalWidth, picture.naturalHeight];
  });
  const boxes = [...document.querySelectorAll("svg")].map((svg) => {
    const box = svg.getBoundingClientRect(), drawn = svg.getBBox();
    return [box.width, box.height, drawn.width, drawn.height];
  });
  const ink = getComputedStyle(document.querySelector("svg text")).fill;
  const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  document.title = "probe:" + JSON.stringify({sizes, boxes, ink, overflow}) + ":end";
});
</script>"""


def probe(html: str, folder: Path, width: int = 1200) -> dict[str, Any]:
    """What a browser measures in the page: pictures decoded, their places, how far the page overflows."""
    # The page's policy would stop the probe's script.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    scripted = html.replace("</body>", f"{PROBE}</body>")
    dom, console = visit(scripted, folder, width)
    assert console == []
    found = re.search("<title>probe:(.*?):end</title>", dom)
    assert found, "the page was written out before it was measured"
    return dict(json.loads(found.group(1).replace("&quot;", '"')))
