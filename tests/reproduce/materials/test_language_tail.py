"""The last blocks on states that are kept give what the whole model gives."""

import pytest
import torch

from subspan.models.continuations import target_log_likelihood
from subspan.models.tokens import SegmentTokens
from subspan.reproduce.materials.language_tail import LanguageTail, Texts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

PAIRS = [("two", " four"), ("a much longer prompt", " b"), ("third", " is c and on")]


def test_likelihoods_and_gradients_are_those_of_the_whole_model():
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {"<pad>": 95}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes))
    tail = LanguageTail(model, 2)
    free = [name for name, value in tail.named_parameters() if value.requires_grad]
    assert len(free) == len(list(model.model.layers[2:].parameters()))
    assert not any("embed" in name for name, _ in tail.named_parameters())
    kept = tail.keep(tokenizer, PAIRS, most=99, size=2)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 0.1  # kept states are those below
    pieces = [[(prompt, "prompt"), (answer, "answer")] for prompt, answer in PAIRS]
    tokens = SegmentTokens.from_segments(tokenizer, pieces, add_special_tokens=False, padding_side="right")
    expected = target_log_likelihood(model, tokens.batch, tokens.mask("answer"))
    found = tail(Texts.of(kept))
    torch.testing.assert_close(found, expected)
    weight = model.model.layers[2].mlp.up_proj.weight
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), weight)[0], torch.autograd.grad(expected.sum(), weight)[0]
    )
    cut = tail(Texts.of(tail.keep(tokenizer, [(PAIRS[2][0], " is c")], most=99)))
    torch.testing.assert_close(cut, tail(Texts.of(tail.keep(tokenizer, [PAIRS[2]], most=5))))
