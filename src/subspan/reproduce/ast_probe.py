"""Whether syntax trees of Python functions can be read from a subspace of two models' states, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from subspan.datasets import is_available, load, load_language_model, load_sentence_encoder, stdlib_docstrings
from subspan.geometry import Subspace
from subspan.measures import paired_bootstrap
from subspan.models import random_blocks
from subspan.probe import (
    ASTProbe,
    SyntaxTree,
    TokenStates,
    code_trees,
    label_recall,
    permuted_trees,
    right_branching,
    token_states,
    tree_score,
    tree_to_tuple,
    tuple_to_tree,
)

from .protocol import Check, Outcome, Progress, Table

FEWEST, MOST = 8, 80


class Setting(NamedTuple):
    """A model: how to load it, its layers, those read with random blocks, snippets (learnt, held, test), and ranks."""

    name: str
    load: Callable[[], tuple[Any, Any]]
    layers: tuple[int, ...]
    random_layers: tuple[int, ...]
    snippets: tuple[int, int, int]
    rank: int
    ranks: tuple[int, ...]
    epochs: int
    seeds: int = 3


MINILM = Setting("MiniLM", load_sentence_encoder, tuple(range(7)), (2, 4, 6), (800, 100, 150), 128, (8, 32, 256), 20)
SMOLLM = Setting("SmolLM2", load_language_model, (0, 6, 12, 18, 24, 30), (6, 12), (300, 60, 100), 128, (8, 32, 256), 20)
QUICK = MINILM._replace(
    layers=(0, 3, 6), random_layers=(3,), snippets=(300, 40, 60), rank=64, ranks=(8,), epochs=8, seeds=1
)
# The published rate of 1e-3 and 32 snippets a step are for corpora 20 times larger, and as many more steps.
RATE, BATCH = 3e-3, 8


class Corpus(NamedTuple):
    """Trees to learn from and to be tested on, and those of another source."""

    name: str
    trees: list[SyntaxTree]
    other: list[SyntaxTree]


def corpus(seed: int) -> Corpus:
    """Functions of the standard library without docstrings, in random order; HumanEval and MBPP where at hand."""
    functions = stdlib_docstrings(kinds=("function",), min_length=1)
    found = code_trees([entry.code for entry in functions], min_tokens=FEWEST, max_tokens=MOST).trees
    trees = list({tree.tokens: tree for tree in found}.values())
    order = np.random.default_rng(seed).permutation(len(trees))
    other: list[SyntaxTree] = []
    if is_available("python_functions"):
        sources = [record["code"] for records in load("python_functions").values() for record in records]
        other = code_trees(sources, min_tokens=FEWEST, max_tokens=MOST).trees
    parser = "Python's ast" if trees[0].nodes[0].label == "Module" else "tree-sitter"
    random = np.random.default_rng(seed)
    other = [other[i] for i in random.permutation(len(other))]
    return Corpus(f"functions of Python's standard library, trees by {parser}", [trees[i] for i in order], other)


class Parts(NamedTuple):
    """States and trees that are learnt from, held for validation, and tested on."""

    learnt: tuple[TokenStates, list[SyntaxTree]]
    held: tuple[TokenStates, list[SyntaxTree]]
    test: tuple[TokenStates, list[SyntaxTree]]

    def of(self, *layers: int) -> Parts:
        """In some layers."""
        return Parts(*((states.layer(*layers), trees) for states, trees in self))


def parts(setting: Setting, model: Any, tokenizer: Any, trees: Sequence[SyntaxTree], layers: Sequence[int]) -> Parts:
    """The first trees of the corpus as a model sees them."""
    wanted = list(trees[: sum(setting.snippets)])
    states = token_states(model, tokenizer, wanted, layers)
    kept = [wanted[number] for number in states.kept]
    first = len(kept) - setting.snippets[1] - setting.snippets[2]
    cuts = [(0, first), (first, first + setting.snippets[1]), (first + setting.snippets[1], len(kept))]
    return Parts(*((states.part(*cut), kept[slice(*cut)]) for cut in cuts))


class Read(NamedTuple):
    """Trees of one order of the corpus read from a model: the probe, what it learnt from, and F1 by snippet."""

    probe: ASTProbe
    parts: Parts
    layers: dict[int, np.ndarray]
    controls: dict[str, np.ndarray]

    @property
    def best(self) -> np.ndarray:
        """F1 of the layer that the validation part chose."""
        return self.layers[self.probe.layer_]

    def lead(self) -> tuple[float, float, float]:
        """What the best layer has over the better control, with its interval over snippets."""
        return paired_bootstrap(self.best, max(self.controls.values(), key=np.mean))


def read(setting: Setting, model: Any, tokenizer: Any, trees: Sequence[SyntaxTree], seed: int) -> Read:
    """Probe all layers of a model, and layers of the same model with random blocks."""
    options = probe_options(setting, seed)
    whole = parts(setting, model, tokenizer, trees, setting.layers)
    probe = ASTProbe(**options).fit(*whole.learnt, whole.held)
    scores = dict(zip(setting.layers, probe.snippet_scores(*whole.test)[:, :, 2]))
    blank = parts(setting, random_blocks(model, random_state=seed), tokenizer, trees, setting.random_layers)
    untrained = ASTProbe(**options).fit(*blank.learnt, blank.held)
    random = untrained.snippet_scores(*blank.test)[setting.random_layers.index(untrained.layer_), :, 2]
    return Read(probe, whole, scores, {"embeddings": scores[setting.layers[0]], "random blocks": random})


def probe_options(setting: Setting, seed: int) -> dict[str, Any]:
    """Of every probe of a model."""
    return {
        "rank": setting.rank,
        "max_epochs": setting.epochs,
        "learning_rate": RATE,
        "batch_size": BATCH,
        "random_state": seed,
    }


class Found(NamedTuple):
    """What one model gave: F1 by layer, of controls and by rank, facts; the lead over the better control by seed."""

    setting: Setting
    layer: int
    layers: dict[int, float]
    controls: dict[str, float]
    ranks: dict[int, float]
    facts: dict[str, float]
    seeds: list[Seed]
    recall: list[tuple[str, float, int]]

    @property
    def best(self) -> float:
        """F1 of the layer that the validation part chose."""
        return self.layers[self.layer]

    @property
    def lead(self) -> float:
        """Of the best layer over the better of embeddings and random blocks, mean over seeds."""
        return float(np.mean([each.lead[0] for each in self.seeds]))


class Seed(NamedTuple):
    """The best layer under one seed, its F1, that of the controls, and the lead with its interval over snippets."""

    number: int
    layer: int
    best: float
    controls: dict[str, float]
    lead: tuple[float, float, float]

    @classmethod
    def of(cls, number: int, found: Read) -> Seed:
        """What is kept of a reading."""
        controls = {name: float(each.mean()) for name, each in found.controls.items()}
        return cls(number, found.probe.layer_, float(found.best.mean()), controls, found.lead())


def measure(setting: Setting, data: Corpus, seed: int, progress: Progress) -> Found:
    """Probe all layers of a model under every seed, and under the first the other controls and ranks."""
    model, tokenizer = setting.load()
    progress(f"{setting.name}: probing all layers", 0.0)
    first = read(setting, model, tokenizer, data.trees, seed)
    probe, whole, options = first.probe, first.parts, probe_options(setting, seed)
    own = whole.of(probe.layer_)
    found = dict(first.controls)

    progress(f"{setting.name}: other controls", 0.25)
    generator = torch.Generator().manual_seed(seed)
    space = Subspace.random(own.learnt[0].states.shape[2], setting.rank, generator=generator, dtype=torch.float32)
    drawn = ASTProbe(**options, subspace=space).fit(*own.learnt, own.held)
    found["random subspace"] = drawn.snippet_scores(*own.test)[0, :, 2]
    orders = np.random.default_rng(seed)
    shuffled = [(states, permuted_trees(trees, orders)) for states, trees in (own.learnt, own.held)]
    permuted = ASTProbe(**options).fit(*shuffled[0], shuffled[1])
    found["permuted labels"] = permuted.snippet_scores(*own.test)[0, :, 2]
    true = own.test[1]
    guessed = right_branching(own.learnt[1], map(len, true))
    found["right-branching"] = np.array([tree_score(*pair).f1 for pair in zip(true, guessed)])

    ranks = {setting.rank: float(first.best.mean())}
    for place, rank in enumerate(setting.ranks):
        progress(f"{setting.name}: rank {rank}", 0.35 + 0.15 * place / len(setting.ranks))
        ranks[rank] = ASTProbe(**{**options, "rank": rank}).fit(*own.learnt, own.held).score(*own.test)

    facts = {
        "defect": float(probe.orthogonality_defect_.max()),
        "without the subspace": without(probe.subspace_, own, options),
        "other source": elsewhere(probe, setting, data, model, tokenizer),
    }
    recall = label_recall(zip(true, probe.predict(whole.test[0])))

    seeds = [Seed.of(seed, first)]
    for more in range(1, setting.seeds):
        progress(f"{setting.name}: seed {seed + more}", 0.5 + 0.5 * (more - 1) / (setting.seeds - 1))
        order = np.random.default_rng(seed + more).permutation(len(data.trees))
        again = read(setting, model, tokenizer, [data.trees[i] for i in order], seed + more)
        seeds.append(Seed.of(seed + more, again))
    return Found(
        setting,
        probe.layer_,
        {layer: float(row.mean()) for layer, row in first.layers.items()},
        {name: float(each.mean()) for name, each in found.items()},
        dict(sorted(ranks.items())),
        facts,
        seeds,
        [(label, share, count) for label, (share, count) in list(recall.items())[:12]],
    )


def without(space: Subspace, own: Parts, options: dict[str, Any]) -> float:
    """F1 of a new probe on states from which the subspace was taken out."""
    left = [
        (TokenStates(space.residual(states.states.float()), states.lengths, states.layers, states.kept), trees)
        for states, trees in own
    ]
    return ASTProbe(**options).fit(*left[0], left[1]).score(*left[2])


def elsewhere(probe: ASTProbe, setting: Setting, data: Corpus, model: Any, tokenizer: Any) -> float:
    """F1 on functions of another source, 0 where there is none."""
    trees = data.other[: setting.snippets[2]]
    if not trees:
        return 0.0
    states = token_states(model, tokenizer, trees, [probe.layer_])
    # The probe reads all of its layers; those that do not count here may hold anything.
    every = TokenStates(states.states.expand(len(setting.layers), -1, -1), states.lengths, setting.layers, states.kept)
    return probe.score(every, [trees[number] for number in states.kept])


def judged(found: Sequence[Found], data: Corpus) -> list[Check]:
    """Every check but the main one."""
    returned = all(tuple_to_tree(*tree_to_tuple(tree), tree.tokens) == tree for tree in [*data.trees, *data.other])
    best = {each.setting.name: each.best for each in found}
    checks = [
        Check.at_least("trees come back from their tuples", "share of all, exactly", float(returned), 1, quick=True),
        Check.below(
            "the soft projection ends orthonormal",
            "largest |P'P - I|",
            max(each.facts["defect"] for each in found),
            0.05,
        ),
    ]
    for each in found:
        name, numbers = each.setting.name, list(each.layers)
        statistics = max(each.controls["right-branching"], each.controls["permuted labels"])
        checks += [
            Check.at_least(
                f"{name}: found beyond labels' statistics",
                "F1, best layer less the better of permuted labels and right-branching",
                best[name] - statistics,
                0.12,
            ),
            Check.at_least(
                f"{name}: a learnt subspace beats a random one",
                "F1, difference",
                best[name] - each.controls["random subspace"],
                0.05,
            ),
            Check.at_least(
                f"{name}: the highest rank up to 128 beats rank 8",
                "F1, difference",
                max(f1 for rank, f1 in each.ranks.items() if 8 < rank <= 128) - each.ranks[8],
                0.05,
            ),
            Check.within(
                f"{name}: the best layer is a middle one",
                "its depth",
                each.layer / numbers[-1],
                0.15,
                0.85,
                required=False,
            ),
        ]
    return checks


def beyond(each: Found) -> Check:
    """What the blocks have learnt of syntax: the best layer against the embeddings and against random blocks."""
    return Check.at_least(
        f"{each.setting.name}: syntax is in what the blocks have learnt",
        f"F1, best layer less the better of embeddings and random blocks, mean of {len(each.seeds)} seeds",
        each.lead,
        0.12,
    )


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Probe every layer of two models for syntax trees, beside five controls and at several ranks."""
    chosen = [QUICK] if quick else [SMOLLM, MINILM]
    progress("parsing functions", 0.0)
    data = corpus(seed)
    found = []
    for place, setting in enumerate(chosen):
        start, share = 0.05 + 0.95 * place / len(chosen), 0.95 / len(chosen)
        found.append(measure(setting, data, seed, lambda said, done, s=start, w=share: progress(said, s + w * done)))
    first = found[0]
    names = [each.setting.name for each in found]
    return Outcome(
        claim="A subspace of about 100 dimensions of the middle layers of a pre-trained model holds the whole syntax "
        "tree of code: F1 far above the same probe on embeddings or on random blocks.",
        data=f"{data.name}, of {FEWEST} to {MOST} tokens: "
        + "; ".join(f"{each.setting.name} {'/'.join(map(str, each.setting.snippets))}" for each in found)
        + " learnt from, held, tested",
        model=" and ".join({"MiniLM": "all-MiniLM-L6-v2", "SmolLM2": "SmolLM2-135M-Instruct"}[name] for name in names),
        metric=f"mean F1 of labelled nodes, best layer of {names[0]}, rank {first.setting.rank}",
        ours=first.best,
        baselines=first.controls,
        main=beyond(first),
        checks=[*map(beyond, found[1:]), *judged(found, data)],
        tables=[
            *(
                Table.rounded(f"{each.setting.name}: F1 by layer", ["layer", "F1"], each.layers.items(), 3)
                for each in found
            ),
            *(
                Table.rounded(f"{each.setting.name}: F1 by rank, best layer", ["rank", "F1"], each.ranks.items(), 3)
                for each in found
            ),
            Table.rounded(
                "by seed: other snippets, other random blocks, F1",
                ["model", "seed", "layer", "best layer", "embeddings", "random blocks", "lead", "from", "to"],
                [
                    [each.setting.name, run.number, run.layer, run.best, *run.controls.values(), *run.lead]
                    for each in found
                    for run in each.seeds
                ],
                3,
            ),
            Table.rounded(
                "controls, F1",
                ["control", *names],
                [[name, *(each.controls[name] for each in found)] for name in first.controls],
                3,
            ),
            Table.rounded(
                "further",
                ["F1", *names],
                [
                    [
                        "states without the subspace, probed anew",
                        *(each.facts["without the subspace"] for each in found),
                    ],
                    ["HumanEval and MBPP, not learnt from", *(each.facts["other source"] for each in found)],
                ],
                3,
            ),
            Table.rounded(f"{names[0]}: recall of the commonest nodes", ["node", "recall", "count"], first.recall, 3),
        ],
        notes=[
            "; ".join(
                f"{each.setting.name}: best layer over the better of embeddings and random blocks {each.lead:.3f}, "
                f"{min(run.lead[0] for run in each.seeds):.3f} to {max(run.lead[0] for run in each.seeds):.3f} by seed"
                for each in found
            )
            + ".",
            "The paper's models are trained on code, its corpora 20 times larger: the shape of the finding is "
            "compared, not the numbers. Layers are chosen on the validation part.",
        ],
    )
