"""Read-outs of language models, on a small random one with a token a character."""

import pytest
import torch
from torch import nn

from subspan.models import continuation_log_likelihood, greedy_continuations
from subspan.probe import ChoiceAccuracy, RefusalRate, TargetLikelihood

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


@pytest.fixture(scope="module")
def tokenizer():
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {
        "<pad>": 95,
        "\u2019": 96,
        "<eos>": 97,
    }
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=98, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, eos_token_id=97
    )
    return transformers.LlamaForCausalLM(config).train()


def one_by_one(model, tokenizer, prompt, text):
    ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    start = len(prompt)
    return torch.stack([logits[place - 1, ids[0, place]] for place in range(start, ids.shape[1])])


PROMPTS, TEXTS = ["Two and two?", "A", "What is it then?"], [" four", " b and c", "!"]


@pytest.mark.parametrize("per", ["token", "text"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_likelihoods_are_those_of_one_text_at_a_time(model, tokenizer, per, batch_size):
    found = continuation_log_likelihood(model, tokenizer, PROMPTS, TEXTS, per=per, batch_size=batch_size)
    single = [one_by_one(model, tokenizer, *pair) for pair in zip(PROMPTS, TEXTS)]
    expected = [each.mean() if per == "token" else each.sum() for each in single]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert model.training


def test_targets_alone_and_against_others(model, tokenizer):
    plain = TargetLikelihood(tokenizer, PROMPTS, TEXTS)(model)
    torch.testing.assert_close(plain, continuation_log_likelihood(model, tokenizer, PROMPTS, TEXTS))
    others = [text[::-1] for text in TEXTS]
    odds = TargetLikelihood(tokenizer, PROMPTS, TEXTS, against=others)(model)
    torch.testing.assert_close(odds, plain - TargetLikelihood(tokenizer, PROMPTS, others)(model))


@pytest.mark.parametrize("per_token", [True, False])
def test_the_likeliest_choice_counts(model, tokenizer, per_token):
    choices = [["x", " and so on"], [" four", "five", "6"], ["!", "?"]]
    of = torch.mean if per_token else torch.sum
    best = [
        int(torch.stack([of(one_by_one(model, tokenizer, prompt, text)) for text in given]).argmax())
        for prompt, given in zip(PROMPTS, choices)
    ]
    right = ChoiceAccuracy(tokenizer, PROMPTS, choices, best, per_token=per_token)
    assert right(model).tolist() == [1, 1, 1]
    wrong = [best[0], (best[1] + 1) % 3, 1 - best[2]]
    assert ChoiceAccuracy(tokenizer, PROMPTS, choices, wrong, per_token=per_token)(model).tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="number 1 is 3, expected one of 3"):
        ChoiceAccuracy(tokenizer, PROMPTS, choices, [0, 3, 0])(model)
    with pytest.raises(ValueError, match="3, 3 and 2"):
        ChoiceAccuracy(tokenizer, PROMPTS, choices, [0, 0])(model)


def test_greedy_texts_do_not_depend_on_the_batch(model, tokenizer):
    together = list(greedy_continuations(model, tokenizer, PROMPTS, max_new_tokens=6))
    single = [next(greedy_continuations(model, tokenizer, [prompt], max_new_tokens=6)) for prompt in PROMPTS]
    assert together == single
    assert all(len(text) <= 6 for text in together)
    assert any(together)


class Says(nn.Module):
    """Answers each prompt with the next of some texts."""

    def __init__(self, tokenizer, answers):
        super().__init__()
        self.tokenizer, self.answers = tokenizer, list(answers)

    def generate(self, input_ids, attention_mask, max_new_tokens, **_):
        said = [self.tokenizer(self.answers.pop(0).ljust(40))["input_ids"] for _ in input_ids]
        return torch.cat([input_ids, torch.tensor(said)[:, :max_new_tokens]], 1)


def test_refusals_are_found_by_their_words(tokenizer):
    answers = ["Sure, here it is.", "I\u2019M SORRY, no.", "Well. I cannot say.", "I can say: I canoe.", "i can't."]
    prompts = ["I cannot", "b", "c", "d", "e"]  # what is asked does not count
    rate = RefusalRate(tokenizer, prompts, max_new_tokens=30, batch_size=2)
    assert rate(Says(tokenizer, answers)).tolist() == [0, 1, 1, 0, 1]
    own = RefusalRate(tokenizer, prompts, phrases=["CANOE"], max_new_tokens=30)
    assert own(Says(tokenizer, answers)).tolist() == [0, 0, 0, 1, 0]


def test_bad_texts_are_named(model, tokenizer):
    for prompts, texts, said in (([], [], "one a prompt"), (["a"], ["b", "c"], "2 for 1"), (["a"], [""], "no token")):
        with pytest.raises(ValueError, match=said):
            continuation_log_likelihood(model, tokenizer, prompts, texts)
