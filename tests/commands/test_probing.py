"""`subspan probe`: planted, absent and wordy properties of small untrained models, files that work, and refusals."""

import itertools
import json

import numpy as np
import pytest
import torch

from subspan import cli
from subspan.edit import erase_subspace
from subspan.geometry import AffineMap, Subspace
from subspan.models import TextStates, intervene, text_states
from subspan.probe import PropertyProbe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from small_transformers import byte_level, word_piece  # noqa: E402

WORDS = ["foo", "bar", "cat", "dog", "sun", "hat"]
NEUTRAL = [" ".join(words) for words in itertools.product(WORDS, WORDS, WORDS)]


def silent_but(model, loud):
    """A model of which all blocks but one add nothing, and that one mixes words."""
    blocks = model.get_submodule("model.layers" if hasattr(model, "model") else "encoder.layer")
    for place, block in enumerate(blocks):
        for name, weight in block.named_parameters():
            if place != loud and name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(weight)
            elif weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A Llama of four blocks of which the second alone does anything, and texts of two words in either order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=160, tie_word_embeddings=True, initializer_range=0.5,
    )  # fmt: skip
    silent_but(transformers.LlamaForCausalLM(config), 1).save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    random = np.random.default_rng(0)
    rows = []
    for number in range(160):
        one, other = random.choice(WORDS[:3]), random.choice(WORDS[3:])
        first = bool(random.integers(2))
        row = {"text": f"a {one} {other} {number}" if first else f"a {other} {one} {number}"}
        row |= {"order": "onefirst" if first else "otherfirst", "word": str(one), "coin": str(random.integers(2))}
        row |= {"size": float(2 * first + random.normal() / 4), "grade": "high" if first else "low", "part": str(other)}
        rows.append(row)
    write("texts.jsonl", rows)
    (tmp_path / "neutral.txt").write_text("\n".join(NEUTRAL))
    return tmp_path


