"""The page in a real browser: what it draws, how wide it is, and that nothing of a model runs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from report.html_runs import Page, make_rows, write_run
from report.logs import make_log

from trl_grpo_ext.report.web import write_web_report

NAMES = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, filter(None, NAMES))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None,
        reason="needs a browser: install chromium, or name one in the variable CHROMIUM",
    ),
]

ATTACK = "document.documentElement.dataset.attacked = 'yes'; alert(1)"
HOSTILE = (
    f"</script><script>{ATTACK}</script>",
    f'<img src=x onerror="{ATTACK}"><svg onload="{ATTACK}">',
    f"\"'><iframe srcdoc='<script>parent.{ATTACK}</script>'></iframe><!--",
    "\u202ereversed \u2066isolated\u2028 \x00 \x07 {{constructor}} " + "long" * 3000,
)


def browse(page: Path, *flags: str, width: int = 1280, height: int = 900) -> str:
    """Return what the page is when its scripts are done."""
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--disable-gpu",
        "--no-first-run",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},{height}",
        "--virtual-time-budget=4000",
        *flags,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode(errors="replace")


def ask(page: Path, script: str, *flags: str, width: int = 1280) -> Any:
    """Return the value of an expression in the page, shown in a frame of this width.

    A copy of the page has a policy that lets the expression run, which tells the frame's page.
    """
    probe = f"parent.postMessage(JSON.stringify({script}), '*');"
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    html = page.read_text().replace("script-src '", f"script-src 'sha256-{digest}' '")
    page.with_name("probe.html").write_text(
        html.replace("</body>", f"<script>{probe}</script></body>")
    )
    frame = page.with_name("frame.html")
    frame.write_text(
        "<!doctype html><html><body><script>"
        "onmessage = (event) => { document.documentElement.dataset.answer = event.data; };"
        f'</script><iframe src="probe.html" width="{width}" height="900"></iframe></body></html>'
    )
    dom = Page(browse(frame, "--dump-dom", "--hide-scrollbars", *flags))
    (attributes,) = [found for tag, found in dom.tags if tag == "html"]
    return json.loads(attributes["data-answer"] or "null")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose model writes attacks."""
    folder = tmp_path_factory.mktemp("run")
    steps = {1: make_rows(1), 4: make_rows(4, texts=HOSTILE)}
    log = [{**entry, f"rewards/{HOSTILE[0]}/mean": 0.5} for entry in make_log(30)]
    summary = {"accuracy_before": 0.25, "accuracy_after": 0.5, "num_eval_prompts": 64, "steps": 30}
    return write_web_report([write_run(folder, log=log, summary=summary, steps=steps)])


def test_nothing_that_a_model_wrote_runs(run: Path) -> None:
    found = ask(
        run,
        """{
            attacked: document.documentElement.dataset.attacked || "no",
            drawn: document.documentElement.dataset.drawn,
            scripts: document.scripts.length,
            foreign: document.querySelectorAll("img, iframe, object, svg[onload]").length,
            fetched: performance.getEntriesByType("resource").length,
            shown: [...document.querySelectorAll(".completion pre")].map((pre) => pre.textContent),
        }""",
    )
    assert (found["attacked"], found["drawn"]) == ("no", "all")
    assert (found["scripts"], found["foreign"], found["fetched"]) == (3, 0, 0)
    assert found["shown"][:3] == list(HOSTILE[:3])
    assert found["shown"][3].startswith(
        r"\u202ereversed \u2066isolated\u2028 \x00 \x07 {{constructor}} longlong"
    )
    assert found["shown"][3].endswith("more characters)")


