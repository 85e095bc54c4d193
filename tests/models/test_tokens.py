from __future__ import annotations

from typing import Any

import pytest
import torch

from subspan.models import SegmentTokens, TokenRoles, predicting_states

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
TRIMS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>{% endfor %}"
DROPS = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
)
SHOUTS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}{% endfor %}"
GENERATION = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "context", "text": "The cat is grey."}, {"type": "text", "text": "Which colour is it?"}],
    },
    {"role": "assistant", "content": "grey"},
    {"role": "user", "content": "Which animal? grey"},
    {"role": "assistant", "content": "The cat"},
]


@pytest.fixture
def tokenizer() -> Any:
    """Byte-level, a token a character: every role can be read off the text."""
    characters = {chr(code): index for index, code in enumerate(range(32, 127))} | {"\n": 95, "<pad>": 96, "é": 97}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="~"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>")
    fast.chat_template = PLAIN
    return fast


def text_of(tokenizer: Any, roles: TokenRoles, name: str, row: int = 0) -> str:
    return tokenizer.decode(roles.input_ids[row][getattr(roles, name)[row]])


def test_each_token_has_its_role(tokenizer: Any) -> None:
    roles = TokenRoles.from_messages(tokenizer, [TALK])
    assert text_of(tokenizer, roles, "assistant") == "greyThe cat"
    assert text_of(tokenizer, roles, "context") == "The cat is grey."
    assert text_of(tokenizer, roles, "query") == "Which colour is it?Which animal? grey"
    everything = TokenRoles.from_messages(tokenizer, [TALK], query="non_assistant")
    assert text_of(tokenizer, everything, "query").startswith("<system>Be brief.</s><user>\nWhich colour is it?")
    for one, other in (("assistant", "query"), ("assistant", "context"), ("query", "context")):
        assert not (getattr(everything, one) & getattr(everything, other)).any()


def test_the_same_words_in_another_role_are_not_confused(tokenizer: Any) -> None:
    """Searching the assistant's tokens would find 'grey' in the question and 'The cat' in the document."""
    roles = TokenRoles.from_messages(tokenizer, [TALK])
    first_grey = tokenizer.decode(roles.input_ids[0]).index("grey.")
    assert not roles.assistant[0, first_grey]
    assert roles.context[0, first_grey]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_role(tokenizer: Any, side: str) -> None:
    short = [{"role": "user", "content": "Hi?"}]
    roles = TokenRoles.from_messages(tokenizer, [TALK, short], query="non_assistant", padding_side=side)
    assert roles.pad[1].sum() > 0
    assert roles.pad[1, 0 if side == "left" else -1]
    assert not (roles.pad & (roles.query | roles.assistant | roles.context)).any()
    assert roles.batch["attention_mask"].sum(1).tolist() == (~roles.pad).sum(1).tolist()
    assert text_of(tokenizer, roles, "query", 1) == "<user>Hi?</s>"


def test_a_template_that_marks_the_assistant_is_believed(tokenizer: Any) -> None:
    tokenizer.chat_template = GENERATION
    roles = TokenRoles.from_messages(tokenizer, [TALK])
    assert text_of(tokenizer, roles, "assistant") == "grey</s>The cat</s>"
    assert text_of(tokenizer, roles, "query") == "Which colour is it?Which animal? grey"


def test_a_template_that_trims(tokenizer: Any) -> None:
    tokenizer.chat_template = TRIMS
    roles = TokenRoles.from_messages(tokenizer, [[{"role": "user", "content": "  Hi? \n"}]])
    assert text_of(tokenizer, roles, "query") == "Hi?"


def test_truncation_may_cut_a_role_away(tokenizer: Any) -> None:
    roles = TokenRoles.from_messages(tokenizer, [TALK], max_length=30)
    assert roles.input_ids.shape == (1, 30)
    assert not roles.assistant.any()


def test_placeholder_tokens_are_context_wherever_they_stand(tokenizer: Any) -> None:
    image = tokenizer.convert_tokens_to_ids("#")
    roles = TokenRoles.from_messages(
        tokenizer, [[{"role": "user", "content": "##What is it?"}]], context_token_ids=[image], query="non_assistant"
    )
    assert text_of(tokenizer, roles, "context") == "##"
    assert "#" not in text_of(tokenizer, roles, "query")


