"""The page in a real browser, without a network: drawn, complete, and no wider than a phone."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from subspan.commands import describe
from subspan.commands.auditing import weight_facts
from subspan.datasets import Rows
from subspan.models import StateDelta
from subspan.probe import compare_updates
from subspan.report import render, render_audit, render_probe
from subspan.report.figures import affinity_figure
from subspan.report.pieces import document, figure_of

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
SECTIONS = ["contents", "spectrum", "shortening", "outliers", "subset", "labels", "against"]


class Browser:
    """Chromium over its debugging pipe: JSON messages that end in a zero byte, on descriptors 3 (in) and 4 (out)."""

    def __init__(self, folder: str) -> None:
        assert CHROMIUM is not None
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()

        def place() -> None:
            # First out of the way of 3 and 4, in case the pipes were given these numbers.
            read, write = os.dup2(to_browser, 103), os.dup2(from_browser, 104)
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}"],
            preexec_fn=place,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.numbers = itertools.count(1)
        self.waiting = b""
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(time.monotonic() + 120)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self, until: float) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self.read_end, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("the browser does not answer")
            self.waiting += part
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def show(self, page: Path, width: int, height: int, *, dark: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + 120
        while not self.value("document.documentElement?.dataset.drawn ?? ''"):
            assert time.monotonic() < deadline, "the plots were not drawn"
            time.sleep(0.1)

    def screenshot(self) -> np.ndarray:
        image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
        return np.asarray(image_module.open(io.BytesIO(data)).convert("RGB"))

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, uncaught exceptions, and every request beside the page itself."""
        found = []
        for event in self.events:
            method, said = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(json.dumps(said["exceptionDetails"])[:300])
            elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
                found.append(json.dumps(said["args"])[:300])
            elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
                found.append(said["entry"]["text"])
            elif method == "Network.requestWillBeSent" and not said["request"]["url"].startswith(
                ("file:", "data:", "blob:", "about:")
            ):
                found.append(f"asks for {said['request']['url']}")
        return found

    def close(self) -> None:
        with contextlib.suppress(RuntimeError, OSError):
            self.session = None
            self.call("Browser.close")
        self.process.kill()
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine to look at the page with")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running = Browser(folder)
        yield running
        running.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(14, 24))
    kinds = rng.integers(0, 14, 400)
    rows = rng.normal(size=(400, 5)) @ rng.normal(size=(5, 24)) + centres[kinds] + 0.2 * rng.normal(size=(400, 24))
    long = "a_name_without_any_place_to_break_it_" * 4
    data = Rows(
        rows,
        name=f"A table with a long name, {long}",
        argument=f"{long}.npy",
        source="Rows that were made for this test.",
        labels=np.array([f"{long}{kind}" for kind in kinds]),
        texts=[f"Text {row}: {'words ' * 60}{long}" for row in range(400)],
    )
    other = Rows(rows @ rng.normal(size=(24, 12)), name="other", argument="other.npy")
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(describe(data, other), data), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_page_is_whole_and_fits(browser: Browser, page: Path, width: int, height: int) -> None:
    browser.show(page, width, height)
    sections = browser.value("[...document.querySelectorAll('main section')].map(s => [s.id, s.offsetHeight])")
    assert [name for name, _ in sections] == SECTIONS
    assert all(tall > 200 for _, tall in sections)
    assert browser.value("document.documentElement.scrollWidth") <= width
    # Nothing sticks out, except inside what scrolls by itself.
    outside = browser.value(
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('.wide-scroll, .plot, details:not([open])')).map(e => e.outerHTML.slice(0, 120))"
    )
    assert outside == []
    assert browser.value("document.querySelectorAll('.plot').length") == 8
    assert browser.value("[...document.querySelectorAll('.plot')].every(p => p.querySelector('.main-svg'))")
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1280, False), (1280, True)])
def test_page_is_painted(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.show(page, width, 900, dark=dark)
    seen = browser.screenshot().astype(float)
    brightness = seen.mean(2)
    paper = np.median(brightness)
    assert (paper < 64) if dark else (paper > 192)
    # Ink somewhere in every part of the page, and far from the paper's brightness.
    for part in np.array_split(brightness, 10):
        assert np.abs(part - paper).max() > 100
    assert 0.005 < (np.abs(brightness - paper) > 60).mean() < 0.5


def test_page_reads_without_colour(browser: Browser, page: Path) -> None:
    """Text stands out from its background by at least 4.5 to 1 (WCAG AA) in both themes."""
    measure = """
    (() => {
      const lum = ([r, g, b]) => {
        const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
      };
      const parse = c => c.match(/[\\d.]+/g).map(Number);
      const background = e => {
        for (; e; e = e.parentElement) {
          const c = parse(getComputedStyle(e).backgroundColor);
          if (c.length < 4 || c[3] === 1) return c;
        }
        return [255, 255, 255];
      };
      const low = [];
      for (const e of document.querySelectorAll('body *')) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || ['SCRIPT', 'STYLE'].includes(e.tagName) || e.closest('svg')) continue;
        const [a, b] = [lum(parse(getComputedStyle(e).color)), lum(background(e))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) low.push(e.outerHTML.slice(0, 100));
      }
      return low;
    })()
    """
    for dark in (False, True):
        browser.show(page, 1280, 900, dark=dark)
        assert browser.value(measure) == []


def facts_of_an_audit() -> dict[str, Any]:
    """As `subspan audit` gives them, of ten layers and three models with long names."""
    random = torch.Generator().manual_seed(0)
    zero = {f"model.layers.{i}.w": torch.zeros(12, 8) for i in range(10)}
    named = {f"a-model-tuned-on-something-{i}": i for i in range(3)}

    def update() -> StateDelta:
        return StateDelta.between(zero, {name: torch.randn(12, 8, generator=random) for name in zero})

    found = compare_updates(update(), {name: update() for name in named})
    kinds = {"topk": 0.4, "randomk": 0.3, "random": 0.3, "scaled": 0.2}
    row = {"behaviour": "refusing", "estimate": 0.1, "low": -0.1, "high": 0.3}
    change = {"tuned": next(iter(named)), "behaviour": "refusing", "aligned": 0.0, "full": 1.0, "low": 0.5, "high": 1.5}
    behaviours = {
        "margin": 0.2,
        "prompts": {"refusing": 8, "solving": 8},
        "changes": [change | {"moved": True}],
        "carried": {"refusing": kinds, "solving": kinds},
        "selectivities": [row | {"control": control} for control in list(kinds)[1:]],
        "states": [{"name": "model.layers.7", "centred": False, "overlap": 0.5, "chance": 0.1}],
    }
    origin = {"created": "now", "seed": 0, "seconds": 1.0, "versions": {"subspan": "0"}}
    judged = {"verdict": "not specific", "reason": "at most a little", "read_from": "behaviours", "fraction": 0.25}
    names = {"base": "base", "aligned": "aligned", "tuned": list(named)}
    return {**judged, **names, "weights": weight_facts(found), "behaviours": behaviours, "subspace": None, **origin}


@pytest.mark.parametrize("width", [390, 1280])
def test_the_audit_page_is_whole_and_fits(browser: Browser, tmp_path: Path, width: int) -> None:
    path = tmp_path / "audit.html"
    path.write_text(render_audit(facts_of_an_audit()), encoding="utf-8")
    browser.show(path, width, 900)
    sections = browser.value("[...document.querySelectorAll('main section')].map(s => s.id)")
    assert sections == ["verdict", "behaviours", "curves", "layers", "pairs", "states"]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert (
        browser.value("[...document.querySelectorAll('.plot')].map(p => !!p.querySelector('.main-svg'))") == [True] * 5
    )
    assert browser.complaints() == []


def facts_of_a_probe() -> dict[str, Any]:
    """As `subspan probe` gives them, of a model of thirty blocks."""
    near = {"score": 0.8, "low": 0.7, "high": 0.9}
    value = {"value": 0.8, "low": 0.7, "high": 0.9}
    erased = {"name": "", "way": "subspace", **near, "chance": 0.2, "neighbours": 0.3}
    return {
        "model": "a-model-with-a-long-name-of-some-words", "property": "label", "kind": "labels", "source": "texts.csv",
        "classes": {"a": 50, "b": 50}, "read_at": "the mean over all tokens", "texts": 100, "left_out": {"copies": 2},
        "cut": 1, "max_tokens": 128, "verdict": "kept", "reason": "kept in layer 3", "score": value, "chance": 0.2,
        "words": value, "beyond_words": value, "layer": 3, "site": ["model.layers.2", "output"], "first_layer": 3,
        "layers": [{"layer": layer, **near, "shuffled": 0.2} for layer in range(31)], "last_layer": 5, "blocks": 30,
        "ranks": [{"rank": 1, **near, "random": 0.3, "shuffled": 0.2},
                  {"rank": 256, "score": None, "low": None, "high": None, "random": 0.5, "shuffled": None}],
        "rank": 1, "dimensions": 2, "width": 576, "coordinates": {"a": [0.1, 0.2]}, "seed": 0, "seconds": 1.0,
        "erased": [erased | {"way": "nothing"}, erased, erased | {"name": "another column"}], "created": "now",
        "perplexity": {"nothing": 40.0, "subspace": 41.0}, "versions": {"subspan": "0"},
        "downstream": {"texts": 30, "layers": [4, 5, 6], "subspace_neighbours": 0.5, "random_neighbours": 0.9,
                       **{way: [0.5, 0.4, 0.6] for way in ("nothing", "subspace", "random")}},
    }  # fmt: skip


@pytest.mark.parametrize("width", [390, 1280])
def test_the_probe_page_is_whole_and_fits(browser: Browser, tmp_path: Path, width: int) -> None:
    path = tmp_path / "probe.html"
    path.write_text(render_probe(facts_of_a_probe()), encoding="utf-8")
    browser.show(path, width, 900)
    sections = browser.value("[...document.querySelectorAll('main section')].map(s => s.id)")
    assert sections == ["verdict", "layers", "ranks", "erased", "use", "read"]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert (
        browser.value("[...document.querySelectorAll('.plot')].map(p => !!p.querySelector('.main-svg'))") == [True] * 3
    )
    assert browser.complaints() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_numbers_on_an_axis_have_room(browser: Browser, tmp_path: Path, width: int) -> None:
    facts = {"affinity": {"cells": np.eye(80).tolist(), "ends": [*range(1, 40), 80]}}
    origin = {"created": "now", "seed": 0, "seconds": 1.0, "versions": {"subspan": "0"}}
    path = tmp_path / "clusters.html"
    path.write_text(document("x", "x", "", "", figure_of("affinity", affinity_figure(facts), "", ""), origin), "utf-8")
    browser.show(path, width, 900)
    for tick, (low, high) in {"xtick": ("left", "right"), "ytick": ("top", "bottom")}.items():
        boxes = browser.value(f"[...document.querySelectorAll('.{tick} text')].map(e => e.getBoundingClientRect())"
                              f".map(r => [r.{low}, r.{high}]).sort((a, b) => a[0] - b[0])")  # fmt: skip
        assert 5 <= len(boxes) < 40
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(boxes))
