"""States of texts: the model's own numbers, whatever the batch and the padding, at the tokens that count."""

import pytest
import torch

from subspan.models import text_states, text_tokens
from subspan.models.block_states import block_site
from subspan.models.text_states import iterate_text_states

pytest.importorskip("transformers", reason="transformers is not installed")
from small_transformers import byte_level, meta_space, model_of, word_piece

TEXTS = ["return foo", "x", "def foo + bar22 ( x )", "foo bar x", "pass"]


@pytest.mark.parametrize(("make", "kind"), [(byte_level, "llama"), (byte_level, "gpt2"), (meta_space, "llama"),
                                            (word_piece, "bert")])  # fmt: skip
def test_states_are_the_models_own_and_the_padding_side_plays_no_part(make, kind):
    tokenizer, model = make(), model_of(kind)
    found = {}
    for side, size in (("right", 2), ("left", 3)):
        tokenizer.padding_side = side
        for pool in ("mean", "last"):
            found[side, pool] = text_states(model, tokenizer, TEXTS, pool=pool, batch_size=size)
            assert found[side, pool].layers == (0, 1, 2, 3)
            assert found[side, pool].cut == 0
    for pool in ("mean", "last"):
        assert torch.allclose(found["left", pool].states, found["right", pool].states, atol=1e-5)
    for place, text in enumerate(TEXTS):
        head = "" if kind == "bert" else "<s>"
        encoded = tokenizer(head + text, return_tensors="pt")
        # What stands in front does not count, nor what a BERT puts behind.
        inner = slice(1, -1) if kind == "bert" else slice(1, None)
        with torch.no_grad():
            # The last one of these has gone through a final norm.
            hidden = model(**encoded, output_hidden_states=True).hidden_states[:3]
        for layer, states in enumerate(hidden):
            mean, last = states[0, inner].mean(0), states[0, inner][-1]
            assert torch.allclose(found["right", "mean"].states[layer, place], mean, atol=1e-5)
            assert torch.allclose(found["right", "last"].states[layer, place], last, atol=1e-5)
        assert torch.allclose(found["right", "last"].words[place], hidden[0][0, inner].mean(0), atol=1e-5)


@pytest.mark.parametrize(("make", "kind"), [(byte_level, "llama"), (word_piece, "bert")])
def test_a_span_is_read_at_its_own_tokens(make, kind):
    tokenizer, model = make(), model_of(kind)
    spans = [(7, 10), (0, 1), (4, 7), (0, 3), (0, 4)]
    found = text_states(model, tokenizer, TEXTS, [2], spans=spans)
    whole = text_states(model, tokenizer, TEXTS, [2])
    assert torch.equal(found.words, whole.words)
    text, head = TEXTS[2], "" if kind == "bert" else "<s>"
    encoded = tokenizer(head + text, return_tensors="pt", return_offsets_mapping=True)
    offsets = encoded.pop("offset_mapping")[0].tolist()
    begin = len(head) + 4
    own = [place for place, (start, end) in enumerate(offsets) if begin < end <= begin + 3 and end > start]
    assert own
    with torch.no_grad():
        states = model(**encoded, output_hidden_states=True).hidden_states[2][0]
    assert torch.allclose(found.states[0, 2], states[own].mean(0), atol=1e-5)


def test_long_texts_are_cut_and_said_and_spans_behind_the_cut_left_out():
    tokenizer, model = byte_level(), model_of("llama")
    found = text_states(model, tokenizer, TEXTS, [1], max_length=6)
    short = text_states(model, tokenizer, [text[:5] if i != 2 else "def foo" for i, text in enumerate(TEXTS)], [1],
                        max_length=6)  # fmt: skip
    assert found.cut == 3
    assert torch.allclose(found.states[0, 1], short.states[0, 1], atol=1e-6)
    assert torch.allclose(found.states[0, 0], short.states[0, 0], atol=1e-6)
    spans = text_states(model, tokenizer, TEXTS, [1], spans=[(7, 10), (0, 1), (0, 3), (0, 3), (0, 4)], max_length=6)
    assert (spans.kept, spans.cut) == ((1, 2, 3, 4), 2)
    with pytest.raises(ValueError, match="none has its span within the 6 tokens"):
        text_tokens(tokenizer, TEXTS[:1], [(7, 10)], max_length=6)
    # A model that takes fewer tokens than are asked for.
    model.config.max_position_embeddings = 6
    assert text_states(model, tokenizer, TEXTS, [1]).cut == 3


def test_reading_goes_on_from_any_text():
    tokenizer, model = byte_level(), model_of("llama")
    tokens = text_tokens(tokenizer, TEXTS * 8)
    whole = torch.cat(list(iterate_text_states(model, tokens, [0, 3], batch_size=1)))
    rest = torch.cat(list(iterate_text_states(model, tokens, [0, 3], batch_size=2, start=13)))
    assert whole.shape == (40, 3, 16)
    assert torch.allclose(rest, whole[13:], atol=1e-5)


def test_words_that_are_not_known_count_and_special_tokens_do_not():
    tokens = text_tokens(word_piece(), ["zzz foo"])
    assert tokens.rows[0].own == [False, True, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [4]}, "layers: from 0 .* to 3, got 4"),
        ({"layers": []}, "at least one"),
        ({"texts": ["x", ""]}, "text 1 cannot be read: it has no token"),
        ({"texts": ["x y"], "spans": [(1, 1)]}, "text 0 cannot be read: its span has no token"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_refused(change, message):
    given = {"texts": TEXTS, **change}
    with pytest.raises(ValueError, match=message):
        text_states(model_of("llama"), byte_level(), given.pop("texts"), given.pop("layers", None), **given)


def test_no_offsets_and_states_that_are_not_finite():
    tokenizer, model = byte_level(), model_of("llama")
    slow = type("Slow", (), {"is_fast": False})()
    with pytest.raises(ValueError, match="does not say where its tokens are"):
        text_tokens(slow, TEXTS, [(0, 1)] * 5)
    name, site = block_site(model, 2)
    assert (name, site, block_site(model, 0)) == ("layers.1", "output", ("layers.0", "input"))
    with torch.no_grad():
        model.get_submodule(name).mlp.down_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"states for text \d are not finite"):
        text_states(model, tokenizer, TEXTS)
