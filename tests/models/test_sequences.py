"""Running text in sequences, and its perplexity."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from subspan.models import text_perplexity, token_sequences


def letters(text, add_special_tokens):
    return {"input_ids": [ord(letter) for letter in text]}


def test_texts_become_sequences_of_one_length():
    texts = ["abcdefg", "h", "ij"]
    whole = [ord(letter) for letter in "abcdefg\n\nh\n\nij\n\n"]
    for length in (2, 5, 16):
        found = [batch["input_ids"] for batch in token_sequences(letters, texts, length=length)]
        assert torch.cat(found, 1)[0].tolist() == whole[: len(whole) // length * length]
        assert {each.shape for each in found} == {(1, length)}
    assert len(list(token_sequences(letters, texts, length=3, count=2))) == 2
    assert list(token_sequences(letters, ["a"], length=9)) == []


class Bigram(torch.nn.Module):
    """Predicts each token by the one before it."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table[input_ids])


def test_perplexity_is_over_all_tokens_that_are_predicted():
    model, rows = Bigram(), [[0, 1, 2, 3], [4, 4]]
    chance = [model.table[a].softmax(0)[b].log() for row in rows for a, b in itertools.pairwise(row)]
    expected = math.exp(-float(torch.stack(chance).mean().detach()))
    found = text_perplexity(model, [{"input_ids": torch.tensor([row])} for row in rows])
    assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="sequences: one of at least two tokens"):
        text_perplexity(model, [{"input_ids": torch.tensor([[1]])}])
