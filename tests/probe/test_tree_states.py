from __future__ import annotations

from typing import Any

import pytest
import torch

from subspan.models import SegmentTokens, random_blocks
from subspan.probe import SyntaxTree, TokenStates, token_states

pytest.importorskip("transformers", reason="transformers is not installed")
from small_transformers import byte_level, meta_space, model_of, word_piece

TREES = [SyntaxTree(tuple(words.split()), ()) if " " not in words else
         SyntaxTree(tuple(words.split()), (("p", 0, len(words.split())),))
         for words in ("return foo + bar22", "x", "def foo ( é ) : pass")]  # fmt: skip


@pytest.mark.parametrize("make", [byte_level, word_piece, meta_space])
def test_states_are_the_means_over_the_models_own(make: Any) -> None:
    """The numbers of `output_hidden_states`, one text at a time, over the sub-tokens that a word has."""
    tokenizer, model = make(), model_of("bert" if make is word_piece else "llama")
    found = token_states(model, tokenizer, TREES, dtype=torch.float32, batch_size=2)
    assert found.layers == (0, 1, 2, 3)
    for tree, states in zip(TREES, found):
        head = "" if make is word_piece else "<s>"
        text = head + " ".join(tree.tokens)
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            hidden = model(**encoded, output_hidden_states=True).hidden_states[:3]
        begin = len(head)
        for place, token in enumerate(tree.tokens):
            own = [i for i, (start, stop) in enumerate(offsets) if begin < stop <= begin + len(token) and start < stop]
            for layer in range(3):
                assert torch.allclose(states[layer, place], hidden[layer][0, own].mean(0), atol=1e-5)
            begin += len(token) + 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_padding_on_either_side_gives_the_same_numbers(kind: str) -> None:
    tokenizer, model = (word_piece() if kind == "bert" else byte_level()), model_of(kind)
    prompts = [[("return", "w"), (" foo", "w")], [("x", "w")], [("def", "w"), (" foo", "w"), (" (", "o")]]
    found = []
    for side in ("left", "right"):
        tokens = SegmentTokens.from_segments(tokenizer, prompts, padding_side=side)
        positions = {} if kind == "llama" else {"position_ids": tokens.position_ids}
        with torch.no_grad():
            found.append(tokens.pool(model(**tokens.batch, **positions).last_hidden_state, "w"))
    assert torch.allclose(*found, atol=1e-5)
    assert found[0].shape == (5, 16)


def test_pooling_names_what_is_missing() -> None:
    tokens = SegmentTokens.from_segments(byte_level(), [[("a", "w"), ("", "w")]])
    with pytest.raises(ValueError, match="piece 1"):
        tokens.pool(torch.zeros(1, 1, 4), "w")
    with pytest.raises(ValueError, match="states"):
        tokens.pool(torch.zeros(2, 1, 4), "w")


def test_long_trees_are_left_out_and_the_order_is_kept() -> None:
    model, tokenizer = model_of("llama"), byte_level()
    found = token_states(model, tokenizer, TREES, [-1, 0], max_tokens=18, batch_size=1, dtype=torch.float32)
    assert (found.kept, found.lengths.tolist(), found.layers) == ((0, 1), [4, 1], (3, 0))
    whole = token_states(model, tokenizer, TREES, dtype=torch.float32)
    assert torch.allclose(found[1], whole[1][[3, 0]], atol=1e-5)
    assert torch.equal(whole.part(1, 3).layer(2).states, torch.cat([whole[1], whole[2]], 1)[2:3])
    with pytest.raises(ValueError, match="none of 3"):
        token_states(model, tokenizer, TREES, max_tokens=1)
    with pytest.raises(ValueError, match="from 0"):
        token_states(model, tokenizer, TREES, [4])


def test_states_that_half_precision_does_not_hold_are_refused() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.embed_tokens.weight.mul_(1e7)
    with pytest.raises(ValueError, match="float16"):
        token_states(model, byte_level(), TREES, [0])


def test_lengths_must_add_up() -> None:
    with pytest.raises(ValueError, match="lengths"):
        TokenStates(torch.zeros(1, 3, 2), torch.tensor([2]), (0,), (0,))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_random_blocks_keep_what_goes_in(kind: str) -> None:
    model, tokenizer = model_of(kind), word_piece() if kind == "bert" else byte_level()
    other = random_blocks(model, random_state=1)
    a, b = (token_states(each, tokenizer, TREES, dtype=torch.float32) for each in (model, other))
    assert torch.equal(a.states[0], b.states[0])
    assert not torch.allclose(a.states[1], b.states[1], atol=1e-3)
    again = random_blocks(model, random_state=1)
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), again.parameters()))
