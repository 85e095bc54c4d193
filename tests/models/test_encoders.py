from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from subspan.models import ImageEncoder, ImagePreprocessing, SentenceEncoder

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

WORDS = ["a", "man", "is", "eating", "food", "the", "girl", "carrying", "baby"]
TEXTS = ["a man is eating food", "the girl", "", "a baby is eating the food the man is carrying", "baby"] * 5
IMAGES = list(np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    return transformers.BertModel(config).eval()


def alone(bert: nn.Module, tokenizer: Any, text: str) -> Tensor:
    with torch.no_grad():
        return bert(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]


def test_each_text_gets_the_mean_of_its_own_tokens_in_the_order_given(bert: nn.Module, tokenizer: Any) -> None:
    vectors = SentenceEncoder(bert, tokenizer, normalize=False).encode(TEXTS, batch_size=4)
    expected = torch.stack([alone(bert, tokenizer, text).mean(0) for text in TEXTS])
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_vectors_have_unit_length(bert: nn.Module, tokenizer: Any) -> None:
    vectors = SentenceEncoder(bert, tokenizer).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_other_poolings_and_layers(bert: nn.Module, tokenizer: Any) -> None:
    states = [alone(bert, tokenizer, text) for text in TEXTS[:4]]
    for pool, place in (("first", 0), ("last", -1)):
        vectors = SentenceEncoder(bert, tokenizer, pool=pool, normalize=False).encode(TEXTS[:4])
        np.testing.assert_allclose(vectors, torch.stack([state[place] for state in states]), atol=1e-5)
    last_layer = SentenceEncoder(bert, tokenizer, layer=-1).encode(TEXTS)
    np.testing.assert_allclose(last_layer, SentenceEncoder(bert, tokenizer).encode(TEXTS), atol=1e-6)


def test_a_stream_is_read_block_by_block(bert: nn.Module, tokenizer: Any) -> None:
    drawn = 0

    def texts() -> Iterator[str]:
        nonlocal drawn
        for drawn in range(1, 101):
            yield TEXTS[drawn % len(TEXTS)]

    blocks = SentenceEncoder(bert, tokenizer).iterate(texts(), batch_size=2)
    first = next(blocks)
    assert len(first) == drawn < 100
    whole = SentenceEncoder(bert, tokenizer).encode([TEXTS[i % len(TEXTS)] for i in range(1, 101)], batch_size=2)
    np.testing.assert_allclose(np.concatenate([first, *blocks]), whole, atol=1e-6)


def test_long_texts_are_cut(bert: nn.Module, tokenizer: Any) -> None:
    encoder = SentenceEncoder(bert, tokenizer, max_length=6)
    np.testing.assert_allclose(*encoder.encode(["a man is eating food food food", "a man is eating"]), atol=1e-6)


def test_a_saved_folder_is_enough(bert: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = SentenceEncoder(tmp_path)
    np.testing.assert_allclose(encoder.encode(TEXTS), SentenceEncoder(bert, tokenizer).encode(TEXTS), atol=1e-6)


def sentence_folder(folder: Path, bert: nn.Module, tokenizer: Any, *modules: str, **settings: Any) -> Path:
    """A folder as sentence-transformers saves it: what `settings` say stands in the files that they name."""
    import json

    bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *modules]
    entries = [
        {"idx": index, "name": str(index), "path": f"{index}_{kind}" if index else "",
         "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(entries))
    for index, kind in enumerate(kinds[1:], start=1):
        (folder / f"{index}_{kind}").mkdir(exist_ok=True)
    files = {"pooling": "1_Pooling/config.json", "transformer": "sentence_bert_config.json",
             "texts": "config_sentence_transformers.json", "dense": "2_Dense/config.json"}  # fmt: skip
    for name, value in {"pooling": {}, **settings}.items():
        (folder / files[name]).write_text(json.dumps(value))
    return folder


POOLINGS = {
    "cls_token": lambda states: states[0],
    "mean_tokens": lambda states: states.mean(0),
    "max_tokens": lambda states: states.amax(0),
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean_tokens": lambda states: (
        (states * torch.arange(1, len(states) + 1)[:, None]).sum(0) / (len(states) * (len(states) + 1) / 2)
    ),
    "lasttoken": lambda states: states[-1],
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_folder_of_sentence_transformers_is_pooled_as_it_says(
    bert: nn.Module, tokenizer: Any, tmp_path: Path, pooling: str
) -> None:
    flags = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
    folder = sentence_folder(tmp_path, bert, tokenizer, pooling={"word_embedding_dimension": 16, **flags})
    vectors = SentenceEncoder(folder).encode(TEXTS[:4])
    expected = torch.stack([POOLINGS[pooling](alone(bert, tokenizer, text)) for text in TEXTS[:4]])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    mean = torch.stack([alone(bert, tokenizer, text).mean(0) for text in TEXTS[:4]])
    given = SentenceEncoder(folder, pool="mean", normalize=True).encode(TEXTS[:4])
    np.testing.assert_allclose(given, nn.functional.normalize(mean, dim=-1), atol=1e-5)


def test_poolings_of_a_folder_are_joined_and_its_layers_follow(bert: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = sentence_folder(
        tmp_path, bert, tokenizer, "Dense", "Normalize",
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
        dense={"in_features": 32, "out_features": 3, "bias": True,
               "activation_function": "torch.nn.modules.activation.Tanh"},
    )  # fmt: skip
    torch.manual_seed(1)
    dense = nn.Linear(32, 3)
    save_file({f"linear.{name}": value for name, value in dense.state_dict().items()},
              folder / "2_Dense/model.safetensors")  # fmt: skip
    states = [alone(bert, tokenizer, text) for text in TEXTS[:4]]
    joined = torch.stack([torch.cat([state[0], state.mean(0)]) for state in states])
    expected = nn.functional.normalize(torch.tanh(dense(joined)), dim=-1).detach()
    np.testing.assert_allclose(SentenceEncoder(folder).encode(TEXTS[:4]), expected, atol=1e-5)
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/elsewhere")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin' does not exist"):
        SentenceEncoder(folder)


def test_lengths_prompts_and_case_of_a_folder(bert: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    folder = sentence_folder(
        tmp_path, bert, tokenizer,
        transformer={"max_seq_length": 6, "do_lower_case": True},
        texts={"prompts": {"query": "the girl ", "document": ""}, "default_prompt_name": "query"},
        pooling={"include_prompt": False},
    )  # fmt: skip
    encoder = SentenceEncoder(folder)
    assert (encoder.max_length, encoder.prompts) == (6, {"query": "the girl ", "document": ""})
    plain = SentenceEncoder(bert, tokenizer, max_length=6, normalize=False)
    np.testing.assert_allclose(
        encoder.encode(["A MAN is", "food"], prompt=""), plain.encode(["a man is", "food"]), atol=1e-6
    )
    expected = torch.stack([alone(bert, tokenizer, f"the girl {text}")[3:].mean(0) for text in ("a man", "food")])
    np.testing.assert_allclose(encoder.encode(["a man", "food"]), expected, atol=1e-5)
    asked = SentenceEncoder(folder, prompt="document")
    np.testing.assert_allclose(asked.encode(["food"]), plain.encode(["food"]), atol=1e-6)
    np.testing.assert_allclose(asked.encode(["food"], prompt="query"), expected[1:], atol=1e-5)
    with pytest.raises(ValueError, match="prompt: one of query, document, got 'title'"):
        encoder.encode(["food"], prompt="title")


@pytest.mark.parametrize(
    ("modules", "settings", "message"),
    [
        ((), {"pooling": {"pooling_mode_attention": True}}, "the pooling 'attention'; known are cls_token"),
        ((), {"pooling": {"pooling_mode_mean_tokens": False}}, "the pooling none"),
        (("CNN",), {}, "has the module 'CNN'; only Dense"),
        (("Dense",), {"dense": {"in_features": 16, "out_features": 2, "activation_function": "a.Swoosh"}}, "Swoosh"),
        ((), {"transformer": {"max_seq_length": "many"}}, "max_seq_length 'many'"),
        ((), {"texts": {"default_prompt_name": "query"}}, "has no prompt 'query'"),
        ((), {"transformer": []}, "holds a JSON list, an object is needed"),
    ],
)
def test_what_a_folder_asks_for_and_is_not_carried_out_is_named(
    bert: nn.Module, tokenizer: Any, tmp_path: Path, modules: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    from safetensors.torch import save_file

    folder = sentence_folder(tmp_path, bert, tokenizer, *modules, **settings)
    if "Dense" in modules:
        save_file(
            {"linear.weight": torch.ones(2, 16), "linear.bias": torch.ones(2)}, folder / "2_Dense/model.safetensors"
        )
    with pytest.raises(ValueError, match=message):
        SentenceEncoder(folder)


def test_a_folder_that_starts_otherwise_is_refused(bert: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, bert, tokenizer)
    (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.StaticEmbedding", "path": ""}]')
    with pytest.raises(ValueError, match="starts with the modules StaticEmbedding; Transformer and Pooling are needed"):
        SentenceEncoder(folder)
    (folder / "modules.json").write_text('["x"]')
    with pytest.raises(ValueError, match=r"modules\.json' cannot be read"):
        SentenceEncoder(folder)


def test_wrong_texts_and_options_are_named(bert: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    encoder = SentenceEncoder(bert, tokenizer)
    with pytest.raises(TypeError, match="entry 2 is NoneType"):
        encoder.encode(text for text in ["a", "b", None])
    with pytest.raises(TypeError, match="got a single str"):
        list(encoder.iterate("a man"))
    with pytest.raises(ValueError, match="at least one entry"):
        encoder.encode([])
    with pytest.raises(ValueError, match="batch_size"):
        encoder.encode(["a"], batch_size=0)
    with pytest.raises(ValueError, match="tokenizer: needed"):
        SentenceEncoder(bert)
    with pytest.raises(ValueError, match="holds no saved transformers model"):
        SentenceEncoder(tmp_path)
    with pytest.raises(ValueError, match="pool: one of mean, last, first, max"):
        SentenceEncoder(bert, tokenizer, pool=[])
    with pytest.raises(ValueError, match="pool: of a layer one of mean, last, first, got max"):
        SentenceEncoder(bert, tokenizer, pool="max", layer=1)
    with pytest.raises(ValueError, match="layer: a projection"):
        SentenceEncoder(bert, tokenizer, pool="projection", layer=1)


PREPROCESSING = ImagePreprocessing(16, resize="squash")


def test_images_by_a_layers_mean_over_positions() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(7))
    network(torch.zeros(1, 3, 16, 16))
    vectors = ImageEncoder(network, PREPROCESSING, layer="0").encode(IMAGES, batch_size=2)
    with torch.no_grad():
        batch = PREPROCESSING.batch(IMAGES)
        np.testing.assert_allclose(vectors, network[0](batch).mean((2, 3)), atol=1e-6)
        np.testing.assert_allclose(ImageEncoder(network, PREPROCESSING).encode(IMAGES), network(batch), atol=1e-5)
    unit = ImageEncoder(network, PREPROCESSING, normalize=True).encode(iter(IMAGES))
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="not one vector an image; name a layer"):
        ImageEncoder(network[:1], PREPROCESSING).encode(IMAGES)
    with pytest.raises(ValueError, match="at least one entry"):
        ImageEncoder(network, PREPROCESSING).encode([])


def test_images_by_tokens_without_the_class_token() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    vit = transformers.ViTModel(config).eval()
    vectors = ImageEncoder(vit, PREPROCESSING, layer=0, drop_tokens=1).encode(IMAGES)
    with torch.no_grad():
        batch = PREPROCESSING.batch(IMAGES)
        states = vit(batch, output_hidden_states=True).hidden_states[1]
        pooled = vit(batch).pooler_output
    np.testing.assert_allclose(vectors, states[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(ImageEncoder(vit, PREPROCESSING).encode(IMAGES), pooled, atol=1e-6)


def test_both_towers_of_a_clip_like_model(tokenizer: Any) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 20, "eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=6,
    )
    clip = transformers.CLIPModel(config).eval()
    texts = SentenceEncoder(clip, tokenizer, pool="projection", max_length=16).encode(TEXTS)
    images = ImageEncoder(clip, PREPROCESSING, normalize=True).encode(IMAGES)
    assert texts.shape == (25, 6)
    assert images.shape == (5, 6)
    batch = dict(tokenizer(TEXTS[:5], padding=True, return_tensors="pt"))
    with torch.no_grad():
        output = clip(**batch, pixel_values=PREPROCESSING.batch(IMAGES))
    np.testing.assert_allclose(texts[:5], output.text_embeds, atol=1e-5)
    np.testing.assert_allclose(images, output.image_embeds, atol=1e-5)


def test_an_encoder_leaves_the_mode_of_a_model_as_it_was(bert: nn.Module, tokenizer: Any) -> None:
    bert.train()
    try:
        first = SentenceEncoder(bert, tokenizer)
        vectors = first.encode(TEXTS[:3])
        assert bert.training
    finally:
        bert.eval()
    np.testing.assert_array_equal(vectors, first.encode(TEXTS[:3]))
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Dropout(0.5))
    images = ImageEncoder(model, ImagePreprocessing(size=4))
    one = images.encode([torch.rand(3, 4, 4)])
    assert one.shape == (1, 4)
    assert model.training
