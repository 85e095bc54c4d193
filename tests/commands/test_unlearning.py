"""`subspan unlearn`: an adapter and a checkpoint that say the same, resuming, plans, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from subspan import cli
from subspan.commands import unlearning
from subspan.commands.unlearning import Unlearning
from subspan.models import write_weights

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("lightning", reason="training needs Lightning (extra: train)")

pytestmark = pytest.mark.filterwarnings("ignore:.*directions with more energy")
OPTIONS = ["--rank", "2", "--epochs", "4", "--learning-rate", "0.02", "--accumulate", "1", "--plain"]


def records(first, count):
    return [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2} w{2 * i}"} for i in range(first, first + count)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small Llama with one key head for two queries, and questions with answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unlearning, "_NEW_TOKENS", 3)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=42, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=0, eos_token_id=41,
        pad_token_id=41,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    words = {f"w{i}": i for i in range(41)} | {"end": 41}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=whole).save_pretrained(tmp_path / "model")
    for name, rows in (("f", records(1, 4)), ("r", records(8, 12))):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def ran(capsys, *arguments):
    given = ["unlearn", "model", "--forget", "f.jsonl", "--retain", "r.jsonl", "--json", *OPTIONS, *arguments]
    assert cli.run(given) == 0
    return json.loads(capsys.readouterr().out)


def logits(name):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(name)(torch.arange(12).unsqueeze(0)).logits


def test_the_adapter_on_the_unchanged_base_and_the_merged_checkpoint_are_one_model(folder, capsys):
    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    found = ran(capsys, "-o", "adapter")
    rows = {row["figure"]: row for row in found["figures"]}
    assert set(rows) == {"forget_probability", "retain_probability", "held_out_probability", "forget_rouge"}
    assert rows["forget_probability"]["after"] < rows["forget_probability"]["before"]
    assert all(0 <= row[state] <= 1 for row in rows.values() for state in ("before", "after", "in_4_bits", "tuned_on"))
    assert rows["forget_probability"]["in_4_bits"] != rows["forget_probability"]["after"]
    assert (found["layers"], found["held_out"], found["steps"], found["stored_rank"]) == (14, 1, 4, 4)
    ran(capsys, "--merged", "-o", "merged")
    assert {path: path.read_bytes() for path in (folder / "model").iterdir()} == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == folder.resolve() / "model"
    stored = load_file("adapter/adapter_model.safetensors")
    for name in config["target_modules"]:
        down, up = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        base.get_submodule(name).weight.data += up @ down
    with torch.no_grad():
        torch.testing.assert_close(base(torch.arange(12).unsqueeze(0)).logits, logits("merged"), atol=1e-4, rtol=1e-3)
    assert float((logits("merged") - logits("model")).abs().max()) > 0.01
    transformers.AutoTokenizer.from_pretrained("merged")
    for name in ("adapter", "merged"):
        card = Path(name, "README.md").read_text()
        assert "forget probability" in card
        assert ("adapter" in card) == (name == "adapter")
        noted = json.loads(Path(name, "unlearn.json").read_text())
        assert noted["method"] == "reglu"
        assert len(noted["layer_facts"]) == 14
        assert [step["step"] for step in noted["course"]] == [1, 2, 3, 4]
        assert noted["base"] in Path(name, "report.html").read_text()


def test_peft_loads_the_adapter(folder, capsys):
    peft = pytest.importorskip("peft")
    ran(capsys, "-o", "adapter")
    ran(capsys, "--merged", "-o", "merged")
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    loaded = peft.PeftModel.from_pretrained(base, "adapter")
    with torch.no_grad():
        found = loaded(torch.arange(12).unsqueeze(0)).logits
    torch.testing.assert_close(found, logits("merged"), atol=1e-4, rtol=1e-3)


def test_a_killed_run_goes_on_and_one_of_other_settings_does_not(folder):
    options = {"rank": 2, "epochs": 4, "learning_rate": 0.02, "accumulate": 1}
    said = []

    def stop(message, fraction):
        said.append(message)
        if message == "step 3 of 4":
            raise KeyboardInterrupt

    def job(**changed):
        return Unlearning(folder / "model", Path("f.jsonl"), Path("r.jsonl"), options={**options, **changed})

    with pytest.raises(KeyboardInterrupt):
        job().run(folder / "out", stop)
    assert not (folder / "out").exists()
    assert [message for message in said if message.startswith("step")] == ["step 1 of 4", "step 2 of 4", "step 3 of 4"]
    said.clear()
    with pytest.raises(KeyboardInterrupt):
        job(beta=0.5).run(folder / "out", stop)
    assert "step 1 of 4" in said
    said.clear()
    job(beta=0.5).run(folder / "out", lambda message, fraction: said.append(message))
    assert [message for message in said if message.startswith("step")] == ["step 3 of 4", "step 4 of 4"]
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_plan_writes_nothing(folder, capsys):
    found = ran(capsys, "--plan", "-o", "out", "--method", "lora")
    assert found["figures"] == []
    numbers = (
        2 * sum(sum(shape) for shape in [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]) * 2
    )
    assert (found["trained_numbers"], found["steps"], found["narrowest_layer"]) == (numbers, 4, 16)
    assert found["written_megabytes"] == pytest.approx(4 * numbers / 1e6)
    assert found["estimated_seconds"] > 0
    assert sorted(path.name for path in folder.iterdir()) == ["f.jsonl", "model", "r.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MODEL": "absent"}, "MODEL: 'absent' is not a folder"),
        ({"MODEL": "other"}, "MODEL: 'other' cannot be loaded"),
        ({"MODEL": "broken"}, "MODEL: 'model.layers.0.mlp.up_proj.weight' contains NaN"),
        ({"MODEL": "short"}, "MODEL: its tokenizer gives token 38, and it has 30"),
        ({"-o": "model"}, "-o: 'model' exists"),
        ({"-o": "model/out"}, "-o: "),
        ({"--forget": "both.jsonl"}, "--forget: 1 of its records are in --retain too, the first is record 2"),
        ({"--retain": "empty.jsonl"}, "holds no records"),
        ({"--forget": "one.jsonl"}, "--forget: at least 2 records"),
        ({"--forget": "odd.jsonl"}, "--forget: record 1 of 'odd.jsonl' needs texts"),
        ({"--rank": "17"}, "rank: 17 is above the width of model.layers.0.self_attn.k_proj"),
        ({"--beta": "2"}, "beta: expected a number in [0, 1], got 2.0"),
    ],
)
def test_refused_with_one_line_and_nothing_written(folder, capsys, change, message):
    for name, rows in {
        "both": [*records(1, 1), *records(9, 1)], "empty": [], "one": records(1, 1), "odd": [{"question": "w1"}],
    }.items():  # fmt: skip
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = change.pop("MODEL", "model")
    if model == "other":
        write_weights({"a": torch.zeros(2)}, "other")
    elif model in ("broken", "short"):
        found = transformers.AutoModelForCausalLM.from_pretrained("model")
        if model == "broken":
            found.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
        else:
            found.resize_token_embeddings(30)
            found.config.pad_token_id = found.config.eos_token_id = None
        found.save_pretrained(model)
        transformers.AutoTokenizer.from_pretrained("model").save_pretrained(model)
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    options = {"--forget": "f.jsonl", "--retain": "r.jsonl", "-o": "out", "--rank": "2", **change}
    assert cli.run(["unlearn", model, *(word for pair in options.items() for word in pair)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert sorted(folder.rglob("*")) == before
