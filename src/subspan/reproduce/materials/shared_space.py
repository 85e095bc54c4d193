"""The recipe of a small shared image-text space: EfficientNet-Lite0 and MiniLM, both frozen, and two trained heads.

No CLIP weights ship as packages, so the protocols that need a shared space train one: three minutes for features and
heads on two cores the first time, afterwards everything comes from the cache folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from subspan.datasets import is_available, load, load_sentence_encoder
from subspan.models import ImageEncoder, SentenceEncoder
from subspan.nn.dual_encoder import DualEncoder
from subspan.nn.training import quiet_trainer

from ..protocol import Progress
from ..training import kept
from .image_features import image_encoder, pooled_features
from .sentences import text_features

TEMPLATES = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a bright photo of a {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
    "a dark photo of a {}.",
    "a good photo of a {}.",
    "a low resolution photo of a {}.",
    "a photo of one {}.",
    "a photo of the {}.",
    "a small picture of a {}.",
    "an image of a {}.",
    "itap of a {}.",
    "there is a {} in the picture.",
    "the {} in the middle of a picture.",
)
"""Caption templates for class names; training draws one a picture."""

DIGIT_NAMES = tuple(
    f"handwritten digit {word}"
    for word in ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
)


@dataclass(frozen=True)
class Recipe:
    """Everything the trained heads depend on. Images are prepared at `image_size` pixels.

    The temperature is CLIP's after training, 1/100: a contrast that cold keeps the gap between the modalities that two
    networks start with (Liang et al., 2022), a warm one closes it.
    """

    sources: tuple[str, ...] = ("cifar100", "imagenet1k_sample", "flickr8k_1000")
    images_per_source: int | None = None
    image_size: int = 128
    d: int = 256
    hidden: int = 1024
    dropout: float = 0.5
    temperature: float = 0.01
    learn_temperature: bool = False
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch_size: int = 256
    epochs: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Pairs:
    """Pairs of frozen features: `image[i]` goes with `text[i]`; rows of one `group` show the same thing."""

    image: Float[Tensor, "n p"]
    text: Float[Tensor, "n q"]
    group: Int[Tensor, " n"]
    captions: tuple[str, ...]
    names: tuple[str, ...]
    """Class name a row, empty where the picture has no class."""

    def __len__(self) -> int:
        return len(self.group)

    def select(self, index: Any) -> Pairs:
        """The rows of `index` (a mask or indices)."""
        chosen = torch.arange(len(self))[torch.as_tensor(index)]
        rows = chosen.tolist()
        return Pairs(
            self.image[chosen],
            self.text[chosen],
            self.group[chosen],
            tuple(self.captions[row] for row in rows),
            tuple(self.names[row] for row in rows),
        )


@dataclass(frozen=True)
class SharedSpace:
    """Trained heads on two frozen encoders, and the pairs of each source by split.

    splits[source]: "train" rows trained the heads; "fit" and "test" rows were not seen, and share no picture.
    """

    recipe: Recipe
    heads: DualEncoder
    splits: dict[str, dict[str, Pairs]]

    @torch.no_grad()
    def encode_image_features(self, features: Any) -> Float[Tensor, "n d"]:
        """Unit vectors of pooled EfficientNet-Lite0 features (n, 1280)."""
        return self.heads.encode_image_features(torch.as_tensor(features))

    @torch.no_grad()
    def encode_text_features(self, features: Any) -> Float[Tensor, "n d"]:
        """Unit vectors of MiniLM embeddings (n, 384)."""
        return self.heads.encode_text_features(torch.as_tensor(features))

    def encode_images(self, images: Iterable[Any]) -> Float[Tensor, "n d"]:
        """Unit vectors of images, prepared as in training."""
        return self.encode_image_features(self.image_encoder.encode(images))

    def encode_texts(self, texts: Iterable[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts, whose features are kept in the cache folder."""
        return self.encode_text_features(text_features(list(texts), self.text_encoder, repeated=True))

    def prototypes(self, names: Sequence[str], templates: Sequence[str] = TEMPLATES[:1]) -> Float[Tensor, "c d"]:
        """One unit vector a class name, the mean over templates."""
        texts = [template.format(name.replace("_", " ")) for name in names for template in templates]
        features = torch.as_tensor(self.text_encoder.encode(texts)).reshape(len(names), len(templates), -1)
        with torch.no_grad():
            return self.heads.prototypes(features)

    @property
    def logit_scale(self) -> float:
        """The learnt factor of cosines in the softmax."""
        return float(self.heads.loss.scale.detach())

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """Images → pooled EfficientNet-Lite0 features (n, 1280)."""
        return image_encoder(self.recipe.image_size)

    @cached_property
    def text_encoder(self) -> SentenceEncoder:
        """Texts → MiniLM embeddings (n, 384)."""
        return SentenceEncoder(*load_sentence_encoder())


def dual_encoder(*, quick: bool = False, seed: int = 0, progress: Progress | None = None) -> SharedSpace:
    """Train the shared space, or take it from the cache.

    quick: CIFAR-100 alone, and 1100 pictures of it. Where the shared data sets are absent, scikit-learn's handwritten
    digits with the digits' names take their place.
    """
    recipe = Recipe(seed=seed)
    recipe = replace(recipe, sources=recipe.sources[:1], images_per_source=1100) if quick else recipe
    if not all(is_available(source) for source in recipe.sources):
        recipe = replace(recipe, sources=("digits",))
    return train(recipe, progress)


