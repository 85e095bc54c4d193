"""Grassmann mixing as a transformers language model."""

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

pytest.importorskip("transformers", reason="the model is one of transformers")

import transformers

import subspan
from subspan.nn import GrassmannLanguageModel, GrassmannMixing
from subspan.represent import CausalGrassmannConfig, CausalGrassmannForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "rank": 5, "max_position_embeddings": 32}


def made(offsets=(1, 3), seed=0, **options):
    torch.manual_seed(seed)
    model = CausalGrassmannForCausalLM(CausalGrassmannConfig(**SIZES, offsets=offsets, **options)).eval()
    # As it begins, the likeliest next token is the last one again; here the planes decide.
    torch.nn.init.normal_(model.model.token.weight)
    for block in model.model.blocks:
        torch.nn.init.normal_(block.mixing.project.weight)
        torch.nn.init.constant_(block.mixing.gate.bias, -2.0)
    return model


def ids(*shape, seed=1):
    return torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def greedy(model, prompt, steps):
    """The most likely next token, `steps` times, by forward passes over all there is."""
    for _ in range(steps):
        prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], 1)
    return prompt


def test_it_is_the_torch_model_with_a_loss():
    model, x = made(), ids(2, 9)
    twin = GrassmannLanguageModel(40, [GrassmannMixing(16, 5, (1, 3)) for _ in range(2)], d_model=16, context=32).eval()
    twin.load_state_dict(model.model.state_dict())
    labels = x.clone()
    labels[0, 4:] = -100
    out = model(x, labels=labels)
    torch.testing.assert_close(out.logits, twin(x))
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, out.logits[:, -2:])
    assert model(x, labels=labels, return_dict=False)[0] == out.loss
    assert model.get_input_embeddings() is model.model.token
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in twin.parameters())


def test_weights_start_as_those_of_the_torch_model():
    torch.manual_seed(0)
    model = CausalGrassmannForCausalLM(CausalGrassmannConfig(vocab_size=2000, hidden_size=64, rank=8)).model
    twin = GrassmannLanguageModel(2000, [GrassmannMixing(64, 8) for _ in range(6)], d_model=64)
    for (name, found), expected in zip(model.named_parameters(), twin.parameters()):
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.35, abs=1e-6), name


def test_offsets_of_every_layer_or_one_list_a_layer():
    assert [block.mixing.offsets for block in made((1, 3)).model.blocks] == [(1, 3), (1, 3)]
    model = made([[1], [2, 7]])
    assert [block.mixing.offsets for block in model.model.blocks] == [(1,), (2, 7)]
    assert model.config.sliding_window == 8
    for offsets in ([[1], [2], [4]], [[1], 2], []):
        with pytest.raises(ValueError, match="offsets: "):
            made(offsets)


@pytest.mark.parametrize("offsets", [(1, 3), [[1], [2, 7]]])
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_is_the_argmax_of_whole_passes(offsets, padded):
    model, prompt = made(offsets), ids(3, 5)
    expected = greedy(model, prompt, 12)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given = prompt
    if padded:
        given = torch.cat([ids(3, 4, seed=2), prompt], 1)
        options["attention_mask"] = torch.cat([torch.zeros(3, 4), torch.ones(3, 5)], 1).long()
    for use_cache in (True, False):
        found = model.generate(given, use_cache=use_cache, **options)
        assert torch.equal(found[:, given.shape[1] :], expected[:, 5:])
    assert min(len(row.unique()) for row in expected[:, 5:]) > 4


def test_the_cache_keeps_a_window_and_gives_the_same_logits():
    model, x = made([[1], [2, 7]]), ids(2, 20)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    whole = model(x, attention_mask=mask).logits
    cache, parts = None, []
    for start, stop in [(0, 1), (1, 4), (4, 13), (13, 14), (14, 20)]:
        out = model(x[:, start:stop], attention_mask=mask[:, :stop], use_cache=True, cache=cache)
        cache = out[1]
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()])
    assert cache.get_seq_length() == 20
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 1, 7, 5)] * 2
    again = model(x[:, :2], past_key_values=transformers.DynamicCache())
    torch.testing.assert_close(again.logits, model(x[:, :2]).logits)


def test_beams_keep_their_own_past():
    model, prompt = made(), ids(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with_cache, without = (model.generate(prompt, use_cache=each, **options) for each in (True, False))
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, greedy(model, prompt, 8))


def test_padding_changes_no_logits():
    model, x = made(), ids(2, 6)
    whole = torch.cat([ids(2, 4, seed=2), x, ids(2, 3, seed=3)], 1)
    mask = torch.zeros_like(whole)
    mask[:, 4:10] = 1
    torch.testing.assert_close(model(whole, attention_mask=mask).logits[:, 4:10], model(x).logits)


def test_saved_and_loaded(tmp_path):
    model, x = made([[1], [2, 7]], output_projection=True, eos_token_id=3), ids(2, 9)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "causal-grassmann"
    for kind in (CausalGrassmannForCausalLM, transformers.AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path, local_files_only=True)
        assert isinstance(loaded, CausalGrassmannForCausalLM)
        assert not loaded.training
        assert loaded.config.offsets == [[1], [2, 7]]
        assert loaded.config.eos_token_id == 3
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=0)
    half = CausalGrassmannForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, local_files_only=True)
    assert half.dtype == torch.bfloat16
    generated = half.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)


def test_another_vocabulary_keeps_the_head_tied():
    model = made()
    model.resize_token_embeddings(45)
    assert model(ids(1, 4)).logits.shape == (1, 4, 45)
    assert model.config.vocab_size == 45
    assert len(model.model.token.weight) == 45


def test_a_few_steps_of_the_trainer(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    # The folder tests/datasets can be imported here under the name of Hugging Face's package.
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)
    torch.manual_seed(0)
    model = CausalGrassmannForCausalLM(CausalGrassmannConfig(**SIZES, offsets=(1, 2)))
    rows = [{"input_ids": (torch.arange(12) + start) % 40} for start in range(32)]
    rows = [{**row, "labels": row["input_ids"], "attention_mask": torch.ones(12).long()} for row in rows]
    options = {"max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "report_to": []}
    quiet = {"save_steps": 30, "logging_steps": 30, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path), **options, **quiet, use_cpu=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(torch.tensor(40.0).log().item(), abs=0.5)
    assert after < before - 1
    loaded = CausalGrassmannForCausalLM.from_pretrained(tmp_path / "checkpoint-30", local_files_only=True)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_refuses_bad_input():
    model, x = made(), ids(1, 6)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(1, 6\), got \(1, 5\)"):
        model(x, attention_mask=torch.ones(1, 5))
    with pytest.raises(ValueError, match="ids: at most 32 tokens, got 33"):
        model(ids(1, 33))
    with pytest.raises(ValueError, match="cache: a DynamicCache is needed, got tuple"):
        model(x, cache=())
    for name, options in {"rank": {"rank": 1}, "offsets": {"offsets": (0,)}, "epsilon": {"epsilon": 0.0}}.items():
        with pytest.raises(ValueError, match=name):
            CausalGrassmannForCausalLM(CausalGrassmannConfig(**{**SIZES, **options}))


def test_the_room_opens_without_transformers(monkeypatch):
    monkeypatch.setattr(subspan, "represent", subspan.represent)
    for name in [name for name in sys.modules if name.startswith("subspan.represent")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    room = importlib.import_module("subspan.represent")
    room.Matryoshka()
    with pytest.raises(ImportError, match=r"'subspan\[llm\]'"):
        _ = room.CausalGrassmannConfig
