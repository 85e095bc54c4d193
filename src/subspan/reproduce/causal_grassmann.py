"""Language models that mix tokens by planes of pairs, by attention, by simpler maps of the same pairs, or not.

And heads of sentence pairs on a frozen encoder: planes, a Transformer, and no mixing.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.datasets import is_available, load
from subspan.nn import GrassmannLanguageModel, GrassmannMixing, GrassmannPairHead
from subspan.nn.grassmann_pair_head import paired_means

from .materials import SentencePairs, TokenStates, labelled_pairs, parameter_count
from .protocol import Check, Outcome, Progress
from .training import one_cycle, train
from .trials import Column, Trials, spread

D, RANK, LAYERS, CONTEXT, BATCH, STEPS, RATE = 96, 16, 2, 128, 12, 120, 3e-3
OFFSETS = (1, 2, 4, 8, 12, 16)
HEAD_D, HEAD_TRAIN, HEAD_TEST, HEAD_EPOCHS, HEAD_BATCH, HEAD_RATE = 128, 5000, 3000, 3, 64, 1e-3


class Attention(nn.Module):
    """Causal self-attention with its residual: the Transformer's sub-layer in the same place."""

    def __init__(self, d: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.maps, self.output = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, h: Float[Tensor, "n L d"]) -> Float[Tensor, "n L d"]:
        """States with what they attend to added."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.maps(h).chunk(3, -1))
        return h + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def shifted(z: Tensor, offsets: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """z_{t-Δ} of every offset, zero where there is none, (n, L, offsets, r), and their number (L, 1) at least 1."""
    padded = F.pad(z, (0, 0, max(offsets), 0))
    past = torch.stack([padded[:, max(offsets) - o : max(offsets) - o + z.shape[1]] for o in offsets], 2)
    number = (torch.arange(z.shape[1], device=z.device)[:, None] >= torch.tensor(offsets, device=z.device)).sum(1)
    return past, number.clamp_min(1)[:, None]


class PairMap(nn.Module):
    """The layer with its wedge replaced by a linear map of [z_t, mean z_{t-Δ}], the hidden width matching its size."""

    def __init__(self, d: int, rank: int, offsets: tuple[int, ...]) -> None:
        super().__init__()
        self.offsets = offsets
        self.reduce = nn.Linear(d, rank)
        self.project = nn.Sequential(
            nn.Linear(2 * rank, rank * (rank - 1) // 2), nn.GELU(), nn.Linear(rank * (rank - 1) // 2, d)
        )
        self.gate = nn.Linear(2 * d, d)

    def forward(self, h: Float[Tensor, "n L d"]) -> Float[Tensor, "n L d"]:
        """Gated states."""
        z = self.reduce(h)
        past, number = shifted(z, self.offsets)
        g = self.project(torch.cat([z, past.sum(2) / number], -1))
        alpha = torch.sigmoid(self.gate(torch.cat([h, g], -1)))
        return alpha * h + (1 - alpha) * g


class OffsetConvolution(nn.Module):
    """A depthwise causal convolution that looks at the same offsets, with the same gate."""

    def __init__(self, d: int, offsets: tuple[int, ...]) -> None:
        super().__init__()
        self.offsets = offsets
        self.weight = nn.Parameter(torch.randn(len(offsets), d) / len(offsets) ** 0.5)
        self.project = nn.Linear(d, d)
        self.gate = nn.Linear(2 * d, d)

    def forward(self, h: Float[Tensor, "n L d"]) -> Float[Tensor, "n L d"]:
        """Gated states."""
        g = self.project((shifted(h, self.offsets)[0] * self.weight).sum(2))
        alpha = torch.sigmoid(self.gate(torch.cat([h, g], -1)))
        return alpha * h + (1 - alpha) * g


MIXINGS: dict[str, Callable[[], nn.Module]] = {
    "Transformer": lambda: Attention(D),
    "Grassmann": lambda: GrassmannMixing(D, RANK, OFFSETS),
    "the same pairs, no wedge": lambda: PairMap(D, RANK, OFFSETS),
    "convolution on the offsets": lambda: OffsetConvolution(D, OFFSETS),
    "no mixing": nn.Identity,
}


class TransformerPairHead(nn.Module):
    """The Grassmann head with attention among all tokens of both sentences, which a learnt vector tells apart."""

    def __init__(self, in_features: int, classes: int, *, ffn: int = 390, dropout: float = 0.1) -> None:
        super().__init__()
        d = HEAD_D
        self.embed = nn.Linear(in_features, d)
        self.sentence = nn.Parameter(torch.randn(2, d) * 0.02)
        layer = nn.TransformerEncoderLayer(d, 4, ffn, dropout, activation="gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(4 * d, classes)

    def forward(self, a: Float[Tensor, "n p f"], b: Float[Tensor, "n q f"], *masks: Bool[Tensor, "n _"]) -> Tensor:
        """Logits (n, classes) of premises and hypotheses."""
        parts = [self.embed(part) + vector for part, vector in zip((a, b), self.sentence)]
        states = self.blocks(torch.cat(parts, 1), src_key_padding_mask=~torch.cat(masks, 1))
        return self.classifier(self.dropout(paired_means(*states.split([a.shape[1], b.shape[1]], 1), *masks)))


class MeanPairHead(nn.Module):
    """A hidden layer on the means of both sentences' tokens."""

    def __init__(self, in_features: int, classes: int, *, hidden: int = 250, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4 * in_features, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
        )

    def forward(self, a: Float[Tensor, "n p f"], b: Float[Tensor, "n q f"], *masks: Bool[Tensor, "n _"]) -> Tensor:
        """Logits (n, classes) of premises and hypotheses."""
        return self.layers(paired_means(a, b, *masks))


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "Transformer": TransformerPairHead,
    "Grassmann": lambda width, classes: GrassmannPairHead(width, classes, d_model=HEAD_D, ffn=2 * HEAD_D),
    "mean pool and MLP": MeanPairHead,
}


