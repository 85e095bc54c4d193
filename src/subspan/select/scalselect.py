"""ScalSelect: training-free selection of instruction data by what the target model attends to (Wu et al., 2026)."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from scipy.stats import spearmanr
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from subspan.base import require
from subspan.geometry import RankRule
from subspan.models import TokenRoles, attended_representation, find_blocks
from subspan.models.image_tokens import image_conversation, image_token_ids

from .leverage import LeverageSelector, rank_rows, select_rows
from .shards import RepresentationShards, Shard

_FEWEST_LENGTHS, _MOST_CORRELATION = 30, 0.5


class ScalSelect:
    """Score the samples of an instruction pool for the model that is to be tuned on them, and select a subset.

    Each sample is represented, after the model's first block, by the context tokens (the image's, or the parts of a
    message of type "context") that its instruction attends to; samples are scored by their leverage on the dominant
    subspace of all representations. One block of one forward pass a sample, no gradients, no pairwise distances.
    Representations are means over tokens, which scatter the more the fewer there are: on texts the scores prefer short
    samples, and `fit` warns where their rank correlation with the lengths is above 0.5.

    Parameters
    ----------
    model, processor
        A transformers decoder with attn_implementation="eager" and its tokenizer, or a vision–language model and its
        processor.
    mass
        Share of the attention whose tokens are kept, in (0, 1].
    rank, center, standardize, row_norm
        As in `LeverageSelector`.
    block
        Whose attention and states are used: index, or name.
    query
        Which tokens ask: "user_content", "non_assistant" (with template and system tokens, as the published code does),
        or "auto": the latter for images, the former for text.
    image_delimiters
        Count the marks around an image as its tokens.
    on_empty
        A sample without context or query tokens, also after truncation, is an error ("raise"), or gets the score NaN
        with a warning ("skip").
    max_length
        Tokens a sample is cut to.
    batch_size
        Text samples a forward pass (of similar length); samples with images run one at a time.
    folder, shard_size
        Where representations are kept in shards of so many samples; an interrupted `fit` goes on there. None keeps them
        in memory.
    progress
        Whether a bar is shown.

    Attributes
    ----------
    ids_, scores_, ranking_
        (n,) each; scores are NaN for skipped samples.
    selector_, subspace_, k_
        The `LeverageSelector`, the dominant subspace and its dimension.

    Raises
    ------
    ValueError
        For settings out of range.

    References
    ----------
    Wu et al., ScalSelect, 2026 (arXiv 2602.11636).

    Examples
    --------
    >>> from subspan.select import ScalSelect
    >>> scal = ScalSelect(model, tokenizer, batch_size=8).fit(dataset)  # doctest: +SKIP
    >>> subset = dataset.select(scal.select(0.16))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        mass: float = 0.9,
        rank: int | float | str | RankRule = 0.9,
        center: bool = True,
        standardize: bool = False,
        row_norm: bool = False,
        block: int | str = 0,
        query: str = "auto",
        image_delimiters: bool = True,
        on_empty: str = "raise",
        max_length: int = 4096,
        batch_size: int = 1,
        folder: str | os.PathLike[str] | None = None,
        shard_size: int = 1024,
        progress: bool = False,
    ):
        if not 0 < mass <= 1:
            raise ValueError(f"mass: must lie in (0, 1], got {mass}")
        if query not in ("auto", "user_content", "non_assistant"):
            raise ValueError(f"query: expected 'auto', 'user_content' or 'non_assistant', got {query!r}")
        if on_empty not in ("raise", "skip"):
            raise ValueError(f"on_empty: expected 'raise' or 'skip', got {on_empty!r}")
        for name, value in (("max_length", max_length), ("batch_size", batch_size), ("shard_size", shard_size)):
            if value < 1:
                raise ValueError(f"{name}: must be at least 1, got {value}")
        self.model: Any = model
        self.processor = processor
        self.mass = mass
        self.rank = rank
        self.center = center
        self.standardize = standardize
        self.row_norm = row_norm
        self.block = _block_name(model, block)
        self.images = hasattr(processor, "image_processor")
        self.query: Any = query if query != "auto" else "non_assistant" if self.images else "user_content"
        self.image_delimiters = image_delimiters
        self.on_empty = on_empty
        self.max_length = max_length
        self.batch_size = batch_size
        self.folder = folder
        self.shard_size = shard_size
        self.progress = progress

    def fit(self, dataset: Iterable[Any]) -> ScalSelect:
        """Represent and score every sample of `dataset`, read once.

        A sample is a list of messages {"role", "content"}, or a mapping (a row of `datasets.Dataset`) with "messages"
        (or "conversations" in ShareGPT form), "images" or "image" (PIL images, arrays or paths), and "id". Content is
        a text or a list of parts of type "text", "context" (text that is asked about) or "image". Ids are compared as
        text and default to the position. Raises ValueError for repeated ids, samples without context or query tokens,
        fewer than 2 samples, and a model whose attention returns no weights.
        """
        shards = self.extract(dataset)
        known = np.asarray([position for position, empty in enumerate(self._empty) if not empty])
        if len(known) < 2:
            raise ValueError(f"dataset: leverage needs at least 2 samples with a representation, got {len(known)}")
        self.selector_ = LeverageSelector(
            1.0, rank=self.rank, center=self.center, standardize=self.standardize, row_norm=self.row_norm
        ).fit(shards)
        self.scores_ = np.full(len(self._empty), np.nan)
        self.scores_[known] = self.selector_.scores_
        self.ranking_ = rank_rows(self.scores_)
        self._warn_of_lengths(known)
        self.subspace_, self.k_ = self.selector_.subspace_, self.selector_.k_
        return self

    def _warn_of_lengths(self, known: np.ndarray) -> None:
        """Say when the scores follow the lengths of the samples: a mean over few tokens lies far from the others."""
        if len(known) < _FEWEST_LENGTHS:
            return
        result: Any = spearmanr(self.scores_[known], np.asarray(self._lengths)[known])
        correlation = float(result.statistic)
        if abs(correlation) > _MOST_CORRELATION:
            preferred = "long" if correlation > 0 else "short"
            warnings.warn(
                f"scores follow the lengths of the samples (rank correlation {correlation:.2f} with their characters): "
                f"the top list prefers {preferred} ones; select within groups of one length, or with strategy='sample'",
                stacklevel=3,
            )

    def select(self, n_select: int | float = 0.16, *, strategy: str = "top", random_state: Any = None) -> np.ndarray:
        """Positions, ascending, of the selected samples: a count, or a fraction of those with a score.

        strategy as in `LeverageSelector`. With a `datasets.Dataset`: `dataset.select(scal.select(0.16))`.
        """
        self._need_fit()
        return select_rows(self.scores_, n_select, strategy=strategy, random_state=random_state)[0]

    def scores_frame(self) -> dict[str, np.ndarray]:
        """Columns id, score and rank (1 = largest score), in pool order, ready for any library's data frame."""
        self._need_fit()
        rank = np.empty(len(self.ranking_), dtype=np.int64)
        rank[self.ranking_] = np.arange(1, len(rank) + 1)
        return {"id": self.ids_, "score": self.scores_, "rank": rank}

    def representations(self) -> Iterator[Float[Tensor, "m d"]]:
        """Blocks of the representations in pool order, without skipped samples."""
        self._need_fit()
        return iter(self._shards)

    def extract(self, dataset: Iterable[Any]) -> RepresentationShards:
        """Stage 1 alone: the representations of `dataset`, those already in `folder` taken from there."""
        if isinstance(dataset, str | Mapping) or not isinstance(dataset, Iterable):
            raise TypeError(f"dataset: expected an iterable of samples, got {type(dataset).__name__}")
        shards = RepresentationShards(self.folder, self._settings())
        ids: dict[str, int] = {}
        empty: list[bool] = []
        lengths: list[int] = []
        for index, samples in enumerate(self._pieces(dataset)):
            for sample in samples:
                if sample.id in ids:
                    raise ValueError(f"dataset: samples {ids[sample.id]} and {len(ids)} have the same id {sample.id!r}")
                ids[sample.id] = len(ids)
                lengths.append(sample.characters)
            digest = "" if self.folder is None else _digest_of_samples(samples)
            shard = shards.read(index)
            if shard is None:
                shard = Shard([sample.id for sample in samples], self._represent(samples), digest)
                shards.write(index, shard)
            elif shard.digest != digest:
                raise ValueError(f"folder: shard {index} of {str(self.folder)!r} holds other samples; choose another")
            empty += shard.rows.isnan().any(1).tolist()
            shards.count = index + 1
        self.ids_ = np.asarray(list(ids))
        self._empty, self._shards, self._lengths = empty, shards, lengths
        skipped = [self.ids_[position] for position, missing in enumerate(empty) if missing]
        if skipped and self.on_empty == "raise":
            raise ValueError(f"dataset: the folder holds skipped samples ({_some(skipped)}); use on_empty='skip'")
        if skipped:
            warnings.warn(
                f"{len(skipped)} of {len(empty)} samples have no context or no query tokens and no score: "
                f"{_some(skipped)}",
                stacklevel=3,
            )
        return shards

    # ------------------------------------------------------------------ one shard

    def _pieces(self, dataset: Iterable[Any]) -> Iterator[list[_Sample]]:
        total = len(dataset) if hasattr(dataset, "__len__") else None  # pyright: ignore[reportArgumentType]
        console = Console(stderr=True)
        shown = track(
            dataset,
            "representations",
            total=total,
            console=console,
            disable=not (self.progress and console.is_terminal),
        )
        samples = (_sample(sample, position) for position, sample in enumerate(shown))
        return iter(lambda: list(islice(samples, self.shard_size)), [])

    def _represent(self, samples: list[_Sample]) -> Float[Tensor, "m d"]:
        rows: list[Tensor | None] = [None] * len(samples)
        order = sorted(range(len(samples)), key=lambda position: -samples[position].characters)
        size = 1 if self.images else self.batch_size
        for start in range(0, len(order), size):
            positions = order[start : start + size]
            for position, row in zip(positions, self._rows([samples[position] for position in positions])):
                rows[position] = row
        return torch.stack([row for row in rows if row is not None])

    def _rows(self, samples: list[_Sample]) -> Float[Tensor, "b d"]:
        try:
            roles, batch = self._roles(samples)
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {_some([sample.id for sample in samples])}: {error}") from error
        empty = ~(roles.query.any(1) & roles.context.any(1))
        if bool(empty.any()) and self.on_empty == "raise":
            position = int(empty.nonzero()[0, 0])
            missing = "query" if bool(roles.context[position].any()) else "context"
            raise ValueError(
                f"sample {samples[position].id!r}: no {missing} tokens within max_length={self.max_length}"
                f"{_ADVICE[missing]}; on_empty='skip' leaves such samples out"
            )
        if bool(empty.all()):
            return torch.full((len(samples), self._width()), torch.nan)
        rows = attended_representation(
            self.model, batch, roles.query, roles.context, self.mass, self.block, on_empty="nan"
        ).cpu()
        broken = (~rows.isfinite()).any(1) & ~empty
        if bool(broken.any()):
            named = [sample.id for sample, bad in zip(samples, broken.tolist()) if bad]
            raise ValueError(f"model: NaN or infinity in the representation of {_some(named)}; try a wider dtype")
        return rows

    def _roles(self, samples: list[_Sample]) -> tuple[Any, Mapping[str, Any]]:
        """Masks of the tokens' roles, and what the model is called with."""
        if self.images:
            sample = samples[0]
            placeholders = image_token_ids(self.model, self.processor, delimiters=self.image_delimiters)
            talk = image_conversation(
                self.processor,
                sample.messages,
                [_image(image) for image in sample.images],
                placeholders,
                query=self.query,
                max_length=self.max_length,
            )
            return talk, talk.inputs
        if any(sample.images for sample in samples):
            raise ValueError("images need a vision–language model and its processor")
        roles = TokenRoles.from_messages(
            self.processor, [sample.messages for sample in samples], query=self.query, max_length=self.max_length
        )
        return roles, roles.batch

    def _width(self) -> int:
        config = self.model.config
        return int((config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size)

    def _settings(self) -> dict[str, Any]:
        """All that decides the representations of given samples."""
        digest = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            # Some entries of every tensor tell another training apart, without reading billions of them.
            flat = value.detach().reshape(-1)
            few = flat[:: max(1, flat.numel() // 1024)].cpu().contiguous()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(few.view(torch.uint8).numpy().tobytes())
        template = getattr(self.processor, "chat_template", None)
        return {
            "model": type(self.model).__name__,
            "weights": digest.hexdigest(),
            "chat template": hashlib.sha256(str(template).encode()).hexdigest(),
            "block": self.block,
            "mass": self.mass,
            "query": self.query,
            "image_delimiters": self.image_delimiters,
            "max_length": self.max_length,
            "shard_size": self.shard_size,
        }

    def _need_fit(self) -> None:
        if not hasattr(self, "scores_"):
            raise NotFittedError("ScalSelect is not fitted; call fit(dataset) first")


_ADVICE = {
    "query": "",
    "context": " (mark what is asked about as a part of type 'context', or give images)",
}


class _Sample(NamedTuple):
    id: str
    messages: list[dict[str, Any]]
    images: list[Any]

    @property
    def characters(self) -> int:
        return sum(len(part.get("text", "")) for message in self.messages for part in message["content"])


def _sample(given: Any, position: int) -> _Sample:
    """A sample as messages whose contents are lists of parts, beside its images in the order of their parts."""
    where = f"sample {position}"
    record = given if isinstance(given, Mapping) else {"messages": given}
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise ValueError(f"{where}: expected a list of messages, got {turns!r:.80}")
    images = record.get("images", record.get("image"))
    images = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    messages = [_message(turn, where) for turn in turns]
    placed = [part for message in messages for part in message["content"] if part["type"] == "image"]
    if images and not placed:
        # As the published code does: all images come first, and tags in the text are taken out.
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{where}: has images but no user message to show them in")
        for part in first["content"]:
            if "text" in part:
                part["text"] = part["text"].replace("<image>", "").replace("<img>", "").strip()
        first["content"] = [{"type": "image"} for _ in images] + [
            part for part in first["content"] if part.get("text") != ""
        ]
    if placed and not images:
        images = [part["image"] for part in placed if "image" in part]
    for part in placed:
        part.pop("image", None)
    identity = record.get("id")
    return _Sample(str(position) if identity is None else str(identity), messages, images)


_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}


def _message(turn: Any, where: str) -> dict[str, Any]:
    if isinstance(turn, Mapping) and "from" in turn:
        turn = {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise ValueError(f"{where}: a message needs a role and a content, got {turn!r:.80}")
    content = turn.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    known = isinstance(parts, list | tuple) and all(
        isinstance(part, Mapping)
        and part.get("type") in ("text", "context", "image")
        and (part.get("type") == "image" or isinstance(part.get("text"), str))
        for part in parts
    )
    if not known or not parts:
        raise ValueError(f"{where}: content must be text or parts of type text, context or image, got {content!r:.80}")
    return {"role": turn["role"], "content": [dict(part) for part in parts]}


def _image(image: Any) -> Any:
    """An RGB image from a path, an array or an image."""
    pillow = require("PIL.Image", extra="vision")
    if isinstance(image, str | os.PathLike):
        with pillow.open(image) as opened:
            return opened.convert("RGB")
    return (pillow.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")


def _digest_of_samples(samples: list[_Sample]) -> str:
    """Digest of ids, messages and images."""
    facts = [[sample.id, sample.messages, [_image_facts(image) for image in sample.images]] for sample in samples]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _image_facts(image: Any) -> list[Any]:
    """What tells an image from another: name, size and time of a file, else a digest of the pixels."""
    file = image if isinstance(image, str | os.PathLike) else getattr(image, "filename", None)
    if isinstance(file, str | os.PathLike) and Path(file).is_file():
        stat = Path(file).stat()
        return [str(file), stat.st_size, stat.st_mtime_ns, *getattr(image, "size", ())]
    pixels = np.asarray(image)
    return [*pixels.shape, hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()]


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(str(name)) for name in names[:5]) + (", …" if len(names) > 5 else "")


def _block_name(model: Any, block: int | str) -> str:
    """Name of a block; of an index, in the language model where there are several lists of blocks."""
    if isinstance(block, str):
        return block
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    return ".".join(part for part in (prefix, find_blocks(decoder), str(block)) if part)