def test_every_chart_is_drawn_with_axes_and_its_table(run: Path) -> None:
    figures = ask(
        run,
        """[...document.querySelectorAll("figure")].map((figure) => {
            figure.querySelector("details").open = true;
            figure.querySelector("details").dispatchEvent(new Event("toggle"));
            return {
                title: figure.querySelector("h3").textContent,
                marks: figure.querySelectorAll(".curve, .raw, .area rect").length,
                axis: figure.querySelector(".label").textContent,
                named: figure.querySelector("svg").getAttribute("aria-label").length > 0,
                rows: figure.querySelectorAll("tbody tr").length,
            };
        })""",
    )
    rows = {figure["title"]: figure["rows"] for figure in figures}
    assert rows["Reward"] == 30
    assert rows["Accuracy before and after"] == 2
    assert all(figure["marks"] and figure["named"] for figure in figures)
    assert {figure["axis"] for figure in figures} == {"optimizer step"}


def test_bars_of_a_stack_are_as_wide_as_logs_are_apart(tmp_path: Path) -> None:
    log = [{**entry, "step": 100 * int(str(entry["step"]))} for entry in make_log(10)]
    page = write_web_report([write_run(tmp_path, log=log)])
    widths = ask(
        page,
        """[...document.querySelectorAll(".area rect")].map((r) => +r.getAttribute("width"))""",
    )
    assert min(widths) > 10


def test_browser_of_completions_goes_to_a_step_orders_and_filters(run: Path) -> None:
    found = ask(
        run,
        """(() => {
            const shown = () => [...document.querySelectorAll(".completion pre")];
            const texts = () => shown().map((pre) => pre.textContent);
            const by = (selector) => document.querySelector(`#browser ${selector}`);
            const status = () => by(".status").textContent;
            by("button[aria-label='earlier step']").click();
            const sampled = [by(".stepper span").textContent, texts(), status()];
            by("select").value = "advantage:high";
            by("select").dispatchEvent(new Event("change"));
            const ordered = texts();
            by("input[type=search]").value = "QUESTION 0";
            by("input[type=search]").dispatchEvent(new Event("input"));
            return { sampled, ordered, filtered: texts(), status: status() };
        })()""",
    )
    assert found["sampled"] == ["Step 1", ["a", "b", "c", "d"], "2 prompts, 4 completions."]
    assert found["ordered"] == ["d", "c", "b", "a"]
    assert found["filtered"] == ["b", "a"]
    assert found["status"] == "1 prompt, 2 completions with this text."


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_is_no_wider_than_the_screen(run: Path, width: int) -> None:
    found = ask(
        run,
        "[innerWidth, document.documentElement.scrollWidth,"
        " Math.max(...[...document.querySelectorAll('.plot svg')]"
        ".map((svg) => svg.getBoundingClientRect().right))]",
        width=width,
    )
    assert found == [width, width, pytest.approx(found[2])]
    assert found[2] <= width


def test_keyboard_moves_through_the_values(run: Path) -> None:
    found = ask(
        run,
        """(() => {
            const svg = document.querySelectorAll(".plot svg")[1];
            const press = () => new KeyboardEvent("keydown", { key: "ArrowRight" });
            for (const _ of [1, 2]) svg.dispatchEvent(press());
            return svg.parentElement.querySelector(".tip").textContent;
        })()""",
    )
    # step 2: 0.1 x 2, and 0.2 / sqrt(2 prompts) to both sides
    assert found == "step 2mean: 0.2 (0.05858 to 0.3414)"


def test_dark_page_has_light_text(run: Path) -> None:
    script = "[getComputedStyle(document.body)].map((s) => [s.color, s.backgroundColor])[0]"
    sums = {}
    for name, scheme in {"light": 1, "dark": 0}.items():
        colours = ask(run, script, f"--blink-settings=preferredColorScheme={scheme}")
        sums[name] = [sum(map(int, colour[4:-1].split(", "))) for colour in colours]
    assert sums["light"][0] < 150 < 600 < sums["light"][1]
    assert sums["dark"][1] < 150 < 600 < sums["dark"][0]


def test_picture_of_the_page_is_not_blank(run: Path, tmp_path: Path) -> None:
    import matplotlib.image

    picture = tmp_path / "page.png"
    browse(run, f"--screenshot={picture}", "--hide-scrollbars")
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (900, 1280)
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2])}) > 20
