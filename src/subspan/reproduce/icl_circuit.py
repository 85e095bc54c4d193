"""The circuit behind few-shot answers in two language models: its three steps, its heads, and what cuts cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from subspan.datasets import is_available, load, load_language_model, load_sentence_encoder, stdlib_docstrings
from subspan.geometry import Subspace
from subspan.models import SentenceEncoder
from subspan.probe import (
    Ablation,
    CircuitReading,
    ClassCentroids,
    EncodeReport,
    FewShotExample,
    FewShotPrompt,
    ICLCircuit,
    MergeReport,
    RetrievalReport,
    draw_examples,
    encode_report,
    merge_report,
    position_bias,
    retrieval_report,
    retrieval_subspace,
)
from subspan.probe.few_shot import Cut

from .materials.gemma import has_gemma, load_gemma
from .materials.word_categories import CATEGORIES, retrieval_examples
from .protocol import Check, Outcome, Progress, Table

# Letters, whose meaning cannot help: the answer stands in the prompt alone.
WORDS = FewShotPrompt(dict(zip(CATEGORIES, "ABCD")), "word: {text} type: {label}\n")
TREC = {
    "entity": "entity",
    "description and abstract concept": "description",
    "human being": "person",
    "numeric value": "number",
    "location": "location",
}
SETS = {
    "TREC": FewShotPrompt(TREC, "question: {text} type: {label}\n"),
    "SST-2": FewShotPrompt({"negative": "negative", "positive": "positive"}, "review: {text} sentiment: {label}\n"),
}
BATCH = 32
MAIN: tuple[Cut, ...] = ("forerunner_to_label", "label_to_query")
OTHERS: tuple[Cut, ...] = ("text_to_forerunner", "query_to_forerunner", "forerunner_to_forerunner")
HALVES = ((0.0, 0.5), (0.5, 1.0))


class Setting(NamedTuple):
    """Prompts of the cuts, of what is measured beside them, and inside subspaces; texts a set and their neighbours;
    draws of controls; numbers of demonstrations compared; seeds of the cuts."""

    prompts: int
    few: int
    inside: int
    texts: int
    neighbours: int
    controls: int
    demonstrations: tuple[int, ...]
    seeds: int = 3


FULL = Setting(200, 48, 24, 80, 10, 3, (0, 1, 4))
SECOND = FULL._replace(prompts=80, few=0, controls=2)
QUICK = Setting(16, 0, 8, 20, 4, 1, (0, 1), seeds=1)


class Drawn(NamedTuple):
    """Under one seed, of its own prompts and random edges: accuracy, uncut and of each cut, the dearest random edges'
    cost, and the best head with what it has over the mean over heads."""

    seed: int
    accuracy: float
    cut: list[float]
    control: float
    head: tuple[int, int]
    gain: float

    @property
    def costs(self) -> list[float]:
        """Accuracy lost by each cut."""
        return [self.accuracy - each for each in self.cut]


def drawn(circuit: ICLCircuit, setting: Setting, seed: int) -> tuple[Drawn, CircuitReading, Ablation]:
    """Read and cut prompts of a seed; the best head is chosen on every other prompt and judged on the rest."""
    examples = retrieval_examples(setting.prompts, random_state=seed)
    reading = circuit.read(examples)
    cuts = circuit.ablate(examples, MAIN, controls=setting.controls, random_state=seed, uncut=reading.logits)
    even, odd = (retrieval_report(reading.part(slice(start, None, 2))) for start in (0, 1))
    (head,) = even.best()
    facts = Drawn(
        seed,
        cuts.accuracy(),
        [effect.accuracy() for effect in cuts.effects],
        max(effect.control_cost()[0] for effect in cuts.effects),
        head,
        odd.gain(*head)[0],
    )
    return facts, reading, cuts


class Causal(NamedTuple):
    """What one model shows on words: heads, effects of cuts, and shares of attention inside the best head's subspaces.

    The best head is chosen on every other prompt, and what is said of it comes from the rest.
    """

    name: str
    reading: CircuitReading
    merged: MergeReport
    retrieved: RetrievalReport
    cuts: Ablation
    further: Ablation | None
    head: tuple[int, int]
    gain: tuple[float, float, float]
    inside: dict[str, float]
    dims: tuple[int, int]
    blind: list[tuple[str, Any]]
    seeds: list[Drawn]

    def mean(self, fact: str) -> float:
        """Of a fact of the cuts, over seeds."""
        return float(np.mean([getattr(each, fact) for each in self.seeds]))

    @property
    def costs(self) -> list[float]:
        """Of the two cuts that the claim is about, mean over seeds."""
        return np.mean([each.costs for each in self.seeds], 0).tolist()


def causal(name: str, model: Any, tokenizer: Any, setting: Setting, seed: int, progress: Progress) -> Causal:
    """Read, cut and project one model on words whose category is a letter."""
    circuit = ICLCircuit(model, tokenizer, WORDS, batch_size=BATCH)
    examples = retrieval_examples(setting.prompts, random_state=seed)
    runs = []
    for place in range(setting.seeds):
        progress(f"{name}: cutting, seed {seed + place}", 0.7 * place / setting.seeds)
        runs.append(drawn(circuit, setting, seed + place))
    seeds, (_, reading, cuts), head = [facts for facts, _, _ in runs], runs[0], runs[0][0].head
    odd = retrieval_report(reading.part(slice(1, None, 2)))
    merged, further, blind = merge_report(reading, neighbours=setting.neighbours), None, []
    if setting.few:
        progress(f"{name}: further cuts and heads", 0.7)
        some = examples[: setting.few]
        own: dict[str, Any] = {"random_state": seed, "uncut": reading.logits[: setting.few]}
        wrong = circuit.read(some, append="wrong")
        merged = merge_report(reading.part(slice(setting.few)), wrong, neighbours=setting.neighbours)
        parts = [
            circuit.ablate(some, cut, windows, controls=0, zero_shot=False, **own)
            for cut, windows in ((OTHERS, ((0.0, 1.0),)), (MAIN, HALVES))
        ]
        further = Ablation(parts[0].effects + parts[1].effects, parts[0].targets, own["uncut"], None)
        # At most half of a layer, so that as many others are left for the control.
        even = reading.part(slice(0, None, 2))
        most, best = even.retrieval.shape[2] // 2, []
        for layer, number in retrieval_report(even).best(60):
            if sum(at == layer for at, _ in best) < most:
                best.append((layer, number))
        best = best[:5]
        blind = [("five best induction heads", circuit.ablate_heads(some, best, controls=2, **own))]
    progress(f"{name}: inside subspaces", 0.9)
    inside, dims = within(circuit, examples[1::2][: setting.inside], head, seed)
    return Causal(
        name, reading, merged, retrieval_report(reading), cuts, further, head,
        odd.gain(*head), inside, dims, blind, seeds,
    )  # fmt: skip


def within(
    circuit: ICLCircuit, examples: Sequence[FewShotExample], head: tuple[int, int], seed: int
) -> tuple[dict[str, float], tuple[int, int]]:
    """Attention to the right label where labels are seen in a head's retrieval subspace, and how wide that is."""
    whole = retrieval_subspace(circuit.model, *head)
    main = retrieval_subspace(circuit.model, *head, rank=0.9)
    generator = torch.Generator().manual_seed(seed)
    drawn = Subspace.random(main.ambient_dim, main.dim, generator=generator, dtype=torch.float32)
    shares = circuit.retained_assignment(examples, *head, [None, main, drawn]).mean(1).tolist()
    gone = circuit.retained_assignment(examples, *head, [whole], complement=True).mean(1).tolist()
    names = ("whole state", "directions of 0.9 of the energy", "as many random directions", "without the subspace")
    return dict(zip(names, [*shares, *gone])), (main.dim, whole.dim)


