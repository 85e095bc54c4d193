"""Displacement of likelihoods by a training, on a small random model with a token a character."""

import copy

import pytest
import torch

from subspan.edit import Displacement, lld

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


def small():
    characters = {chr(code): index for index, code in enumerate(range(97, 123))} | {" ": 26, "<pad>": 27}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token=" "))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=28, **sizes))
    return model, transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")


def log_likelihood(model, tokenizer, prompt, answer):
    ids = torch.tensor([tokenizer(prompt + answer)["input_ids"]])
    chosen = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return chosen[len(prompt) - 1 :].sum()


def test_punishing_a_wrong_answer_takes_the_right_one_that_looks_like_it_along():
    before, tokenizer = small()
    after = copy.deepcopy(before)
    optimizer = torch.optim.SGD(after.parameters(), 0.05)
    log_likelihood(after, tokenizer, "sum ", "two and two").backward()  # down, as the loss is the likelihood itself
    optimizer.step()
    prompts, right, wrong = ["sum ", "sum "], ["two and one", "zq"], ["two and two", "two and two"]
    found = lld(before, after, tokenizer, prompts, right, wrong)
    with torch.no_grad():
        expected = [
            log_likelihood(after, tokenizer, *p) - log_likelihood(before, tokenizer, *p) for p in zip(prompts, right)
        ]
    torch.testing.assert_close(found.positives, torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert bool((found.negatives < found.positives).all())
    assert found.positives[0] < 0
    assert found.positives[0] < found.positives[1]
    assert 0.5 <= found.displaced <= found.lazy
    assert found.interval()[1] <= found.interval()[0] <= found.interval()[2]
    alone = lld(before, after, tokenizer, prompts, right, per="token")
    torch.testing.assert_close(alone.positives, found.positives / torch.tensor([11.0, 2.0]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="negatives: a margin needs"):
        _ = alone.margins


def test_shares_count_what_they_say():
    found = Displacement(torch.tensor([-1.0, 0.0, 2.0, -1.0]), torch.tensor([-2.0, -1.0, 1.0, 0.0]))
    assert found.lazy == 0.75
    assert found.displaced == 0.25
    with pytest.raises(ValueError, match="negatives: 1 finite changes"):
        Displacement(torch.zeros(1), torch.tensor([float("inf")]))
    with pytest.raises(ValueError, match="positives: 1 finite changes"):
        Displacement(torch.tensor([float("nan")]))