def text() -> tuple[str, Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Bytes to train on and held out: WikiText-2, or the sources of Python's standard library."""
    if is_available("wikitext2"):
        data = load("wikitext2")
        parts = [_bytes(data[part]) for part in ("test", "valid")]  # the training text is not among the data
        return "WikiText-2 (its test part trained on, its validation part held out), bytes", parts[0], parts[1]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:120]
    whole = _bytes("\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files))
    return "Python's standard library, bytes", whole[: len(whole) * 9 // 10], whole[len(whole) * 9 // 10 :]


def _bytes(lines: Any) -> Int[Tensor, " n"]:
    joined = lines if isinstance(lines, str) else "\n".join(str(line) for line in lines)
    return torch.from_numpy(np.frombuffer(joined.encode()[:4_000_000], dtype=np.uint8).astype(np.int64))


def next_byte_loss(model: nn.Module, windows: Int[Tensor, "n w"]) -> Tensor:
    """Cross entropy of every byte of the windows but the first."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def fit(model: nn.Module, loss: Any, batches: Any, rate: float, **options: Any) -> None:
    """AdamW, one cycle of the rate: the same for every model."""
    options |= {"optimizer": "adamw", "weight_decay": 0.01, "schedule": one_cycle(0.1), "clip": 1.0}
    train(model, loss, batches, learning_rate=rate, **options)


def trained(make: Callable[[], nn.Module], text: Tensor, steps: int, seed: int) -> GrassmannLanguageModel:
    """A language model with one way of mixing after training; one seed, one order of text."""
    torch.manual_seed(seed)
    model = GrassmannLanguageModel(256, [make() for _ in range(LAYERS)], d_model=D, context=CONTEXT, dropout=0.0)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT - 1, (steps, BATCH, 1), generator=generator)
    fit(model, next_byte_loss, [text[each + torch.arange(CONTEXT + 1)] for each in starts], RATE)
    return model


@torch.no_grad()
def perplexity(model: nn.Module, held: Tensor) -> float:
    """Perplexity a byte on held-out text."""
    windows = held[: len(held) // (CONTEXT + 1) * (CONTEXT + 1)].unflatten(0, (-1, CONTEXT + 1))
    windows = windows[:: max(1, len(windows) // 128)]
    losses = [next_byte_loss(model, w) * len(w) for w in windows.split(64)]
    return math.exp(float(torch.stack(losses).sum()) / len(windows))


def head_accuracy(
    make: Callable[[int, int], nn.Module], states: TokenStates, pairs: SentencePairs, test: SentencePairs, seed: int
) -> dict[str, float]:
    """Percent of test pairs that a head trained on the others classifies rightly, and its number of parameters."""
    torch.manual_seed(seed)
    head = make(states.rows.shape[1], len(pairs.classes))
    orders = [states.batches(pairs, HEAD_BATCH, seed + 1000 * epoch) for epoch in range(HEAD_EPOCHS)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(*batch[0]), batch[1])

    rows = [each for order in orders for each in order]
    fit(head, loss, rows, HEAD_RATE, collate=lambda rows: states.batch(pairs, rows))
    right = 0
    with torch.no_grad():
        for each in states.batches(test, 256, 0):
            given, labels = states.batch(test, each)
            right += int((head(*given).argmax(1) == labels).sum())
    return {"accuracy": 100 * right / len(test), "parameters": parameter_count(head)}


def compare_heads(seeds: range, progress: Progress) -> tuple[Trials[str], str]:
    """All heads on the same pairs, and what they were measured on."""
    source, pairs, test = labelled_pairs(HEAD_TRAIN, HEAD_TEST)
    states = TokenStates(sorted({*pairs.premises, *pairs.hypotheses, *test.premises, *test.hypotheses}))
    trials = Trials(
        HEADS,
        seeds,
        lambda arm, number: head_accuracy(HEADS[arm], states, pairs, test, number),
        progress=lambda message, part: progress(f"head: {message}", part),
        span=(0.6, 1),
    )
    note = (
        f"Heads: {source}, {len(pairs):,} pairs to train on and {len(test):,} held out, {HEAD_EPOCHS} epochs on the "
        f"token states of MiniLM, each sentence encoded alone; chance is {100 / len(pairs.classes):.0f} %."
    )
    return trials, note


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """The same model, text, steps and rate for every way of mixing; in full, the same for heads of sentence pairs."""
    source, given, held = text()
    steps, seeds = (25, range(seed, seed + 1)) if quick else (STEPS, range(seed, seed + 3))

    def run(arm: str, number: int) -> dict[str, float]:
        model = trained(MIXINGS[arm], given, steps, number)
        return {"perplexity": perplexity(model, held), "parameters": parameter_count(model)}

    trials = Trials(MIXINGS, seeds, run, progress=progress, span=(0, 1 if quick else 0.6))
    mean = trials.means("perplexity")
    over = {arm: mean["Grassmann"] / value for arm, value in mean.items()}
    ratio = "ratio of perplexities"
    columns = {"parameters": Column("parameters", max), **spread("perplexity")}
    tables = [trials.table("perplexity a byte", "mixing", columns, digits=3)]
    checks = [
        Check.at_most("the paper's gap to the Transformer", "percent above it", 100 * (over["Transformer"] - 1), 15),
        Check.below("the wedge over a map of the same pairs", ratio, over["the same pairs, no wedge"], 1,
                    required=False),
        Check.below("and over a convolution", ratio, over["convolution on the offsets"], 1, required=False),
    ]  # fmt: skip
    note = "The heads of sentence pairs are compared in the full run alone."
    if not quick:
        found, note = compare_heads(seeds, progress)
        lead = found.gap("Grassmann", "Transformer", "accuracy")
        checks.append(Check.at_least("the pair head over a Transformer head", "points of accuracy", lead, -1))
        columns = {"parameters": Column("parameters", max), **spread("accuracy")}
        tables.append(found.table("sentence pairs, percent right", "head on frozen tokens", columns))
    return Outcome(
        claim="Mixing by Plücker coordinates of token pairs in place of attention comes within 10 to 15 % of a "
        "Transformer's perplexity on WikiText-2 (275.7 against 248.4); two independent repetitions found 22 to 45 %. "
        "A head on frozen tokens is as good as a Transformer head on SNLI (85.4 against 85.1 %).",
        data=f"{source}: {len(given):,} to train on, every model the same {steps * BATCH * CONTEXT:,}",
        model=f"{LAYERS} layers of width {D}, rank {RANK}, offsets {OFFSETS}, context {CONTEXT}",
        metric="perplexity a byte on held-out text, mean of seeds",
        ours=mean["Grassmann"],
        baselines=trials.means("perplexity", but="Grassmann"),
        main=Check.at_most("planes of pairs are a way of mixing", "perplexity over that of the model without mixing",
                           over["no mixing"], 0.9, quick=True),
        checks=checks,
        tables=tables,
        notes=[
            "The paper's text pairs a token with those after it, which would leak; pairs are with the past.",
            "Bytes and a short run stand in for 30 epochs of word pieces at 13 to 18 million parameters; gaps between "
            "perplexities a byte are smaller than gaps a word.",
            note,
        ],
    )  # fmt: skip
