"""Text classification tasks seen from the upper blocks of an installed encoder, which alone are tuned."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_available, load, load_sentence_encoder, stdlib_docstrings

_TASKS = ("agnews", "trec", "subjective", "tweet_eval_emotion")
_TOKENS, _CLASSES, _SCALE, _BATCH = 24, 5, 20.0, 64


class TextTask(NamedTuple):
    """States below the upper blocks (n, t, d), added attention mask (n, 1, 1, t), classes; to fit and held out."""

    fit: tuple[Tensor, ...]
    held: tuple[Tensor, ...]


class UpperBlocks(nn.Module):
    """The last blocks of a BERT encoder: (states, mask) → sentence embeddings of unit length."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, batch: Any) -> Float[Tensor, "n d"]:
        """Embeddings of a batch (states, mask, …)."""
        states, mask = batch[0], batch[1]
        for block in self.blocks:
            states = block(states, attention_mask=mask)
            states = states[0] if isinstance(states, tuple) else states
        words = (mask[:, 0, 0, :, None] == 0).to(states)
        return F.normalize((states * words).sum(1) / words.sum(1), dim=-1)


class ClassMeans(nn.Module):
    """A frozen head: cosine to the mean embedding of each class, as the untuned encoder sees them."""

    directions: Tensor

    def __init__(self, features: Float[Tensor, "n d"], y: Int[Tensor, " n"]) -> None:
        super().__init__()
        means = torch.stack([features[y == c].mean(0) for c in range(int(y.max()) + 1)])
        self.register_buffer("directions", F.normalize(means, dim=-1))

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n c"]:
        """Logits."""
        return _SCALE * features @ self.directions.mT


def text_tasks(fit: int, held: int, seed: int, upper: int = 2) -> tuple[str, UpperBlocks, dict[str, TextTask]]:
    """What the texts are, the upper blocks of MiniLM, and four tasks: text sets, or docstrings by module."""
    model, tokenizer = load_sentence_encoder()
    blocks: nn.ModuleList = model.encoder.layer
    lower, model.encoder.layer = blocks[:-upper], blocks[:-upper]
    assert isinstance(lower, nn.ModuleList)
    name, sets = _records()
    tasks = {}
    for task, records in sets.items():
        order = np.random.default_rng(seed).permutation(len(records))[: fit + held]
        classes = sorted({label for _, label in records})
        states, masks = [], []
        for start in range(0, len(order), _BATCH):
            texts = [records[i][0] for i in order[start : start + _BATCH]]
            given = tokenizer(texts, max_length=_TOKENS, truncation=True, padding="max_length", return_tensors="pt")
            with torch.no_grad():
                states.append(model(**given).last_hidden_state)
            masks.append((1 - given["attention_mask"].float())[:, None, None] * torch.finfo(torch.float32).min)
        y = torch.tensor([classes.index(records[i][1]) for i in order])
        columns = (torch.cat(states), torch.cat(masks), y)
        cut = len(order) - held
        tasks[task] = TextTask(*(tuple(c[part] for c in columns) for part in (slice(cut), slice(cut, None))))
    return name, UpperBlocks(nn.ModuleList(blocks[-upper:])).eval(), tasks


def _records() -> tuple[str, dict[str, list[tuple[str, str]]]]:
    if is_available("icl_text"):
        found = {}
        for task in _TASKS:
            data = load(f"icl_text/{task}")
            parts = data.values() if isinstance(data, dict) else [data]
            found[task] = [(record["text"], record["label"]) for part in parts for record in part]
        return "AG News, TREC, subjectivity and emotion", found
    entries = stdlib_docstrings()
    largest = [label for label, _ in Counter(entry.label for entry in entries).most_common(4 * _CLASSES)]
    groups = {f"modules {i + 1}": set(largest[i :: len(_TASKS)]) for i in range(len(_TASKS))}
    return "docstrings of the standard library by module, five modules a task", {
        task: [(entry.text, entry.label) for entry in entries if entry.label in labels]
        for task, labels in groups.items()
    }
