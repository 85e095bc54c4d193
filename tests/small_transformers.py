"""Tokenizers of three kinds and untrained models, small enough for every test."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers


def byte_level(**options: Any) -> Any:
    """A byte-level BPE as that of GPT-2 and Llama 3, nothing merged but a few words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<pad>", "<s>", "fo", "foo", "Ġfoo"])}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("f", "o"), ("fo", "o"), ("Ġ", "foo")], unk_token=None)
    )
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special, **options)


def word_piece() -> Any:
    """As that of BERT, with special tokens around a text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "return", "foo", "bar", "##22", "x", "def", "pass", "e", *"+():"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer()
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special)


def meta_space() -> Any:
    """As those of sentencepiece: a mark for the space before a word."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("<pad>", 0.0), ("▁foo", -1.0), ("▁", -2.0)]
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789+():é"]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, *letters], unk_id=0))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>")


SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    config = {
        "bert": lambda: transformers.BertConfig(vocab_size=400, **SIZES),
        "llama": lambda: transformers.LlamaConfig(vocab_size=400, num_key_value_heads=1, **SIZES),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=400, n_embd=16, n_layer=3, n_head=2),
    }[kind]()
    return transformers.AutoModel.from_config(config).eval()