@pytest.mark.parametrize("template", [DROPS, SHOUTS])
def test_a_template_that_changes_contents_is_refused(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="changes or leaves out contents"):
        TokenRoles.from_messages(tokenizer, [TALK])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([[{"content": "x"}]], "message 0 has no role"),
        ([[{"role": "user", "content": 3}]], "needs a text or a list of parts"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "no text or context"),
        ([[{"role": "user", "content": "\ue0f0"}]], "reserved"),
        ([], "at least one"),
    ],
)
def test_wrong_messages_are_named(tokenizer: Any, messages: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenRoles.from_messages(tokenizer, messages)


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        TokenRoles.from_messages(tokenizer, [TALK])


@pytest.mark.slow
def test_roles_on_the_packaged_language_model() -> None:
    from subspan.datasets import is_installed, load_language_model

    if not is_installed("smollm2"):
        pytest.skip("the smollm2 weights are not installed: subspan models install smollm2")
    _, tokenizer = load_language_model()
    roles = TokenRoles.from_messages(tokenizer, [TALK, TALK[1:3]])
    assert text_of(tokenizer, roles, "assistant", 1) == "grey"
    assert text_of(tokenizer, roles, "context") == "The cat is grey."
    assert torch.equal(roles.attention_mask == 0, roles.pad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_belong_to_the_piece_that_has_their_last_character(side: str) -> None:
    words = ["[CLS]", "[PAD]", "great", "Ġfilm", "Ġlabel", ":", "Ġgood", "Ġbad", "bo", "ring", "?"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    raw.normalizer = tokenizers.normalizers.Replace(" ", "Ġ")
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"Ġ?[a-zé]+|:"), "isolated")
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]")
    long = [("great film", "text"), (" label:", "prefix"), (" good", "label"), (" film", "text"), (" label:", "prefix")]
    found = SegmentTokens.from_segments(fast, [long, [("film", "text"), (" label:", "prefix")]], padding_side=side)
    ids = [[words.index(w) for w in line.split()] for line in
           ("[CLS] great Ġfilm Ġlabel : Ġgood Ġfilm Ġlabel :", "[CLS] ? Ġlabel :")]  # fmt: skip
    pad = [1] * 5
    assert found.input_ids.tolist() == [ids[0], pad + ids[1] if side == "left" else ids[1] + pad]
    assert found.segment[0].tolist() == [-1, 0, 0, 1, 1, 2, 3, 4, 4]
    start = 5 if side == "left" else 0
    assert found.segment[1].tolist()[start : start + 4] == [-1, 0, 1, 1]
    assert (found.segment[1] == -1).sum() == 6
    assert found.last("prefix") == [[4, 8], [start + 3]]
    assert found.mask("label").nonzero().tolist() == [[0, 5]]
    assert found.last("label") == [[5], []]
    # The space before a word is the piece's before, the token is not.
    over = SegmentTokens.from_segments(fast, [[("great ", "text"), ("film", "query")]])
    assert over.segment.tolist() == [[-1, 0, 1]]
    with pytest.raises(ValueError, match="role"):
        found.mask("nothing")
    with pytest.raises(ValueError, match="no token of its own"):
        SegmentTokens.from_segments(fast, [[("great", "text"), ("", "label")]]).last("label")
    with pytest.raises(ValueError, match="no text"):
        SegmentTokens.from_segments(fast, [[("", "text")]])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_state_that_predicts_a_token_stands_before_it(side: str) -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]])
    states[mask == 0] = torch.nan
    found, valid = predicting_states(states, mask)
    first = 3 if side == "left" else 1
    assert valid.nonzero().tolist() == [*[[0, t] for t in range(1, 5)], [1, first], [1, first + 1]]
    for row, t in valid.nonzero().tolist():
        assert torch.equal(found[row, t], states[row, t - 1])
    assert float(found[~valid].abs().sum()) == 0
