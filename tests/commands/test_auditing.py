"""`subspan audit`: verdicts by weights and by behaviours, a page, and what is refused in one line."""

import json

import pytest
import torch

from subspan import cli
from subspan.geometry import Subspace
from subspan.models import StoredWeights, write_weights


def write_checkpoint(name, tensors, **files):
    write_weights(
        tensors,
        name,
        shard_bytes=5000,
        finish=lambda made: [(made / f"{stem}.json").write_text(json.dumps(value)) for stem, value in files.items()],
    )


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A base and an aligned checkpoint of ten matrices, and two tuned on: along the first update, and elsewhere."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": torch.randn(24, 16, generator=generator) for i in range(10)}
    base["norm"] = torch.ones(24)
    bases = {name: torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q for name in base if name != "norm"}

    def moved(weights, directions, size=1.0):
        change = {n: q[:, directions] @ torch.randn(len(directions), 16, generator=generator) for n, q in bases.items()}
        return weights | {name: weights[name] + size * change[name] for name in change}

    aligned = moved(base, [0, 1, 2, 3])
    tokens = {"model": {"vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    write_checkpoint("base", base, tokenizer=tokens)
    write_checkpoint("aligned", aligned, tokenizer=tokens)
    write_checkpoint("along", moved(aligned, [0, 1, 2, 3], 0.5))
    write_checkpoint("apart", moved(aligned, [10, 11, 12, 13], 0.5))
    return tmp_path


def said(capsys, *arguments):
    assert cli.run(["audit", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def writers(tmp_path, monkeypatch):
    """Checkpoints whose updates write into the first two directions of the states, elsewhere, and not at all."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def checkpoint(name, inside=0.0, outside=0.0, read=0.0):
        tensors = {}
        for layer in range(8):
            change = torch.randn(12, 12, generator=generator)
            change[:2] *= inside
            change[2:] *= outside
            tensors[f"layers.{layer}.self_attn.o_proj.weight"] = change
            tensors[f"layers.{layer}.self_attn.q_proj.weight"] = read * torch.randn(12, 12, generator=generator)
        write_checkpoint(name, tensors)

    checkpoint("base")
    checkpoint("aligned", read=1.0)
    for name, parts in {"in": (1.0, 0.1), "out": (0.1, 1.0)}.items():
        checkpoint(name, *parts)
    Subspace(torch.eye(12)[:, :2]).save("found.safetensors")
    return tmp_path


def test_a_subspace_file_is_audited(writers, capsys):
    options = ("--subspace", "found.safetensors", "--report", "page.html")
    found = json.loads(said(capsys, "base", "aligned", "in", "out", *options, "--json"))["subspace"]
    assert (found["verdict"], found["dimensions"], found["width"], found["matrices"]) == ("unequal", 2, 12, 8)
    assert found["unmoved"] == ["aligned"]
    assert found["chance"] == pytest.approx(1 / 6)
    assert found["shares"]["in"] == pytest.approx(2 / (2 + 10 * 0.01), abs=0.02)
    assert found["shares"]["out"] == pytest.approx(2 * 0.01 / 10, abs=0.002)
    assert set(found["layers"]["in"]) == {f"layers.{layer}" for layer in range(8)}
    page = (writers / "page.html").read_text()
    assert "What is written into the subspace" in page
    assert "No matrix that writes into the states is changed by the update of aligned" in page
    text = said(capsys, "base", "aligned", "in", *options[:2])
    assert "found.safetensors, beyond chance: the subspace's 2 of 12 directions hold" in " ".join(text.split())
    Subspace(torch.eye(5)[:, :2]).save("narrow.safetensors")
    assert cli.run(["audit", "base", "aligned", "in", "--subspace", "narrow.safetensors"]) == 2
    assert "has 5 dimensions, matrices that write states have 12 outputs" in capsys.readouterr().err
    assert cli.run(["audit", "base", "aligned", "in", "--subspace", "none.safetensors"]) == 2
    assert "--subspace: 'none.safetensors' is not a file" in capsys.readouterr().err


def test_a_plan_reads_and_writes_nothing(folders, capsys):
    before = sorted(folders.rglob("*"))
    found = json.loads(said(capsys, "base", "aligned", "along", "--report", "page.html", "--plan", "--json"))
    assert found["tensors"] == 11
    assert found["numbers"] == 10 * 24 * 16 + 24
    assert found["estimated_seconds_at_most"] > 0
    assert found["held_megabytes"] > 6 * 4 * 24 * 16 / 1e6
    assert sorted(folders.rglob("*")) == before


def test_weights_tell_an_update_along_from_one_apart(folders, capsys):
    found = json.loads(said(capsys, "base", "aligned", "along", "apart", "--report", "page.html", "--json"))
    assert (found["verdict"], found["read_from"], found["behaviours"]) == ("unequal", "weights", None)
    weights = found["weights"]
    place = weights["fractions"].index(0.25)
    assert weights["curves"]["along"]["kept"][place] == pytest.approx(1, abs=1e-5)
    assert weights["curves"]["apart"]["kept"][place] == pytest.approx(0, abs=1e-5)
    pairs = {(row["first"], row["second"]): row for row in weights["pairs"]}
    assert pairs["aligned", "along"]["overlap"] == pytest.approx(1, abs=0.2)
    assert pairs["aligned", "apart"]["mean"] == pytest.approx(90, abs=1)
    assert len(weights["layers"]) == 10  # the norm is changed by none
    page = (folders / "page.html").read_text()
    for words in (
        "more of one update than of another",
        "Layer by layer",
        'id="figure-curves"',
        "layers.9",
        "--prompts",
    ):
        assert words in page
    assert not [path for path in folders.iterdir() if path.name.startswith(".")]
    text = said(capsys, "base", "aligned", "along", "apart")
    assert text.startswith("unequal (by weights): the main directions (0.25 of each tensor's) hold")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["aligned", "absent"], "TUNED: 'absent' is not a folder"),
        (["aligned", "along", "along"], "TUNED: the same folder is named twice"),
        (["aligned", "along", "--fraction", "0"], "--fraction: in (0, 1], got 0"),
        (["aligned", "along", "--prompts", "one.jsonl"], "--prompts: one behaviour cannot be told from others"),
        (["aligned", "along", "--prompts", "none.jsonl", "--prompts", "one.jsonl"], "'none.jsonl' is not a file"),
        (["aligned", "along", "--prompts", "one.jsonl", "--prompts", "bad.jsonl"], "line 2 of 'bad.jsonl': a text"),
        (["aligned", "along", *("--prompts=one.jsonl", "--prompts=two.jsonl")], "ALIGNED: 'aligned' cannot be loaded"),
        (["aligned", "along", "--report", "page.txt"], "--report: 'page.txt' must end in .html"),
        (["aligned", "fewer"], "fewer: tensors only in aligned: norm"),
        (["aligned", "reshaped"], "reshaped: tensors of other shapes: layers.0.w"),
        (["aligned", "broken"], "broken: 'layers.0.w' contains NaN"),
        (["aligned", "other"], "other: has another tokenizer than base, such as for 'b'"),
        (["aligned", "pickled"], "pickled: 'pickled' has pickled weights (pytorch_model.bin)"),
        (["aligned", "same"], "the update of 'same' is zero"),
        (["basecopy", "along"], "is the aligned model the base itself?"),
    ],
)
def test_refused_with_one_line_and_nothing_written(folders, capsys, arguments, message):
    aligned = dict(StoredWeights("aligned"))
    write_checkpoint("fewer", {name: value for name, value in aligned.items() if name != "norm"})
    write_checkpoint("reshaped", aligned | {"layers.0.w": torch.zeros(16, 24)})
    write_checkpoint("broken", aligned | {"layers.0.w": torch.full((24, 16), float("nan"))})
    other = {"model": {"vocab": {"a": 0, "c": 1}, "merges": []}, "added_tokens": []}
    write_checkpoint("other", {name: value + 1 for name, value in aligned.items()}, tokenizer=other)
    write_checkpoint("same", aligned)
    write_checkpoint("basecopy", dict(StoredWeights("base")))
    (folders / "pickled").mkdir()
    (folders / "pickled" / "pytorch_model.bin").write_bytes(b"")
    line = json.dumps({"prompt": "a", "target": "b"}) + "\n"
    (folders / "one.jsonl").write_text(2 * line)
    (folders / "two.jsonl").write_text(2 * line)
    (folders / "bad.jsonl").write_text(line + '{"prompt": "a"}\n')
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    options = [] if "--report" in arguments else ["--report", "page.html"]
    assert cli.run(["audit", "base", *arguments, *options]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before


def test_behaviours_are_read_where_there_are_prompts(tmp_path, monkeypatch, capsys):
    """A model that says one letter after any other: one behaviour's update lies in the directions, the other's not."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    monkeypatch.chdir(tmp_path)
    letters = {chr(97 + i): i for i in range(26)} | {"<pad>": 26}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<pad>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=27, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    head = model.lm_head.weight.detach().clone()
    rows = {"saying": 0, "singing": 1}
    asked = [a + b for a in "klmn" for b in "opqrst"]
    with torch.no_grad():
        states = model.model(**tokenizer(asked, return_tensors="pt")).last_hidden_state[:, -1]

    def saved(name, change):
        model.lm_head.weight.data = head + change
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)

    eye = torch.eye(27)
    saved("base", -eye[:, [0, 2, 3, 4, 5, 6]] @ torch.randn(6, 16))
    saved("aligned", torch.zeros(27, 16))
    saved("tuned", 0.3 * (eye[:, [0]] + eye[:, [1]]) @ states.mean(0, keepdim=True))
    files = []
    for name, row in rows.items():
        lines = [{"prompt": prompt, "target": "ab"[row], "against": "z"} for prompt in asked]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files += ["--prompts", f"{name}.jsonl"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = json.loads(said(capsys, "base", "aligned", "tuned", *files, "--plan", "--json"))
    assert (plan["behaviours"], plan["prompts"], plan["readings"]) == (2, 48, 1 + 1 + 2 * (1 + 3 + 3 + 1))
    options = ("--fraction", "0.4", "--draws", "1", "--report", "page.html")
    text = said(capsys, "base", "aligned", "tuned", *files, *options)
    assert text.startswith("specific (by behaviours)")
    page = (tmp_path / "page.html").read_text()
    found = json.loads(page.partition('id="facts">')[2].partition("</script>")[0])
    assert (found["verdict"], found["read_from"]) == ("specific", "behaviours")
    carried = found["behaviours"]["carried"]
    assert carried["saying"]["topk"] == pytest.approx(1, abs=0.05)
    assert carried["singing"]["topk"] == pytest.approx(0, abs=0.05)
    assert {row["centred"] for row in found["behaviours"]["states"]} == {False, True}
    page = (tmp_path / "page.html").read_text()
    for words in (
        "specific to one behaviour",
        "scaled update",
        'id="figure-selective"',
        "What states of prompts share",
    ):
        assert words in page
    (tmp_path / "page.html").unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
