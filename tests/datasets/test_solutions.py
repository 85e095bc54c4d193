"""Solutions written by models, read as their authors publish them."""

import gzip
import json

import pytest

from subspan.datasets import model_solutions

ROW = {
    "question": "How many?",
    "ground_truth": "16 - 3 = <<16-3=13>>13\nA: 13",
    "6b_finetuning": {"is_correct": False, "solution": "16 + 3 = <<16+3=19>>19"},
    "6b_verification": {"is_correct": True, "solution": "13"},
}


@pytest.mark.parametrize("place", ["gsm8k", "gsm8k/grade_school_math/data"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_file_is_found_alone_and_in_a_clone(tmp_path, place, packed):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    text = (json.dumps(ROW) + "\n") * 2
    if packed:
        (folder / "example_model_solutions.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "example_model_solutions.jsonl").write_text(text)
    found = model_solutions(tmp_path)
    assert len(found) == 2
    assert (found[0].question, found[0].answer) == ("How many?", "16 - 3 = 13\nA: 13")
    assert found[0].solutions == {"6b_finetuning": "16 + 3 = 19", "6b_verification": "13"}
    assert found[0].right == {"6b_finetuning": False, "6b_verification": True}
    assert model_solutions(tmp_path, calculations=True)[0].answer == ROW["ground_truth"]


def test_where_it_comes_from_is_said(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"has no gsm8k/example_model_solutions.jsonl; the file comes from https://raw"
    ):
        model_solutions(tmp_path)
    monkeypatch.delenv("SUBSPAN_DATA", raising=False)
    with pytest.raises(ValueError, match=r"no data folder is set \(SUBSPAN_DATA\); the file comes from"):
        model_solutions()


@pytest.mark.parametrize("broken", [{"question": "a"}, {**ROW, "6b_finetuning": {"solution": "a"}}, {**ROW, "6b": {}}])
def test_records_that_are_none(tmp_path, broken):
    (tmp_path / "gsm8k").mkdir()
    text = json.dumps(ROW) + "\n" + json.dumps(broken)
    (tmp_path / "gsm8k" / "example_model_solutions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"record 1 of .* needs question, ground_truth"):
        model_solutions(tmp_path)
