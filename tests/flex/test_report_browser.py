"""The page as a browser shows it: axe-core finds nothing serious, the keyboard reaches what scrolls, print stays short.

Skipped where there is no Chromium (`FLEX_CHROMIUM` names another one) or, for axe-core, none of: a file that `FLEX_AXE`
names, `npm install axe-core` in the repository, the packages axe-playwright-python or axe-core-python (in `.[dev]`).
"""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from synthetic_run import DEMO, synthetic_events, write_run

from flex.methods import METHODS
from flex.report.terminal import write_report

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = {"light": 1, "dark": 0}  # as Chromium's setting counts them
PAGES = {
    "demo": DEMO,
    "every method, wide": {"methods": tuple(METHODS), "layers": 4, "experts": 12, "seeds": (0,), "rouge": True}
    | {"rounds": 2, "clients": tuple(f"client with a long name {i}" for i in range(5))},
}
# Whatever scrolls sideways, and whether the keyboard gets there and a screen reader says what it is.
SCROLLING = """
document.querySelectorAll("details").forEach(details => details.open = true);
const boxes = [...document.querySelectorAll("body *")].filter(box =>
    box.scrollWidth > box.clientWidth && ["auto", "scroll"].includes(getComputedStyle(box).overflowX));
found({
    page: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    boxes: boxes.map(box => [box.getAttribute("aria-label"), box.getAttribute("role"), box.tabIndex]),
});
"""
# Twice: as it is, then with nothing clipped and no shadow, without which axe does not judge a text's contrast.
AXE = """
document.querySelectorAll("details").forEach(details => details.open = true);
axe.run().then(async as_it_is => {
    const style = document.createElement("style");
    style.textContent = "body { width: max-content } main { max-width: none } p { max-width: 60rem !important }"
        + " .scroll, pre { overflow: visible; background: none }";
    document.head.append(style);
    const unclipped = await axe.run({runOnly: ["color-contrast"]});
    const told = results => results.map(rule => ({id: rule.id, impact: rule.impact, nodes: rule.nodes.slice(0, 5).map(
        node => [node.html.slice(0, 200), ...node.any.map(check => check.message)])}));
    found({
        passed: as_it_is.passes.map(rule => rule.id),
        violations: told([...as_it_is.violations, ...unclipped.violations]),
        // Of a text within a drawing, and of a cell over two rows, axe cannot tell what lies behind it; their colours
        // are those of the others.
        unclear: told(unclipped.incomplete.map(rule => (
            {...rule, nodes: rule.nodes.filter(node => !/^<text|^<th[^>]* rowspan/.test(node.html)
                && !node.any.some(check => check.message.includes("non-text")))}))),
    });
});
"""


@pytest.fixture(scope="module")
def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("FLEX_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: FLEX_CHROMIUM names one, or `apt-get install chromium`")
    return found


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core."""
    places = [ROOT / "node_modules" / "axe-core"]
    for package in ("axe_playwright_python", "axe_core_python"):
        spec = importlib.util.find_spec(package)
        places += [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    named = os.environ.get("FLEX_AXE")
    files = [Path(named)] if named else [place / "axe.min.js" for place in places]
    found = next((file for file in files if file.is_file()), None)
    assert found or not named, f"FLEX_AXE={named}: no such file; expected axe.min.js"
    if found is None:
        pytest.skip("no axe-core: FLEX_AXE=path/to/axe.min.js, or `npm install axe-core` in the repository")
    return found.read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["demo", pytest.param("every method, wide", marks=pytest.mark.slow)])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("run"), synthetic_events(**PAGES[request.param]))
    (run / "config.toml").write_text(f"# {'a long line ' * 40}\n", encoding="utf-8")
    return write_report(run)


def browse(chromium: str, folder: Path, *options: str) -> str:
    usual = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=120000")
    command = [chromium, *usual, f"--user-data-dir={folder / 'profile'}", *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def ask(chromium: str, folder: Path, report: Path, script: str, *options: str) -> Any:
    """What the script hands to `found`, run at the end of the page."""
    told = "const found = (what) => { const box = document.createElement('pre'); box.id = 'found';"
    told += " box.textContent = JSON.stringify(what); document.body.append(box); };"
    page = folder / "asked.html"
    text = report.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", f"<script>{told}{script}</script></body>"), encoding="utf-8")
    shown = browse(chromium, folder, *options, "--dump-dom", page.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', shown, flags=re.DOTALL)
    assert found, "the script did not come to its end"
    return json.loads(html.unescape(found.group(1)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_serious(chromium: str, axe: str, report: Path, scheme: str, tmp_path: Path) -> None:
    colours = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    found = ask(chromium, tmp_path, report, f"{axe};{AXE}", colours)
    assert "color-contrast" in [*found["passed"], *(rule["id"] for rule in found["unclear"])]
    assert {"html-has-lang", "document-title", "landmark-one-main", "td-headers-attr"} <= set(found["passed"])
    assert [rule for rule in found["violations"] if rule["impact"] != "minor"] == []
    assert [rule for rule in found["unclear"] if rule["nodes"]] == []


def test_the_keyboard_reaches_whatever_scrolls(chromium: str, report: Path, tmp_path: Path) -> None:
    found = ask(chromium, tmp_path, report, SCROLLING, "--window-size=500,900")
    assert found["page"] <= 0  # the page itself does not
    assert len(found["boxes"]) > 3
    assert "config.toml" in [label for label, _, _ in found["boxes"]]
    for label, role, tab_index in found["boxes"]:
        assert label
        assert (role, tab_index) == ("region", 0), label
    assert len({label for label, _, _ in found["boxes"]}) == len(found["boxes"])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_table_that_goes_on_has_a_shadow_at_that_edge(chromium: str, scheme: str, tmp_path: Path) -> None:
    """Seen in pixels: the first table alone, once in a narrow and once in a wide window."""
    report = write_report(write_run(tmp_path / "run", synthetic_events(seeds=(0,), rounds=1, layers=1)))
    text = report.read_text(encoding="utf-8")
    style = re.search(r"<style>.*?</style>", text, flags=re.DOTALL)[0]
    table = re.search(r'<div class="scroll".*?</table></div>', text, flags=re.DOTALL)[0]
    alone = tmp_path / "alone.html"
    alone.write_text(f"<!DOCTYPE html>{style}<body style='background: var(--card)'>{table}", encoding="utf-8")
    colours = f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
    steps = {}
    for width in (600, 2000):
        picture = tmp_path / f"{width}.png"
        browse(chromium, tmp_path, colours, f"--window-size={width},300", f"--screenshot={picture}", alone.as_uri())
        grey = Image.open(picture).convert("L")
        rows = range(4, 60)  # the head of the table
        background = [sorted(grey.getpixel((x, y)) for y in rows)[len(rows) // 2] for x in (width - 1, width - 40)]
        steps[width] = background[1] - background[0]
    assert steps[600] >= 8, "no shadow where the table goes on"
    assert abs(steps[2000]) <= 1, "a shadow where it ends"


def test_the_demos_report_prints_in_fewer_than_six_pages(chromium: str, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", synthetic_events(**DEMO)))
    paper = tmp_path / "report.pdf"
    browse(chromium, tmp_path, f"--print-to-pdf={paper}", "--no-pdf-header-footer", report.as_uri())
    pages = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert 1 <= pages < 6
