"""The last blocks on states that are kept give what the whole model gives, and move the same weights."""

import pytest
import torch

from subspan.models.continuations import target_log_likelihood
from subspan.models.tokens import SegmentTokens
from subspan.reproduce.materials.language_tail import LanguageTail, Texts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

PAIRS = [("two", " four"), ("a much longer prompt", " b"), ("third", " is c and on")]
PIECES = [[(prompt, "prompt"), (answer, "answer")] for prompt, answer in PAIRS]


@pytest.fixture
def tokenizer():
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {"<pad>": 95}
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token="<pad>")


def language_model(**options):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, **sizes, **options))


@pytest.mark.parametrize("blocks", [1, 2])
def test_likelihoods_and_gradients_are_those_of_the_whole_model(tokenizer, blocks):
    model = language_model()
    tail = LanguageTail(model, blocks)
    assert len(tail.free) == len(list(model.model.layers[-blocks:].parameters()))
    assert not any("embed" in name for name, _ in tail.named_parameters())
    kept = tail.keep(tokenizer, PIECES, "answer", size=2)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight += 0.1  # kept states are those below
    tokens = SegmentTokens.from_segments(tokenizer, PIECES, add_special_tokens=False, padding_side="right")
    expected = target_log_likelihood(model, tokens.batch, tokens.mask("answer"))
    found = tail(Texts.of(kept))
    torch.testing.assert_close(found, expected)
    weight = model.model.layers[-blocks].mlp.up_proj.weight
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), weight)[0], torch.autograd.grad(expected.sum(), weight)[0]
    )


def test_batches_are_of_any_texts_and_token_by_token(tokenizer):
    tail = LanguageTail(language_model(), 2).eval()
    kept = tail.keep(tokenizer, PIECES, "answer")
    together = Texts.of(kept)
    assert tokenizer.decode(together.targets[:5]).replace(" ", "") == "four"
    with torch.no_grad():
        whole = tail.log_likelihood(together)
        alone = torch.cat([tail.log_likelihood(Texts.of([text])) for text in kept])
        swapped = tail(Texts.of(kept[::-1]))
        # Padding says nothing, whatever it is.
        poisoned = together._replace(states=together.states + 9 * (together.attention == 0).unsqueeze(-1))
        torch.testing.assert_close(tail.log_likelihood(poisoned), whole)
        torch.testing.assert_close(tail.log_likelihood(together, tail.outputs(together)), whole)
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(swapped, together.means(whole).flip(0))
    short = tail.keep(tokenizer, [[(PAIRS[2][0], "prompt"), (" is c", "answer")]], "answer")
    (cut,) = tail.keep(tokenizer, PIECES[2:], "answer", most=5)
    assert len(cut.ids) == 10
    torch.testing.assert_close(tail(Texts.of([cut])), tail(Texts.of(short)))


def test_the_norm_and_an_untied_output_layer_can_be_free(tokenizer):
    model = language_model(tie_word_embeddings=True)
    count = len(LanguageTail(model, 1).free)
    assert [parameter.shape for parameter in LanguageTail(model, 1, norm=True).free[count:]] == [(16,)]
    tail = LanguageTail(model, 1, norm=True, head=True)
    assert len(tail.free) == count + 2
    assert not model.get_input_embeddings().weight.requires_grad
    with torch.no_grad():
        texts = Texts.of(tail.keep(tokenizer, PIECES, "answer"))
        before = tail(texts)
        tail.free[-1].zero_()
        assert tail(texts).tolist() == pytest.approx([-torch.tensor(96.0).log().item()] * 3)
        torch.testing.assert_close(LanguageTail(model, 1)(texts), before)  # the whole model's layer is as it was