def write(name, rows):
    with open(name, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(name="texts.jsonl"):
    with open(name) as file:
        return [json.loads(line) for line in file]


def found(capsys, *arguments, model="model"):
    options = ["--texts", "texts.jsonl", "--text-column", "text", "--neutral", "neutral.txt", "--json"]
    assert cli.run(["probe", model, *options, *arguments]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_planted_property_is_found_where_it_arises_and_its_files_erase_it(folder, capsys):
    facts = found(capsys, "--label", "order", "--other", "word", "-o", "out")
    assert (facts["verdict"], facts["first_layer"], facts["blocks"], facts["rank"]) == ("kept", 2, 4, 1)
    scores = {row["layer"]: row["score"] for row in facts["layers"]}
    assert max(scores[0], scores[1]) < 0.65 < 0.8 < min(scores[2], scores[3], scores[4])
    assert facts["site"] == [f"model.layers.{facts['layer'] - 1}", "output"]
    assert facts["classes"] == {
        name: sum(row["order"] == name for row in read()) for name in ("onefirst", "otherfirst")
    }
    # The folder is whole, and what it holds works in other rooms.
    out = folder / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "eraser.safetensors", "probe.json", "report.html", "subspace.safetensors",
    ]  # fmt: skip
    assert json.loads((out / "probe.json").read_text()) == {k: v for k, v in facts.items() if k != "output"}
    space, eraser = Subspace.load(out / "subspace.safetensors"), AffineMap.load(out / "eraser.safetensors")
    assert space.dim == facts["dimensions"] <= 2
    model = transformers.AutoModelForCausalLM.from_pretrained("model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    texts, labels = [row["text"] for row in read()], [row["order"] for row in read()]
    for taken in (erase_subspace(space), eraser):
        with intervene(model, facts["site"][0], taken.map):
            again = text_states(model, tokenizer, texts, [facts["layer"]])
        states = TextStates(again.states, torch.randn_like(again.words), again.layers, again.kept)
        assert PropertyProbe(random_state=0).fit(states, labels).verdict_ == "not found"
    # What it costs: the property goes, another one and the text stay about as they are.
    erased = {(row["name"], row["way"]): row["score"] for row in facts["erased"]}
    assert erased["", "nothing"] > 0.75
    assert max(erased["", "subspace"], erased["", "eraser"]) < 0.7
    assert erased["word", "eraser"] > erased["word", "nothing"] - 0.1
    assert set(facts["perplexity"]) == {"nothing", "eraser", "subspace", "random subspace"}
    later = facts["downstream"]
    assert later["layers"] == [row for row in range(5) if row > facts["layer"]]
    assert later["subspace"][-1] < later["nothing"][-1] - 0.1
    page = (out / "report.html").read_text()
    for words in ("The model keeps it, beyond the words", 'id="figure-ranks"', "erase_subspace(space).map", "word"):
        assert words in page


def test_what_words_tell_and_what_nothing_tells(folder, capsys):
    wordy = found(capsys, "--label", "word")
    assert (wordy["verdict"], wordy["words"]["value"] > 0.9) == ("in the words", True)
    absent = found(capsys, "--label", "coin", "-o", "absent")
    assert (absent["verdict"], absent["erased"], absent["perplexity"]) == ("not found", [], None)
    assert sorted(path.name for path in (folder / "absent").iterdir()) == ["probe.json", "report.html"]
    assert "Use it" not in (folder / "absent" / "report.html").read_text()
    assert cli.run(["probe", "model", "--texts", "texts.jsonl", "--text-column", "text", "--label", "coin"]) == 0
    assert capsys.readouterr().out.startswith("coin in model: no layer reads it above chance")


def test_numbers_orders_spans_and_layers(folder, capsys):
    numbers = found(capsys, "--value", "size", "--layers", "1-3,-1", "--span", "part", "--pool", "last")
    assert (numbers["kind"], numbers["verdict"], numbers["classes"]) == ("numbers", "kept", None)
    assert [row["layer"] for row in numbers["layers"]] == [1, 2, 3, 4]
    assert numbers["score"]["value"] > 0.5
    assert numbers["read_at"] == "the span's last token"
    ordered = found(capsys, "--value", "grade", "--order", "low,high", "--layers", "0,2", "--span", "part")
    assert (ordered["verdict"], ordered["layer"]) == ("kept", 2)
    assert ordered["read_at"] == "the mean over the span's tokens"


def test_states_are_read_once_for_two_columns_and_after_a_stop(folder, capsys, monkeypatch):
    from subspan.commands import probing

    read_texts = []
    inner = probing.iterate_text_states

    def counting(model, tokens, numbers, *, start=0, **options):
        for block in inner(model, tokens, numbers, start=start, **options | {"batch_size": 1}):
            read_texts.append(len(block))
            if stop and sum(read_texts) > 130:
                raise KeyboardInterrupt
            yield block

    stop = True
    monkeypatch.setattr(probing, "iterate_text_states", counting)
    arguments = ["probe", "model", "--texts", "texts.jsonl", "--text-column", "text", "--label", "coin"]
    assert cli.run(arguments) == 130
    done, stop = sum(read_texts), False
    read_texts.clear()
    assert cli.run(arguments) == 0
    assert 0 < sum(read_texts) < 160 < done + sum(read_texts) < 200
    read_texts.clear()
    found(capsys_cleared(capsys), "--value", "size", "--layers", "0-4")
    # Read again are only those of the third that is tried while something is erased.
    assert sum(read_texts) <= 2 * 54


def capsys_cleared(capsys):
    capsys.readouterr()
    return capsys


def test_a_plan_reads_some_texts_and_writes_nothing(folder, capsys):
    before = sorted(folder.rglob("*"))
    facts = found(capsys, "--label", "order", "--max-texts", "50", "-o", "out", "--plan")
    assert (facts["texts"], facts["layers"], facts["width"]) == (50, 5, 24)
    assert facts["estimated_seconds"] > 0
    assert sorted(folder.rglob("*")) == before


def test_tables_copies_rare_classes_and_what_is_missing(folder, capsys):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = read()
    rows += [rows[0] | {"order": "onefirst"}] * 3 + [rows[0] | {"order": "rare", "text": f"a {i}"} for i in range(4)]
    rows += [rows[0] | {"order": None, "text": "none"}]
    vectors = [[1.0, 2.0]] * len(rows)
    table = {name: [row[name] for row in rows] for name in ("text", "order")} | {"vector": vectors}
    parquet.write_table(arrow.table(table), "texts.parquet")
    arguments = ["probe", "model", "--texts", "texts.parquet", "--label", "order", "--layers", "2", "--json"]
    assert cli.run(arguments) == 2
    assert "--label: 1 of 168 records have no 'order' (the first is record 168)" in capsys.readouterr().err
    assert cli.run([*arguments, "--skip-nan", "--neutral", "neutral.txt", "--max-texts", "100"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["left_out"] == {
        "with something missing": 1, "copies of earlier texts": 3, "in classes of which fewer than 10 would be read": 4,
        "beyond the number that is read (--max-texts)": 60,
    }  # fmt: skip
    assert facts["texts"] == 100
    shares = [facts["classes"][name] / 100 for name in ("onefirst", "otherfirst")]
    assert shares[0] == pytest.approx(sum(row["order"] == "onefirst" for row in read()) / 160, abs=0.011)


def test_an_encoder_has_no_perplexity_and_is_read_the_same_way(folder, capsys):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained("bert")
    word_piece().save_pretrained("bert")
    random = np.random.default_rng(0)
    rows = [{"text": " ".join(random.choice(["foo", "bar", "x", "def", "pass", "e", "+", "("], 6))} for _ in range(90)]
    write("texts.jsonl", [row | {"has": str(" x " in f" {row['text']} ")} for row in rows])
    facts = found(capsys, "--label", "has", model="bert")
    assert (facts["verdict"], facts["perplexity"], facts["blocks"]) == ("in the words", None, 2)
    assert facts["erased"]


def test_the_syntax_of_code(folder, capsys):
    pytest.importorskip("tree_sitter", reason="tree-sitter is not installed")
    functions = [f"def {a}({b}):\n    return {c}[{a}]" for a in "abcdef" for b in "xyz" for c in "klm"]
    write("code.jsonl", [{"code": text} for text in functions])
    arguments = ["--code", "--texts", "code.jsonl", "--text-column", "code", "--layers", "2", "-o", "out"]
    assert cli.run(["probe", "model", *arguments, "--neutral", "neutral.txt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in facts["layers"]] == [0, 2]
    assert (facts["kind"], facts["rank"], facts["verdict"] in ("kept", "in the words", "not found")) == (
        "code",
        12,
        True,
    )
    assert {row["way"] for row in facts["erased"]} == {"nothing", "subspace", "random subspace"}
    assert set(facts["perplexity"]) == {"nothing", "subspace", "random subspace"}
    assert "right-branching trees" in (folder / "out" / "report.html").read_text()
    if facts["verdict"] != "not found":
        assert Subspace.load("out/subspace.safetensors").dim == 12
    assert cli.run(["probe", "model", *arguments[:-2], "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 54


REFUSED = [
    ("absent", "MODEL: 'absent' is neither a folder nor an installed model (minilm, smollm2)"),
    ("model --texts none.csv --label order", "--texts: 'none.csv' is not a file"),
    ("model --label order", "--label: needs --texts"),
    ("model --other order", "--other: needs --texts"),
    ("model --code --label order", "--label: --code reads syntax trees alone"),
    ("model --texts wide.jsonl --label a", "--text-column: 'wide.jsonl' has a, b, c; say which one holds the texts"),
    ("READ", "--label, --value: one of them is needed"),
    ("READ --label order --value size", "--label, --value: one of them is needed"),
    ("READ --label stars", "--label: 'texts.jsonl' has no 'stars'"),
    ("READ --label one", "--label: 'one' is 'same' in every text"),
    ("READ --value one", "--value: record 1 has 'same' in 'one', a finite number is needed"),
    ("READ --value two", "--value: 'two' is 2 in every text"),
    ("READ --value nan", "--value: 1 of 160 records have no 'nan' (the first is record 1)"),
    ("READ --value grade --order a,b", "--order: record 1 has"),
    ("READ --label grade --order a,b", "--order: needs --value"),
    ("READ --label size", "read them as numbers with --value size"),
    ("READ --label order --span one", "--span: 'same' of record 1 does not stand in its text"),
    ("READ --label order --layers 2,9", "layers: from 0 (what goes into the first block) to 4, got 9"),
    ("READ --label order --layers a", "--layers: numbers (0,6,12) or ranges (0-30:3) are needed, got 'a'"),
    ("READ --label order --other one", "--other: 'one' has no two labels"),
    ("READ --label order --other stars", "--other: 'texts.jsonl' has no 'stars'"),
    ("READ --label order -o model", "-o: 'model' exists"),
    ("model --texts few.jsonl --text-column text --label order", "--label: two classes of 10 texts each"),
    ("model --texts few.jsonl --text-column text --value size", "--texts: 40 texts are the fewest, 12 are left"),
    ("model --code --texts texts.jsonl --text-column text", "--texts: none of 160 is python that parses"),
    ("model --code --texts code.jsonl --text-column text", "--texts: 40 different pieces of Python of 8 to 60 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused_with_one_line_and_nothing_written(folder, capsys, arguments, message):
    rows = [row | {"one": "same", "two": 2, "nan": 1.0 if place else None} for place, row in enumerate(read())]
    write("texts.jsonl", rows)
    write("few.jsonl", rows[:12])
    write("wide.jsonl", [{"a": "x", "b": "y", "c": "z"}] * 50)
    write("code.jsonl", [{"text": f"def f({name}):\n    return {name}[0] + 1"} for name in "abc"])
    given = arguments.replace("READ", "model --texts texts.jsonl --text-column text").split()
    assert cli.run(["probe", *given, *([] if "-o" in given else ["-o", "out"])]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not (folder / "out").exists()
