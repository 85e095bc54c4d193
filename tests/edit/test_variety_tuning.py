"""Fine-tuning by transformers' Trainer with the penalty: its loss, its steps, and records that cannot be used."""

import numpy as np
import pytest
import torch

from subspan.edit import SubspaceDecoupling, decouple_finetune

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

WORDS = ["<pad>", *"abcdefgh"]
FAST = {"epochs": 25, "learning_rate": 0.05, "batch_size": 64, "held_out": 0.0}
ARGUMENTS = {"use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


@pytest.fixture
def tokenizer():
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")


@pytest.fixture
def model():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(WORDS), **sizes))


def records(n=24):
    """Two varieties with words of their own, and a word before each."""
    draws = np.random.default_rng(0)
    words = {"old": "abcd", "new": "efgh"}
    return [
        {"variety": kind, "prompt": "a", "text": " " + " ".join(draws.choice(list(words[kind]), 5))}
        for kind in ("old", "new")
        for _ in range(n // 2)
    ]


def test_the_model_is_tuned_and_the_subspace_is_looked_for_again(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.train()
    before = model.lm_head.weight.detach().clone()
    options = {"settings": FAST, "every": 2, "weight": 0.5, "arguments": {**ARGUMENTS, "max_steps": 5}}
    found, history = decouple_finetune(model, tokenizer, records(), "old", **options)
    assert found is model
    assert not model.training
    assert bool((model.lm_head.weight != before).any())
    assert [each.step for each in history] == [0, 2, 4]
    assert history[0].accuracy_before is None
    assert all(0 <= each.accuracy_before <= 1 for each in history[1:])
    assert not model.model._forward_hooks
    assert not list(tmp_path.iterdir())


def test_the_penalty_is_of_the_last_normalised_state_and_counts_once_a_step(model, tokenizer):
    """One step of plain descent is the same whether its batch comes whole or in parts."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    # As long as each other, so that means over tokens are means over batches.
    given, changes = records(8), []

    def changed(weight, size):
        model.load_state_dict(start)
        arguments = {**ARGUMENTS, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1.0}
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        decouple_finetune(
            model, tokenizer, given, "old", settings=FAST, weight=weight, relative=False, arguments=arguments
        )
        return model.model.norm.weight.detach() - start["model.norm.weight"]

    with_it, without = changed(2.0, 8), changed(1e-9, 8)
    changes = [changed(2.0, size) for size in (4, 2)]
    for change in changes:
        torch.testing.assert_close(change, with_it, atol=1e-5, rtol=1e-3)
    assert float((with_it - without).abs().max()) > 1e-2
    model.load_state_dict(start)
    texts = tokenizer([record["text"] for record in given], return_tensors="pt", return_token_type_ids=False)
    labels = [record["variety"] for record in given]
    whole = tokenizer([f"{r['prompt']}{r['text']}" for r in given], return_tensors="pt", return_token_type_ids=False)
    with SubspaceDecoupling(
        model, "model.norm", [dict(texts)], labels, "old", weight=2.0, relative=False, settings=FAST
    ) as decoupling:
        model(**whole)
        (expected,) = torch.autograd.grad(decoupling.penalty(), model.model.norm.weight)
    torch.testing.assert_close(with_it - without, -expected, atol=2e-2, rtol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": []}, "pairs: at least one"),
        ({"records": [{"text": "a"}]}, "records: number 0 has no 'variety'"),
        ({"records": [{"variety": "old", "text": ""}]}, "records: number 0 has no 'text'"),
        ({"dominant": "other"}, "labels: 'other' and at least one other"),
        ({"every": 0}, "every: expected an integer >= 1"),
    ],
)
def test_records_that_cannot_be_used(model, tokenizer, change, message):
    given = {"records": records(), "dominant": "old", **change}
    with pytest.raises(ValueError, match=message):
        decouple_finetune(model, tokenizer, given.pop("records"), **given)
