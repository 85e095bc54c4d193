"""`subspan compress`: a checkpoint that plain transformers loads, resuming, plans, and what is refused."""

import json

import pytest
import torch

from subspan import cli
from subspan.models import StoredWeights, load_factored, text_perplexity, token_sequences, write_weights
from subspan.weights import CoSpaDi

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small Llama with one key head for two queries, and texts to calibrate on."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(40)}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole).save_pretrained(tmp_path / "model")
    drawn = torch.randint(40, (30, 20), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in drawn))
    return tmp_path


def ran(capsys, *arguments):
    options = ["--tokens", "16", "--sequences", "8", "--text", "texts.txt", "--json"]
    assert cli.run(["compress", "model", *options, *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def whole_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model")


def sequences(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    return token_sequences(tokenizer, (folder / "texts.txt").read_text().splitlines(), length=16)


@pytest.mark.parametrize("solver", ["procrustes", "svd", "round"])
def test_the_checkpoint_loads_in_transformers_and_the_factors_give_the_same(folder, capsys, solver):
    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    found = ran(capsys, "--ratio", "0.3", "--solver", solver, "-o", "small")
    assert len(found["layers"]) == 14
    assert found["saved"] >= 0.3 - 1e-9
    assert {path: path.read_bytes() for path in (folder / "model").iterdir()} == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    small, model = (transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{n}") for n in ("small", "model"))
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        dense, whole = small(ids).logits, model(ids).logits
        assert 0 < float((dense - whole).norm() / whole.norm()) < 1
        if solver != "round":
            load_factored(model, folder / "small" / "factored" / "layers.safetensors")
            torch.testing.assert_close(model(ids).logits, dense, atol=1e-4, rtol=1e-3)
    assert small.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    assert len(StoredWeights("small")) == len(StoredWeights("model"))
    assert json.loads((folder / "small" / "compress.json").read_text())["solver"] == solver
    assert solver in (folder / "small" / "README.md").read_text()
    assert "Layer by layer" in (folder / "small" / "report.html").read_text()
    held = [{"input_ids": batch["input_ids"]} for batch in sequences(folder)][8:24]
    for name, network in (("perplexity_after", small), ("perplexity_before", whole_model(folder))):
        assert found[name] == pytest.approx(text_perplexity(network, held), rel=1e-4)
    if solver == "round":
        assert found["perplexity_rounded"] is None
    else:
        rival = CoSpaDi(0.3, "round").fit(model := whole_model(folder))
        model.load_state_dict(rival.dense_weights(model), strict=False)
        assert found["perplexity_rounded"] == pytest.approx(text_perplexity(model, held), rel=1e-4)


def test_a_plan_writes_nothing(folder, capsys):
    found = ran(capsys, "--plan", "-o", "small")
    assert found["layers"] == []
    assert found["megabytes_after"] == pytest.approx(0.8 * found["megabytes_before"])
    assert found["estimated_seconds"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["model", "texts.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "-o", "small"], "MODEL: 'absent' is not a folder"),
        (["model"], "-o: give a new folder"),
        (["model", "-o", "model"], "-o: 'model' exists"),
        (["model", "-o", "small", "--ratio", "1.2"], "--ratio: in (0, 1), got 1.2"),
        (["model", "-o", "small", "--ratio", "0.999", "--text", "texts.txt", "--tokens", "8"], "is no atom"),
        (["model", "-o", "small", "--text", "texts.txt", "--tokens", "60000"], "--text: "),
        (["model", "-o", "small", "--exclude", ".", "--text", "texts.txt", "--tokens", "8"], "layers: none is left"),
        (["other", "-o", "small"], "MODEL: 'other' cannot be loaded"),
    ],
)
def test_refused_with_one_line_and_nothing_written(folder, capsys, arguments, message):
    write_weights({"a": torch.zeros(2)}, "other")
    before = sorted(folder.rglob("*"))
    assert cli.run(["compress", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert sorted(folder.rglob("*")) == before