class Represented(NamedTuple):
    """What one text set shows of the first step, by layer."""

    name: str
    report: EncodeReport
    alignment: float
    first: float
    accuracy: float
    curve: Tensor
    bias: dict[tuple[int, int], tuple[Tensor, Tensor]]


def texts(name: str, setting: Setting, seed: int) -> tuple[list[FewShotExample], list[FewShotExample]]:
    """Prompts to be measured and those of the class means, with demonstrations of a pool of their own."""
    random = np.random.default_rng(seed)
    test, rest = ("sst2_test", "sst2_train") if name == "SST-2" else ("trec", "trec")
    known = SETS[name].words
    pools = []
    for source in (test, rest):
        records = [r for r in load(f"icl_text/{source}") if r["label"] in known and 15 < len(r["text"]) < 120]
        pools.append([records[i] for i in random.permutation(len(records))])
    measured = pools[0][: setting.texts]
    asked = {r["text"] for r in measured}
    other = [r for r in pools[1] if r["text"] not in asked][:1000]
    fitted, shown = other[: setting.texts], other[setting.texts :]

    def drawn(queries: list[Any], offset: int) -> list[FewShotExample]:
        columns = [[r[key] for r in part] for part in (shown, queries) for key in ("text", "label")]
        return draw_examples(*columns, k=4, random_state=seed + offset)

    return drawn(measured, 0), drawn(fitted, 1)


