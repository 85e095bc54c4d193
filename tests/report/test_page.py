"""The page: complete in itself, safe for any text, and every section there."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import re
from typing import Any

import numpy as np
import pytest

from page_elements import NASTY, Elements
from subspan.commands import describe
from subspan.datasets import Rows
from subspan.report import render
from subspan.report.pieces import card_of, percent


@pytest.fixture(scope="module")
def rendered() -> tuple[str, dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 12))
    rows[4] = rows[3] * 1.0001
    rows[6] = rows[5]
    data = Rows(
        rows,
        name=f"table {NASTY}",
        argument="my table.npy",
        source=NASTY,
        labels=np.array([f"{NASTY} {i % 3}" for i in range(120)]),
        label_name=NASTY,
        label_argument="la bel",
        texts=[f"{NASTY} {i}" for i in range(120)],
        ids=[f"{NASTY} {i}" for i in range(120)],
    )
    other = Rows(rows @ rng.normal(size=(12, 12)), name=NASTY, argument="new.npy", ids=data.ids)
    facts = describe(data, other)
    return render(facts, data), facts


def test_every_section_is_there_and_linked(rendered: tuple[str, dict[str, Any]]) -> None:
    found = Elements(rendered[0])
    sections = [attributes["id"] for tag, attributes in found.elements if tag == "section"]
    assert sections == ["contents", "spectrum", "shortening", "outliers", "subset", "labels", "against"]
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert links == [f"#{name}" for name in sections]
    assert found.unbalanced == []


def test_exact_copies_are_told_from_near_ones(rendered: tuple[str, dict[str, Any]]) -> None:
    copies = r"1 row repeats an earlier one exactly \(1\.7.% have such a copy\)"
    words = copies + r", and 1\.7.% of the rows have a near copy beside these"
    assert re.search(words, rendered[0])


def test_each_section_names_a_command(rendered: tuple[str, dict[str, Any]]) -> None:
    for section in re.findall(r"<section.*?</section>", rendered[0], re.S):
        assert re.search(r'<p class="command"><span>[^<]+</span> <code>subspan \w+ ', section), section[:200]
    assert "subspan detect &#x27;my table.npy&#x27; --labels &#x27;la bel&#x27; --label-errors" in rendered[0]


def test_commands_read_the_same_columns() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6))
    columns = {"reading": ("--text-column", "the text"), "pairing": ("--id-column", "id")}
    data = Rows(rows, name="texts", argument="x.csv", ids=[str(i) for i in range(40)], dropped=2, **columns)
    other = Rows(rows, name="other", argument="y.csv", ids=data.ids)
    page = render(describe(data, other), data)
    assert (
        page.count("subspan align x.csv y.csv --text-column &#x27;the text&#x27; --id-column id --skip-nan --method")
        == 1
    )
    for verb in ("select", "shorten", "detect"):
        assert f"subspan {verb} x.csv --text-column &#x27;the text&#x27; --skip-nan " in page


def test_the_plots_come_compressed_and_from_the_published_file(rendered: tuple[str, dict[str, Any]]) -> None:
    packed = re.search(r'<script type="text/plain" id="plotly">([^<]*)</script>', rendered[0])
    assert packed
    library = gzip.decompress(base64.b64decode(packed[1]))
    # plotly.js-cartesian-dist-min 4.1.1 of the npm registry.
    assert hashlib.sha256(library).hexdigest() == "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
    assert len(packed[1]) < 700_000


def test_labels_stay_where_a_name_contains_them() -> None:
    rows = np.random.default_rng(0).normal(size=(60, 6))
    data = Rows(rows, name="digits", labels=np.array(["1", "2", "3"] * 20))
    assert "· 1</small>" in card_of(10, "note", dataclasses.replace(data, labels=np.array(["1"] * 60)))
    pictures = Rows(rows, name="photos", labels=np.array(["cat"] * 60), ids=[f"cat/{i}" for i in range(60)])
    assert "cat</small>" not in card_of(0, "note", pictures)


def test_one_is_singular() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 6)) * [9, 8, 7, 0.1, 0.1, 0.1]
    rows[3, 5] = 50
    facts = describe(Rows(rows, name="rows"))
    facts["outliers"]["beyond_fence"] = 1
    assert "<strong>1</strong><span>row lies far" in render(facts, Rows(rows, name="rows"))


def test_nothing_is_fetched_from_elsewhere(rendered: tuple[str, dict[str, Any]]) -> None:
    for tag, attributes in Elements(rendered[0]).elements:
        for name in ("src", "href", "srcset", "data", "action"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:", "#")), (tag, name, value)
    assert "default-src 'none'" in rendered[0]


def test_texts_cannot_become_elements(rendered: tuple[str, dict[str, Any]]) -> None:
    page = rendered[0]
    found = Elements(page)
    assert not [attributes for tag, attributes in found.elements if "onerror" in attributes]
    assert "<script>alert" not in page
    assert not any(script.strip().startswith("alert") for script in found.scripts)


def test_the_facts_are_in_the_page(rendered: tuple[str, dict[str, Any]]) -> None:
    page, facts = rendered
    stored = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page, re.S)
    assert stored is not None
    assert json.loads(stored.group(1)) == facts


def test_figures_differ_by_more_than_colour(rendered: tuple[str, dict[str, Any]]) -> None:
    figures = re.findall(r'<script type="application/json" id="figure-\w+">(.*?)</script>', rendered[0], re.S)
    assert len(figures) == 8
    for figure in map(json.loads, figures):
        traces = [trace for trace in figure["data"] if trace["type"] == "scatter"]
        marks = [(trace.get("line", {}).get("dash"), trace.get("marker", {}).get("symbol")) for trace in traces]
        assert len(set(marks)) == len(traces)
        assert all(trace["name"] for trace in traces)


def test_labels_in_figures_are_escaped(rendered: tuple[str, dict[str, Any]]) -> None:
    heatmap = re.search(r'id="figure-labels">(.*?)</script>', rendered[0], re.S)
    assert heatmap is not None
    figure = json.loads(heatmap.group(1))
    shown = figure["layout"]["xaxis"]["ticktext"] + [text for row in figure["data"][0]["hovertext"] for text in row]
    assert shown
    assert not [text for text in shown if "<" in text]


def test_sections_without_facts_are_left_out() -> None:
    data = Rows(np.random.default_rng(0).normal(size=(40, 6)), name="plain", argument="x.npy")
    page = render(describe(data), data)
    assert 'id="labels"' not in page
    assert 'id="against"' not in page


def test_few_rows_are_not_taken_for_a_short_embedding() -> None:
    rng = np.random.default_rng(0)
    few, many = (Rows(rng.normal(size=(n, 64)), name="x", argument="x.npy") for n in (24, 200))
    assert "further rows may need more" in render(describe(few), few)
    assert "further rows may need more" not in render(describe(many), many)


def test_images_are_shown_small() -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    rng = np.random.default_rng(0)
    images = [image_module.fromarray(rng.integers(0, 255, (400, 300, 3), dtype=np.uint8)) for _ in range(30)]
    images[0] = images[0].convert("L")
    data = Rows(rng.normal(size=(30, 6)), name="photos", argument="photos", images=images)
    page = render(describe(data), data)
    shown = [attributes for tag, attributes in Elements(page).elements if tag == "img"]
    assert len(shown) >= 9
    assert all(len(attributes["src"] or "") < 60_000 for attributes in shown)
    assert all((attributes["src"] or "").startswith("data:image/jpeg;base64,") for attributes in shown)


def test_less_than_all_is_never_shown_as_all() -> None:
    assert [percent(share).replace("\u202f", "") for share in (0, 0.004, 0.5, 0.9996, 1)] == [
        "0%", "0.4%", "50%", "99.9%", "100%",
    ]  # fmt: skip
