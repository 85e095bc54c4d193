"""Parts of few-shot prompts stand where their characters are, under tokenizers that cut words in different ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from subspan.probe import CUTS, FewShotBatch, FewShotExample, FewShotPrompt, draw_examples

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["a fine film", "café, naïve: dull label", "so-so", "the label: of (it)"]
PROMPT = FewShotPrompt({"0": "bad", "1": "good"}, "review: {text} label: {label}\n")


def trained(kind: str) -> Any:
    """Byte pairs, byte pairs with a start token, and pieces that carry the space before them."""
    models, pre = tokenizers.models, tokenizers.pre_tokenizers
    own = tokenizers.Tokenizer(models.BPE(unk_token="<u>"))
    pieces = pre.Sequence([pre.Split("\n", "isolated"), pre.Metaspace(prepend_scheme="first")])
    own.pre_tokenizer = pieces if kind == "pieces" else pre.ByteLevel(add_prefix_space=False)
    corpus = [PROMPT.template.format(text=text, label=word) for text in TEXTS for word in ("good", "bad")] * 9
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=[] if kind == "pieces" else pre.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<s>", "<pad>", "<u>"],
    )
    own.train_from_iterator(corpus, trainer)
    if kind == "start":
        own.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", unk_token="<u>")


def examples(k: int = 2) -> list[FewShotExample]:
    shown = tuple((text, str(i % 2)) for i, text in enumerate(TEXTS))
    return [FewShotExample(shown[:k], "dull", "0"), FewShotExample(shown[1 : 1 + k], "a very fine film indeed", "1")]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bytes", "start", "pieces"])
def test_parts_are_where_their_characters_are(kind: str, side: Any) -> None:
    tokenizer = trained(kind)
    for append in ("right", "wrong", None):
        batch = PROMPT.build(examples(), tokenizer, append=append, padding_side=side)
        for row, example in enumerate(examples()):
            present = batch.tokens.attention_mask[row].bool()
            text = PROMPT.text(example) + {"right": f" {PROMPT.words[example.label]}", None: ""}.get(
                append, f" {PROMPT.words[str(1 - int(example.label))]}"
            )
            encoded = tokenizer(text, return_offsets_mapping=True)
            assert batch.tokens.input_ids[row][present].tolist() == encoded["input_ids"]
            first = int(batch.first[row])
            seen = [text[start:end] for start, end in encoded["offset_mapping"]]
            assert seen[int(batch.query[row]) - first].endswith(":")
            assert seen[int(batch.text[row]) - first].strip() in example.query
            for at, label, (_, name) in zip(batch.forerunners[row], batch.labels[row], example.demonstrations):
                assert int(label) == int(at) + 1
                assert seen[int(at) - first].endswith(":")
                assert seen[int(label) - first].strip() == PROMPT.words[name]
            if append:
                assert batch.appended is not None
                assert int(batch.appended[row]) == int(batch.query[row]) + 1
                assert seen[int(batch.appended[row]) - first].strip() == text.split()[-1]
        assert batch.owners.tolist() == [[0, 1], [1, 0]]
        assert batch.targets.tolist() == [0, 1]
    ids = PROMPT.label_ids(tokenizer)
    assert ids == [tokenizer("label: " + word)["input_ids"][-1] for word in ("bad", "good")]


def edges(batch: FewShotBatch, cut: Any, row: int, **options: Any) -> list[tuple[int, int]]:
    first = int(batch.first[row])
    return [(q - first, k - first) for q, k in batch.edges(cut, **options)[row].nonzero().tolist()]


def test_edges_are_those_of_the_masks_by_hand() -> None:
    words = {word: number for number, word in enumerate(["pu", *"abc:;XY"])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "pu"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="pu", unk_token="pu")
    prompt = FewShotPrompt(["X", "Y"], "{text} : {label} ; ")
    # 0 a 1 b 2 : 3 X 4 ; 5 c 6 : 7 Y 8 ; 9 b 10 c 11 :
    given = [FewShotExample((("a b", "X"), ("c", "Y")), "b c", "X"), FewShotExample((("a", "X"), ("c", "Y")), "a", "X")]
    for side in ("left", "right"):
        batch = prompt.build(given, tokenizer, padding_side=side)
        assert batch.lengths.tolist() == [12, 10]
        own_text = [(2, 0), (2, 1), (6, 4), (6, 5)]
        assert edges(batch, "text_to_forerunner", 0) == own_text
        asked = [(11, 8), (11, 9), (11, 10)]
        assert edges(batch, "text_to_forerunner", 0, include_query=True) == own_text + asked
        assert edges(batch, "query_to_forerunner", 0) == asked
        assert edges(batch, "query_to_forerunner", 0, keep_self=False) == [*asked, (11, 11)]
        assert edges(batch, "forerunner_to_label", 0) == [(3, 2), (7, 6)]
        assert edges(batch, "label_to_query", 0) == [(11, 3), (11, 7)]
        assert edges(batch, "forerunner_to_forerunner", 0) == [(6, 2), (11, 2), (11, 6)]
        assert edges(batch, "label_to_query", 1) == [(9, 2), (9, 6)]
    started = PROMPT.build(examples(), trained("start"))
    assert min(k for _, k in edges(started, "text_to_forerunner", 0)) == 1  # a start token is nobody's
    bare = prompt.build([e._replace(demonstrations=()) for e in given], tokenizer)
    assert bare.k == 0
    assert edges(bare, "query_to_forerunner", 0) == [(2, 0), (2, 1)]
    for cut in (cut for cut in CUTS if cut != "query_to_forerunner"):
        with pytest.raises(ValueError, match="demonstrations"):
            bare.edges(cut)


@pytest.mark.parametrize("side", ["left", "right"])
def test_random_edges_are_as_many_and_leave_rows_something(side: Any) -> None:
    batch = PROMPT.build(examples(), trained("start"), padding_side=side)
    counts = torch.tensor([30, 3])
    found = batch.random_edges(counts, random_state=1)
    assert found.sum((1, 2)).tolist() == [30, 3]
    assert torch.equal(found, batch.random_edges(counts, random_state=1))
    assert not torch.equal(found, batch.random_edges(counts, random_state=2))
    present = batch.tokens.attention_mask.bool()
    assert not bool((found & ~(present.unsqueeze(2) & present.unsqueeze(1))).any())
    assert not bool(found.triu().any())
    assert not bool(found[torch.arange(2), :, batch.first].any())
    length = int(batch.lengths[0])
    most = (length - 1) * (length - 2) // 2
    every = batch.random_edges(torch.tensor([most, 0]))
    assert int(every[0].sum()) == most
    with pytest.raises(ValueError, match="counts"):
        batch.random_edges(torch.tensor([most + 1, 0]))


def test_demonstrations_are_drawn_without_the_query() -> None:
    found = draw_examples(["a", "b", "b", "c"], "wxyz", ["b"] * 40, ["x"] * 40, k=2, random_state=3)
    assert {pair for example in found for pair in example.demonstrations} == {("a", "w"), ("c", "z")}
    assert len({example.demonstrations for example in found}) == 2
    assert found == draw_examples(["a", "b", "b", "c"], "wxyz", ["b"] * 40, ["x"] * 40, k=2, random_state=3)
    with pytest.raises(ValueError, match="query_labels"):
        draw_examples(["a"], ["w"], ["b"], [])


@pytest.mark.parametrize(
    ("labels", "template", "match"),
    [
        (["a"], "{text}: {label}", "two or more"),
        (["a", "a"], "{text}: {label}", "two or more"),
        (["a", "b"], "{text} {label}", "no label prefix"),
        (["a", "b"], "{label}: {text}", "template"),
        (["a", "b"], "{text}: ", "template"),
    ],
)
def test_templates_without_their_parts_are_refused(labels: Any, template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FewShotPrompt(labels, template)


def test_labels_that_cannot_be_told_and_prompts_that_do_not_fit_are_refused() -> None:
    tokenizer, (one, two) = trained("bytes"), examples()
    with pytest.raises(ValueError, match="'baddest' has"):
        FewShotPrompt(["good", "baddest"], PROMPT.template).build(
            [one._replace(demonstrations=(), label="good")], tokenizer
        )
    several = FewShotPrompt(["good", "baddest"], PROMPT.template, multi_token="first")
    assert len(several.label_ids(tokenizer)) == 2
    with pytest.raises(ValueError, match="share their token"):
        FewShotPrompt(["goodxx", "goodyy"], PROMPT.template, multi_token="first").label_ids(tokenizer)
    for given, match in (
        ([], "at least one"),
        ([one, two._replace(demonstrations=())], "example 1, 0"),
        ([one._replace(query=" ")], "example 0 has an empty text"),
        ([one._replace(label="7")], "'7' is none of 0, 1"),
    ):
        with pytest.raises(ValueError, match=match):
            PROMPT.build(given, tokenizer)


def test_a_tokenizer_that_parts_labels_from_the_prefix_in_no_way_or_with_more_between_is_refused() -> None:
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<u>": 0, "isgood": 1, "isbad": 2}, "<u>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<u>")
    with pytest.raises(ValueError, match="a prefix has no token of its own"):
        FewShotPrompt(["good", "bad"], "{text} is{label} ").build(
            [FewShotExample((("so", "good"),), "film", "bad")], tokenizer
        )

    class Odd:
        """Puts a token of no characters after each colon."""

        is_fast, pad_token_id, inner = True, 0, trained("bytes")

        def __call__(self, text: str, **options: Any) -> dict[str, list[Any]]:
            found = self.inner(text, **options)
            pairs = zip(found["input_ids"], found["offset_mapping"])
            tokens = [e for i, (a, b) in pairs for e in [(i, (a, b)), *([(1, (b, b))] if text[a:b] == ":" else [])]]
            return {"input_ids": [i for i, _ in tokens], "offset_mapping": [at for _, at in tokens]}

    with pytest.raises(ValueError, match="right after the prefix"):
        FewShotPrompt({"0": "bad", "1": "good"}, "{text} : {label}\n").build(examples(), Odd())
    with pytest.raises(ValueError, match="a fast one"):
        PROMPT.build(examples(), object())