def train(recipe: Recipe, progress: Progress | None = None) -> SharedSpace:
    """Train the heads of a recipe on the "train" split of its sources, or read them from the cache folder."""
    say = progress or (lambda message, fraction: None)
    splits = {}
    for number, source in enumerate(recipe.sources):
        say(f"features of {source}", number / (len(recipe.sources) + 1))
        splits[source] = _splits(source, recipe)
    heads = DualEncoder(
        *(getattr(next(iter(splits.values()))["train"], side).shape[1] for side in ("image", "text")),
        d=recipe.d,
        hidden=recipe.hidden,
        dropout=recipe.dropout,
        temperature=recipe.temperature,
        learn_temperature=recipe.learn_temperature,
    )
    say("training the heads", len(recipe.sources) / (len(recipe.sources) + 1))
    pairs = [parts["train"] for parts in splits.values()]
    columns = {side: torch.cat([getattr(part, side) for part in pairs]) for side in ("image", "text")}
    starts = np.cumsum([0, *(int(part.group.max()) + 1 for part in pairs)]).tolist()
    columns["group"] = torch.cat([part.group + start for part, start in zip(pairs, starts)])
    heads = kept(
        heads, "dual-encoder", {"recipe": recipe, "pairs": columns}, lambda: _fit_heads(heads, columns, recipe)
    )
    return SharedSpace(recipe, heads, splits)


@dataclass(frozen=True)
class _Source:
    """Pictures of one source with captions, class number (or picture number), class name and split of each."""

    images: Any
    captions: list[list[str]]
    groups: list[int]
    names: list[str]
    parts: list[str]


def _read(source: str, limit: int | None) -> _Source:
    if source == "flickr8k_1000":
        photos = load(source)
        chosen = range(min(len(photos), limit or len(photos)))
        return _Source(
            photos.images.subset(chosen),
            [photos.records[i]["captions"] for i in chosen],
            list(chosen),
            [""] * len(chosen),
            [("train", "fit", "test")[(i % 10 > 4) + (i % 10 > 7)] for i in chosen],
        )
    if source == "imagenet1k_sample":
        photos = load(source)
        chosen = range(min(len(photos), limit or len(photos)))
        records = [photos.records[i] for i in chosen]
        return _Source(
            photos.images.subset(chosen),
            [[TEMPLATES[0].format(r["name"]), f"{r['name']}: {r['gloss']}."] for r in records],
            list(chosen),
            [r["name"] for r in records],
            [("train", "fit", "test")[(i % 10 > 6) + (i % 10 > 8)] for i in chosen],
        )
    if source == "digits":
        data = load(source)
        names = [DIGIT_NAMES[label] for label in data["y"]]
        images, labels = data["x"] * 15, data["y"].tolist()
        parts = [("train", "fit", "test")[(i % 10 > 4) + (i % 10 > 7)] for i in range(len(names))]
    else:
        data = load(source)
        train, test = len(data["x_train"]), len(data["x_test"])
        if limit is not None:
            train, test = min(train, limit), min(test, limit // 2)
        images = np.concatenate([data["x_train"][:train], data["x_test"][:test]])
        labels = [*data["y_train"][:train].tolist(), *data["y_test"][:test].tolist()]
        names = [str(data["classes"][label]).replace("_", " ") for label in labels]
        seen = int(0.6 * train)
        parts = ["train"] * seen + ["fit"] * (train - seen) + ["test"] * test
    draw = np.random.default_rng(0).integers(len(TEMPLATES), size=len(names))
    captions = [[TEMPLATES[template].format(name)] for template, name in zip(draw, names)]
    return _Source(images, captions, labels, names, parts)


def _splits(source: str, recipe: Recipe) -> dict[str, Pairs]:
    raw = _read(source, recipe.images_per_source)
    count = [len(captions) for captions in raw.captions]
    captions = tuple(caption for several in raw.captions for caption in several)
    image = pooled_features(raw.images, image_encoder(recipe.image_size), recipe.image_size)
    text = text_features(captions, SentenceEncoder(*load_sentence_encoder()), repeated=True)
    picture = torch.arange(len(count)).repeat_interleave(torch.tensor(count))
    pairs = Pairs(
        image[picture],
        text,
        torch.tensor(raw.groups)[picture],
        captions,
        tuple(raw.names[i] for i in picture.tolist()),
    )
    part = np.array(raw.parts)[picture.numpy()]
    return {name: pairs.select(part == name) for name in ("train", "fit", "test")}


def _fit_heads(heads: DualEncoder, columns: dict[str, Tensor], recipe: Recipe) -> None:
    heads.set_scales(columns["image"], columns["text"])

    def rows(index: list[int]) -> dict[str, Tensor]:
        return {name: values[index] for name, values in columns.items()}

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        for module in heads.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        index: Any = range(len(columns["group"]))
        loader = torch.utils.data.DataLoader(index, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=rows)
        with quiet_trainer(max_epochs=recipe.epochs) as trainer:
            options = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
            trainer.fit(heads.objective(**options), loader)