def represented(
    name: str, model: Any, tokenizer: Any, encoder: SentenceEncoder, unrelated: Any, setting: Setting, seed: int
) -> tuple[Represented, Any]:
    """States at the forerunner of a text set against the encoder's view of the queries, class means, and positions."""
    circuit = ICLCircuit(model, tokenizer, SETS[name], batch_size=BATCH)
    measured, fitted = texts(name, setting, seed)
    reading, calibration = (circuit.read(part, append=None) for part in (measured, fitted))
    reference = encoder.encode([example.query for example in measured])
    report = encode_report(
        reading, reference, calibration, unrelated=unrelated, neighbours=setting.neighbours, random_state=seed
    )
    place = report.roles.index("forerunner")
    means = ClassCentroids.fit(calibration.role("forerunner"), calibration.targets)
    right = (means.predict(reading.role("forerunner")) == reading.targets).double()
    few = measured[: max(8, setting.texts // 3)]
    states = {
        k: circuit.read([e._replace(demonstrations=e.demonstrations[4 - k :]) for e in few], append=None)
        for k in setting.demonstrations
    }
    return Represented(
        name,
        report,
        other_half(report.alignment[place]),
        float(report.alignment[place, 0].mean()),
        other_half(right) - report.class_chance,
        right.mean(1),
        position_bias({k: each.role("forerunner") for k, each in states.items()}),
    ), reference


def other_half(values: Tensor) -> float:
    """Mean of the best layer (l, n), chosen on every other prompt and read from the rest, both ways."""
    halves = [values[:, start::2].mean(1) for start in (0, 1)]
    return float(np.mean([other[int(own.argmax())] for own, other in (halves, halves[::-1])]))


def judged(found: Sequence[Causal], sets: Sequence[Represented]) -> list[Check]:
    """Every check but the main one."""
    checks = [] if len(found) < 2 else [costs(found[1])]
    for each in found:
        whole = each.inside["whole state"]
        kept, gone = (each.inside[key] for key in ("directions of 0.9 of the energy", "without the subspace"))
        checks += [
            Check.at_most(
                f"{each.name}: random edges cost little", "accuracy lost, larger of two", each.mean("control"), 0.05
            ),
            Check.at_least(
                f"{each.name}: the best head retrieves the right label",
                "share of attention, more than the mean over heads",
                each.mean("gain"),
                0.15,
            ),
            Check.at_least(
                f"{each.name}: it retrieves in its main directions", "share of attention kept", kept / whole, 0.8
            ),
            Check.at_most(
                f"{each.name}: and nowhere else",
                "share of attention, more than chance",
                gone - each.retrieved.chance,
                0.05,
                quick=True,
            ),
        ]
    if sets:
        checks += [
            Check.at_least(
                "states hold the query's meaning",
                "common neighbours over chance, best layer, lowest of the sets",
                min(each.alignment / each.report.chance for each in sets),
                2,
            ),
            Check.above(
                "more than at layer 0",
                "common neighbours, best layer less layer 0, lowest of the sets",
                min(each.alignment - each.first for each in sets),
                0,
            ),
            Check.at_least(
                "class means tell the label",
                "accuracy over chance, best layer, lowest of the sets",
                min(each.accuracy for each in sets),
                0.2,
            ),
        ]
    copying = found[0].merged
    if bool(copying.wrong_counts.isfinite().all()):
        alike = [copying.counts[at] - copying.wrong_counts[at] for at in copying.heads()[:10]]
        worst = float(torch.stack(alike).abs().max()) if alike else 0.0
        checks.append(
            Check.at_most(
                f"{found[0].name}: wrong labels are copied alike",
                "largest difference of counts",
                worst,
                0.1,
                required=False,
            )
        )
    return checks


def costs(each: Causal) -> Check:
    """What the weaker of the two cuts costs."""
    return Check.at_least(
        f"{each.name}: each cut damages the answers",
        f"calibrated accuracy lost, smaller of two cuts, mean of {len(each.seeds)} seeds",
        min(each.costs),
        0.15,
    )


def of_cuts(each: Causal) -> list[Table]:
    """Of one model: what cuts cost, by seed too, and its heads."""
    every = []
    rows = []
    effects = [*each.cuts.effects, *(each.further.effects if each.further else ())]
    for effect in [*effects, *(effect for _, effect in each.blind)]:
        control = effect.control_accuracy() if len(effect.controls) else (None, None)
        rows.append(
            [
                effect.name.replace("_", " "), f"{effect.layers[0]}-{effect.layers[1] - 1}", round(effect.size, 1),
                len(effect.targets), effect.accuracy(calibrated=False), effect.accuracy(), *effect.cost(), *control,
            ]
        )  # fmt: skip
    every.append(
        Table.rounded(
            f"{each.name}: cuts",
            ["cut", "layers", "size", "n", "accuracy", "calibrated", "lost", "from", "to", "random", "s.e."],
            rows,
            3,
        )
    )
    every.append(
        Table.rounded(
            f"{each.name}: by seed, other prompts and other random edges",
            [
                "seed",
                "calibrated",
                *(f"without {cut.replace('_', ' ')}" for cut in MAIN),
                "random cost",
                "best head",
            ],
            [[r.seed, r.accuracy, *r.cut, r.control, f"{r.head[0]}.{r.head[1]}"] for r in each.seeds],
            3,
        )
    )
    records = {(r["layer"], r["head"]): r for r in each.retrieved.records()}
    keys = ("induction", "correct_induction", "assignment", "head_average", "similarity")
    every.append(
        Table.rounded(
            f"{each.name}: heads that retrieve",
            ["layer", "head", *(key.replace("_", " ") for key in keys)],
            [[*at, *(records[at][key] for key in keys)] for at in each.retrieved.best(6)],
            3,
        )
    )
    copies = {(r["layer"], r["head"]): r for r in each.merged.records()}
    keys = ("count_right", "count_wrong", "count_any_token")
    cells = [
        [*at, *(None if np.isnan(copies[at][key]) else copies[at][key] for key in keys)]
        for at in each.merged.heads()[:6]
    ]
    every.append(
        Table.rounded(
            f"{each.name}: heads that copy", ["layer", "head", "right label", "wrong label", "any token"], cells, 3
        )
    )
    return every


def of_texts(own: Represented, model: str) -> list[Table]:
    """Of one text set: the first step by layer, and positions."""
    every = []
    at = own.report.roles.index("forerunner")
    rows = [
        [r["layer"], r["ka"], r["ka_unrelated"], r["ka_within_class"], r["centroid_acc"]]
        for r in own.report.records()
        if r["role"] == own.report.roles[at]
    ]
    titles = ["layer", "common neighbours", "unrelated", "exchanged in class", "class means"]
    every.append(Table.rounded(f"{own.name}: the first step, {model}", titles, rows, 3))
    pairs = [
        [f"{few} and {many}", layer, float(same[layer]), float(other[layer])]
        for (few, many), (same, other) in own.bias.items()
        for layer in (len(same) // 4, len(same) // 2, 3 * len(same) // 4)
    ]
    titles = ["demonstrations", "layer", "same query", "others"]
    every.append(Table.rounded(f"{own.name}: cosine of states by demonstrations", titles, pairs, 3))
    return every


def tables(found: Sequence[Causal], sets: Sequence[Represented]) -> list[Table]:
    """Cuts, heads, shares inside subspaces, and the first step by layer."""
    shares = Table.rounded(
        "attention of the best head to labels, share on the right one",
        ["labels seen in", *(each.name for each in found)],
        [[name, *(each.inside[name] for each in found)] for name in found[0].inside],
        3,
    )
    return [
        *(table for each in found for table in of_cuts(each)),
        shares,
        *(table for own in sets for table in of_texts(own, found[0].name)),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Cut and locate the circuit in one or two models, and measure its first step on real texts."""
    progress("loading", 0.0)
    model, tokenizer = load_language_model()
    setting = QUICK if quick else FULL
    sets: list[Represented] = []
    if is_available("icl_text"):
        encoder = SentenceEncoder(*load_sentence_encoder())
        unrelated: Any = encoder.encode([entry.text for entry in stdlib_docstrings()[: setting.texts]])
        for place, name in enumerate(list(SETS)[: 1 if quick else None]):
            progress(f"SmolLM2: {name}", 0.02 + 0.1 * place)
            own, _ = represented(name, model, tokenizer, encoder, unrelated, setting, seed)
            sets.append(own)
    two = not quick and has_gemma()
    share = 0.55 if two else 0.78
    found = [causal("SmolLM2", model, tokenizer, setting, seed, lambda s, f: progress(s, 0.22 + share * f))]
    if two:
        del model
        found.append(causal("Gemma-3", *load_gemma(), SECOND, seed, lambda s, f: progress(s, 0.77 + 0.23 * f)))
    first = found[0]
    effects = dict(zip(MAIN, np.mean([each.cut for each in first.seeds], 0).tolist()))
    return Outcome(
        claim="A language model answers few-shot prompts in three steps: a text is encoded into the token before its "
        "label, labels copy from it, and the query retrieves the labels of like texts. Cutting the edges of a step "
        "damages the answers, cutting as many random edges does not.",
        data=f"{len(first.seeds)} draws of {first.cuts.targets.numel()} prompts of 8 words with a letter for their "
        "category, the query one of them"
        + "".join(f"; {own.name}, {len(own.report.alignment[0, 0])} prompts of 4 demonstrations" for own in sets),
        model="SmolLM2-135M-Instruct" + (" and Gemma-3-270M" if two else ""),
        metric="accuracy of SmolLM2, labels' means taken off",
        ours=first.mean("accuracy"),
        baselines={
            **{f"without {name.replace('_', ' ')}": value for name, value in effects.items()},
            "without as many random edges": first.mean("accuracy") - first.mean("control"),
            "without demonstrations": first.cuts.zero_shot_accuracy(),
        },
        main=costs(first),
        checks=judged(found, sets),
        tables=tables(found, sets),
        notes=[
            *(
                f"{each.name}: the best head is {each.head[1]} of layer {each.head[0]}, chosen on every other prompt; "
                f"on the others it has {each.gain[0]:.3f} more ({each.gain[1]:.3f} to {each.gain[2]:.3f}) of its "
                "attention to labels on the right one than the mean over heads. "
                f"{each.dims[0]} of its {each.dims[1]} directions have 0.9 of "
                "the energy. That nothing is retrieved outside all of them follows from the weights; the check is of "
                "the way from weights to attention."
                for each in found
            ),
            "Intervals (95 %) are over prompts, standard errors over draws of random edges. Best layers are chosen on "
            "every other prompt and read from the rest.",
            "With the categories' names as labels the model needs no retrieval: its knowledge of words answers.",
        ],
    )
