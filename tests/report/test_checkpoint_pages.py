"""Pages of compressed and merged checkpoints: complete, safe, and what they say."""

import json
import re

import pytest
from tests.report.test_page import NASTY, Elements

from subspan.report import render_compression, render_merge, render_unlearning

ABOUT = {"versions": {"subspan": "0"}, "created": "today", "seed": 0, "seconds": 3.0}


def layer(name, error, **other):
    facts = {"name": name, "solver": "svd", "rank": 3, "nonzero": None, "bits": 70, "dense_bits": 100, "error": error}
    return {**facts, "shift": 0.0, **other}


def compression(**other):
    layers = [layer(f"blocks.{block}.{kind}", 0.1 * block + 0.01) for block in range(3) for kind in ("q", NASTY)]
    facts = {
        "solver": "procrustes", "base": NASTY, "calibration": NASTY, "sequences": 4, "tokens": 64, "saved": 0.3,
        "mean_error": 0.11, "megabytes_before": 10.0, "megabytes_after": 7.0, "held_sequences": 3,
        "perplexity_before": 20.0, "perplexity_after": 25.0, "perplexity_rounded": 21.0, "left_out": 0,
        "layers": layers,
    }  # fmt: skip
    return {**facts, **ABOUT, **other}


def merge(rows):
    facts = {"method": "ties", "base": NASTY, "experts": [NASTY, "two"], "options": {"density": 0.25}}
    return {**facts, **ABOUT, "tensors": 4, "megabytes": 12.0, "overlaps": rows}


def unlearning(*, gone=0.5, back=0.0, lost=0.0):
    before = {"forget_probability": 0.9, "retain_probability": 0.8, "forget_rouge": 0.7}
    after = {"forget_probability": 0.9 - gone, "retain_probability": 0.8 - lost, "forget_rouge": 0.2}
    tuned = {**after, "forget_probability": 0.9 - gone + back}
    facts = {
        "method": NASTY, "base": NASTY, "forget": 4, "retain": 9, "held_out": 1, "merged": False, "leakage": 0.5,
        "leakage_by_chance": 0.25, "figures": {"before": before, "after": after, "in_4_bits": after, "tuned_on": tuned},
        "layer_facts": [
            {"name": f"blocks.{block}.{NASTY}", "leakage": 0.2 + 0.4 * block, "by_chance": 0.25, "start": 0.1}
            for block in range(2)
        ],
        "course": [{"step": step, "forget": 2.0, "retain": 1.0, "orthogonality": 0.1} for step in (1, 2)],
    }  # fmt: skip
    return {**facts, **ABOUT}


OVERLAPS = [
    {"tensor": NASTY, "overlap": 0.61, "by_chance": 0.1, "rank": 3, "of": 30},
    {"tensor": "b", "overlap": 0.07, "by_chance": 0.1, "rank": 3, "of": 30},
]


@pytest.mark.parametrize(
    ("page", "sections", "figures"),
    [
        (render_compression(compression()), ["outcome", "layers"], 1),
        (
            render_compression(compression(perplexity_before=None, perplexity_after=None, perplexity_rounded=None)),
            ["outcome", "layers"],
            1,
        ),
        (render_merge(merge(OVERLAPS)), ["overlaps", "written"], 1),
        (render_merge(merge([])), ["written"], 0),
        (render_unlearning(unlearning()), ["outcome", "layers", "course"], 3),
    ],
)
def test_pages_are_whole_and_no_name_can_break_them(page, sections, figures):
    found = Elements(page)
    assert [attributes["id"] for tag, attributes in found.elements if tag == "section"] == sections
    assert [attributes["href"] for tag, attributes in found.elements if tag == "a"] == [f"#{name}" for name in sections]
    assert found.unbalanced == []
    assert len([1 for tag, _ in found.elements if tag == "figure"]) == figures
    assert not [1 for tag, attributes in found.elements if tag == "img" or "onerror" in attributes]
    assert not re.search(r"(src|href)=.https?:", page)


def words(page):
    return re.sub(r"<script.*?</script>|<[^>]+>", " ", page, flags=re.DOTALL).replace("\u202f", " ")


def test_what_they_say_is_what_was_measured():
    said = words(render_compression(compression()))
    assert "perplexity goes from 20 to 25, 25 % more" in said
    assert "Rounding each number to as many bits gives 21, which is less" in said
    assert "which is less" not in words(render_compression(compression(perplexity_rounded=26.0)))
    assert "7 MB" in said
    assert "by 21 % of their size" in said
    assert "was not measured" in words(
        render_compression(compression(perplexity_before=None, perplexity_after=None, perplexity_rounded=None))
    )
    said = words(render_merge(merge(OVERLAPS)))
    assert "1 of 2" in said
    assert "0.61, where random directions of as many dimensions would have 0.10" in said
    figure = re.search(r'id="figure-layers">(.*?)</script>', render_compression(compression()), flags=re.DOTALL)
    assert figure is not None
    drawn = json.loads(figure[1])["data"][0]
    assert drawn["x"] == ["0", "1", "2"]
    assert drawn["z"][0] == pytest.approx([0.01, 0.11, 0.21])


@pytest.mark.parametrize(
    ("figures", "verdict"),
    [
        ({"gone": 0.5}, "Neither check brings it back."),
        ({"gone": 0.5, "back": 0.2}, "some is back after tuning (40 %)"),
        ({"gone": 0.5, "lost": 0.3}, "What is to be kept suffers more than half as much"),
        ({"gone": -0.1}, "Nothing was forgotten"),
    ],
)
def test_what_the_page_of_unlearning_concludes(figures, verdict):
    page = render_unlearning(unlearning(**figures))
    said = words(page)
    assert verdict in said
    assert f"{0.9 - figures['gone']:.2f} a token, 0.90 before" in said
    assert "4 answers to be forgotten, 9 to be kept, and 1 to be kept that were not trained on" in said
    drawn = json.loads(re.search(r'id="figure-layers">(.*?)</script>', page, flags=re.DOTALL)[1])["data"][0]
    assert drawn["z"] == [pytest.approx([0.2, 0.6])]
