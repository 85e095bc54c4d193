"""The circuit by which a language model answers a few-shot prompt: measured, located in heads, and cut (2410.04468)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils import check_random_state
from torch import Tensor, nn

from subspan.base import Progress, silent
from subspan.base.modules import evaluation
from subspan.base.parameters import Count, Seed, Whole, check_value
from subspan.geometry import Subspace
from subspan.measures import paired_bootstrap
from subspan.models import (
    SegmentTokens,
    attention_modules,
    attention_rows,
    capture,
    cut_attention,
    find_blocks,
    intervene,
    layer_names,
    output_rows,
)
from subspan.models.capture import to_device_of

from .circuit_reading import CircuitReading, read_batch
from .circuit_reports import label_assignment
from .few_shot import CUTS, Cut, FewShotBatch, FewShotExample, FewShotPrompt

Condition = Callable[[FewShotBatch], contextlib.AbstractContextManager[Any]]
"""What is changed in the model while a batch runs."""


@dataclass(frozen=True)
class Effect:
    """What a change of the model does to its answers, beside random changes of the same size.

    Attributes
    ----------
    name
        Of the change.
    layers
        [first, last) of the blocks that are changed.
    size
        Mean number of edges that are cut, or of heads.
    targets
        (n,): numbers of the right labels.
    uncut, logits, controls
        (n, classes), (n, classes) and (draws, n, classes): labels' logits of the model as it is, changed, and changed
        at random.
    """

    name: str
    layers: tuple[int, int]
    size: float
    targets: Int[Tensor, " n"]
    uncut: Float[Tensor, "n c"]
    logits: Float[Tensor, "n c"]
    controls: Float[Tensor, "m n c"]

    def accuracy(self, *, calibrated: bool = True) -> float:
        """Share of right answers."""
        return float(correct(self.logits, self.targets, calibrated=calibrated).mean())

    def control_accuracy(self, *, calibrated: bool = True) -> tuple[float, float]:
        """Mean over random changes, and its standard error over draws; NaN without controls."""
        if not len(self.controls):
            return float("nan"), float("nan")
        found = [float(correct(each, self.targets, calibrated=calibrated).mean()) for each in self.controls]
        error = float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else float("nan")
        return float(np.mean(found)), error

    def cost(self, *, calibrated: bool = True) -> tuple[float, float, float]:
        """Accuracy lost by the change, with its 95 % interval over prompts."""
        before, after = (correct(each, self.targets, calibrated=calibrated) for each in (self.uncut, self.logits))
        return paired_bootstrap(before, after)

    def control_cost(self, *, calibrated: bool = True) -> tuple[float, float, float]:
        """The same for random changes, mean over draws. Raises ValueError without controls."""
        if not len(self.controls):
            raise ValueError("controls: none were run")
        before = correct(self.uncut, self.targets, calibrated=calibrated)
        after = torch.stack([correct(each, self.targets, calibrated=calibrated) for each in self.controls]).mean(0)
        return paired_bootstrap(before, after)


@dataclass(frozen=True)
class Ablation:
    """Effects of cuts, and the accuracies they are compared with; see `ICLCircuit.ablate`.

    Attributes
    ----------
    effects
        One a cut and window.
    targets
        (n,).
    uncut, zero_shot
        (n, classes): labels' logits with all edges, and without demonstrations (None where it was not run).
    """

    effects: tuple[Effect, ...]
    targets: Int[Tensor, " n"]
    uncut: Float[Tensor, "n c"]
    zero_shot: Float[Tensor, "n c"] | None

    def accuracy(self, *, calibrated: bool = True) -> float:
        """Of the model as it is."""
        return float(correct(self.uncut, self.targets, calibrated=calibrated).mean())

    def zero_shot_accuracy(self, *, calibrated: bool = True) -> float:
        """Without demonstrations; NaN where it was not run."""
        if self.zero_shot is None:
            return float("nan")
        return float(correct(self.zero_shot, self.targets, calibrated=calibrated).mean())

    def records(self) -> list[dict[str, Any]]:
        """A row a cut and window, for `pandas.DataFrame`."""
        found = []
        for effect in self.effects:
            cost, low, high = effect.cost()
            control, error = effect.control_accuracy()
            found.append(
                {
                    "cut": effect.name,
                    "first_layer": effect.layers[0],
                    "last_layer": effect.layers[1],
                    "accuracy": effect.accuracy(),
                    "accuracy_raw": effect.accuracy(calibrated=False),
                    "cost": cost,
                    "cost_low": low,
                    "cost_high": high,
                    "accuracy_control": control,
                    "control_error": error,
                    "n": len(effect.targets),
                    "size": effect.size,
                }
            )
        return found


def correct(
    logits: Float[Tensor, "n c"], targets: Int[Tensor, " n"], *, calibrated: bool = True
) -> Float[Tensor, " n"]:
    """1 where the right label has the highest logit; calibrated: each label's mean over the prompts taken off first.

    Parameters
    ----------
    logits
        Of the labels' tokens.
    targets
        Numbers of the right labels.
    calibrated
        Small models prefer some labels whatever the prompt. The mean knows no right label, but the prompts must hold
        labels about equally often.

    Returns
    -------
    Tensor (n,) of 0 and 1, double precision.

    Examples
    --------
    >>> import torch
    >>> from subspan.probe import correct
    >>> logits = torch.tensor([[3.0, 0.0], [2.0, 1.0]])  # the first label is preferred
    >>> [correct(logits, torch.tensor([0, 1]), calibrated=own).tolist() for own in (False, True)]
    [[1.0, 0.0], [1.0, 1.0]]
    """
    wide = logits.double()
    return ((wide - wide.mean(0) if calibrated else wide).argmax(1) == targets).double()


@dataclass(eq=False, repr=False)
class ICLCircuit:
    """Measures, locates and cuts the steps by which a causal model answers few-shot prompts.

    A text is encoded into the token before its label (the forerunner); labels copy from it; the query's forerunner
    finds the labels of like texts, and copies them. `read` gives what the reports (`encode_report`, `merge_report`,
    `retrieval_report`) are made from, `ablate` cuts edges and `ablate_heads` heads, `retained_assignment` tells whether
    a head retrieves inside a subspace. The model's own modules run, with hooks that are gone afterwards.

    Parameters
    ----------
    model
        A causal language model of transformers, with attention "sdpa" (its default) or "eager".
    tokenizer
        Its fast tokenizer.
    prompt
        Template and labels.
    batch_size
        Prompts a pass; those of like length go together.
    padding_side
        "left" or "right": the numbers are the same.
    progress
        Is told the share that is done.

    Attributes
    ----------
    label_ids
        Tokens of the labels.

    Raises
    ------
    ValueError
        For encoder-decoder models, labels that share a token, and, where it is used, prompts that are longer than the
        model's context, and attention whose weights cannot be seen.

    References
    ----------
    Cho, Kato, Sakai & Inoue (ICLR 2025), arXiv 2410.04468.

    Examples
    --------
    >>> from subspan.datasets import load_language_model
    >>> from subspan.probe import FewShotPrompt, ICLCircuit, draw_examples, retrieval_report
    >>> prompt = FewShotPrompt(["bad", "good"], "review: {text} label: {label};")
    >>> circuit = ICLCircuit(*load_language_model(), prompt)  # doctest: +SKIP
    >>> reading = circuit.read(draw_examples(texts, labels, queries, answers, k=4))  # doctest: +SKIP
    >>> retrieval_report(reading).heads()  # doctest: +SKIP
    """

    # Run-time type checkers leave the constructor alone: `__post_init__` checks the values.
    __no_type_check__ = True

    model: nn.Module
    tokenizer: Any
    prompt: FewShotPrompt
    batch_size: Count = 16
    padding_side: Literal["left", "right"] = "right"
    progress: Progress = silent

    def __post_init__(self) -> None:
        for name, kind in (("batch_size", Count), ("padding_side", Literal["left", "right"])):
            check_value(name, getattr(self, name), kind)
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model: a causal one is needed, {type(self.model).__name__} is an encoder-decoder")
        self.label_ids = self.prompt.label_ids(self.tokenizer)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self._blocks())

    # ------------------------------------------------------------------ reading

    def read(
        self, examples: Sequence[FewShotExample], *, append: Literal["right", "wrong"] | None = "right"
    ) -> CircuitReading:
        """States and attention of prompts; with the right label (or a wrong one) after the query, which changes nothing
        before it.
        """
        found: list[CircuitReading] = []
        order = self._order(examples)
        for batch in self._batches(examples, order, append=append):
            found.append(read_batch(self.model, self._inputs(batch.tokens), batch, self.label_ids))
        return CircuitReading.joined(found).part(order.argsort())

    @torch.no_grad()
    def label_word_states(self) -> Float[Tensor, "l1 c d"]:
        """States of the bare label words, each a text of its own; layer 0 is what goes into the first block."""
        words = [[(f" {word}", "word")] for word in self.prompt.words.values()]
        tokens = SegmentTokens.from_segments(self.tokenizer, words, padding_side="right")
        blocks = self._blocks()
        with (
            evaluation(self.model),
            capture(self.model, blocks[:1], site="input") as first,
            capture(self.model, blocks) as after,
        ):
            after.run(self._inputs(tokens))
        states = torch.stack([first[blocks[0]], *(after[name] for name in blocks)]).float().cpu()
        return states[:, torch.arange(len(words)), [at[0] for at in tokens.last("word")]]

    # ------------------------------------------------------------------ cutting

    def ablate(
        self,
        examples: Sequence[FewShotExample],
        cuts: Sequence[Cut] = CUTS,
        windows: Sequence[tuple[float, float]] = ((0.0, 1.0),),
        *,
        controls: Whole = 3,
        include_query: bool = False,
        keep_self: bool = True,
        zero_shot: bool = True,
        uncut: Float[Tensor, "n c"] | None = None,
        random_state: Seed = 0,
    ) -> Ablation:
        """Answers without some edges, beside as many random edges in the same layers.

        Parameters
        ----------
        examples
            Prompts.
        cuts
            As in `FewShotBatch.edges`.
        windows
            Shares [from, to) of the depth.
        controls
            Draws of random edges, of tokens to earlier ones but the first. Cuts of as many edges share them.
        include_query, keep_self
            As in `FewShotBatch.edges`.
        zero_shot
            Whether the queries are asked without demonstrations, too.
        uncut
            The logits with all edges where they are known, such as `CircuitReading.logits`.
        random_state
            Seed of the draws.

        Returns
        -------
        Ablation
        """
        check_value("controls", controls, Whole)
        options = {"include_query": include_query, "keep_self": keep_self}
        random = check_random_state(random_state)
        seeds = [int(random.randint(2**31)) for _ in range(controls)]
        layers = {window: self._window(window) for window in windows}
        targets = torch.tensor([self.prompt.number(example.label) for example in examples])
        uncut = self._answers(examples, _unchanged, "uncut") if uncut is None else uncut
        shared: dict[tuple[Any, ...], Float[Tensor, "m n c"]] = {}
        effects = []
        for cut in cuts:
            counts = self._counts(examples, cut, options)
            for first, last in layers.values():
                blocks = list(range(first, last))
                own = self._answers(examples, self._cutting(cut, options, blocks), cut)
                key = (first, last, *counts.tolist())
                if key not in shared:
                    drawn = [
                        self._answers(examples, self._at_random(cut, options, blocks, seed), f"{cut}, random edges")
                        for seed in seeds
                    ]
                    shared[key] = torch.stack(drawn) if drawn else uncut.new_zeros(0, *uncut.shape)
                effects.append(Effect(cut, (first, last), float(counts.mean()), targets, uncut, own, shared[key]))
        bare = [example._replace(demonstrations=()) for example in examples]
        without = self._answers(bare, _unchanged, "zero-shot") if zero_shot else None
        return Ablation(tuple(effects), targets, uncut, without)

    def ablate_heads(
        self,
        examples: Sequence[FewShotExample],
        heads: Sequence[tuple[int, int]],
        *,
        controls: Whole = 3,
        uncut: Float[Tensor, "n c"] | None = None,
        random_state: Seed = 0,
    ) -> Effect:
        """Answers while some heads see nothing but the token they are at, beside as many other heads of their layers.

        Parameters
        ----------
        examples
            Prompts.
        heads
            (layer, head), such as `RetrievalReport.heads` gives.
        controls
            Draws of other heads.
        uncut
            As in `ablate`.
        random_state
            Seed of the draws.

        Returns
        -------
        Effect

        Raises
        ------
        ValueError
            For heads that there are not, and a layer with fewer other heads than are drawn from it.
        """
        check_value("controls", controls, Whole)
        chosen: dict[int, list[int]] = {}
        for layer, head in dict.fromkeys(heads):
            if not (0 <= layer < self.depth and 0 <= head < self._heads):
                raise ValueError(f"heads: layers to {self.depth - 1} and heads to {self._heads - 1}, got {layer, head}")
            chosen.setdefault(layer, []).append(head)
        if not chosen:
            raise ValueError("heads: at least one is needed")
        random, others = check_random_state(random_state), []
        for _ in range(controls):
            others.append({})
            for layer, own in chosen.items():
                rest = [head for head in range(self._heads) if head not in own]
                if len(rest) < len(own):
                    raise ValueError(f"controls: layer {layer} has {len(rest)} other heads for {len(own)}; take 0")
                others[-1][layer] = random.choice(rest, len(own), replace=False).tolist()
        targets = torch.tensor([self.prompt.number(example.label) for example in examples])
        uncut = self._answers(examples, _unchanged, "uncut") if uncut is None else uncut
        own = self._answers(examples, lambda batch: self._blind(batch, chosen), "heads")
        drawn = [
            self._answers(examples, lambda batch, rest=rest: self._blind(batch, rest), "others") for rest in others
        ]
        return Effect(
            "heads",
            (min(chosen), max(chosen) + 1),
            float(sum(map(len, chosen.values()))),
            targets,
            uncut,
            own,
            torch.stack(drawn) if drawn else uncut.new_zeros(0, *uncut.shape),
        )

    def retained_assignment(
        self,
        examples: Sequence[FewShotExample],
        layer: int,
        head: int,
        subspaces: Sequence[Subspace | None],
        *,
        complement: bool = False,
    ) -> Float[Tensor, "s n"]:
        """Share of a head's attention to labels that is on the right one, where labels are seen inside a subspace.

        What goes into attention at the demonstrations' labels is projected; all else stays.

        Parameters
        ----------
        examples
            Prompts with demonstrations.
        layer, head
            The head.
        subspaces
            Such as `retrieval_subspace` gives; None: the states as they are.
        complement
            The subspaces are taken out instead.

        Returns
        -------
        Tensor (subspaces, n)
        """
        order = self._order(examples)
        found = [self._shares(batch, layer, head, subspaces, complement) for batch in self._batches(examples, order)]
        return torch.cat(found, 1)[:, order.argsort()]

    def _shares(
        self, batch: FewShotBatch, layer: int, head: int, subspaces: Sequence[Subspace | None], complement: bool
    ) -> Float[Tensor, "s b"]:
        block = self._blocks()[layer]
        (part,) = attention_modules(self.model, block).values()
        name = next(name for name, module in self.model.named_modules() if module is part)
        at = torch.arange(len(batch)).unsqueeze(1), batch.labels
        found = []
        for subspace in subspaces:
            with self._seen_in(name, subspace, at, complement):
                rows = attention_rows(self.model, self._inputs(batch.tokens), batch.query.unsqueeze(1), block)
            weights = rows[block][:, head, 0].cpu().gather(1, batch.labels)
            found.append(label_assignment(weights, batch.owners == batch.targets.unsqueeze(1)))
        return torch.stack(found)

    # ------------------------------------------------------------------ inside

    def _blocks(self) -> list[str]:
        return layer_names(self.model, f"{find_blocks(self.model)}.*".removeprefix("."))

    @property
    def _heads(self) -> int:
        config: Any = self.model.config
        return int(config.get_text_config().num_attention_heads)

    def _window(self, window: tuple[float, float]) -> tuple[int, int]:
        start, stop = window
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"windows: shares of the depth with 0 <= from <= to <= 1, got {window}")
        return int(start * self.depth), int(stop * self.depth)

    def _order(self, examples: Sequence[FewShotExample]) -> Int[Tensor, " n"]:
        """Prompts by length, so that little is spent on padding."""
        if not examples:
            raise ValueError("examples: at least one is needed")
        return torch.tensor([len(self.prompt.text(example)) for example in examples]).argsort(stable=True)

    def _batches(
        self,
        examples: Sequence[FewShotExample],
        order: Tensor,
        *,
        append: Literal["right", "wrong"] | None = None,
        said: str = "reading",
    ) -> Iterator[FewShotBatch]:
        most = getattr(self.model.config, "max_position_embeddings", None)
        for start in range(0, len(order), self.batch_size):
            self.progress(said, start / len(order))
            part = [examples[i] for i in order[start : start + self.batch_size].tolist()]
            batch = self.prompt.build(part, self.tokenizer, append=append, padding_side=self.padding_side)
            if most is not None and int(batch.lengths.max()) > most:
                raise ValueError(f"examples: a prompt has {int(batch.lengths.max())} tokens, the model takes {most}")
            yield batch

    def _inputs(self, tokens: SegmentTokens) -> dict[str, Any]:
        """What the model is called with: positions counted without padding, no cache."""
        taken = inspect.signature(self.model.forward).parameters
        extra = {"position_ids": tokens.position_ids, "use_cache": False}
        return {**tokens.batch, **{name: value for name, value in extra.items() if name in taken}}

    @torch.no_grad()
    def _answers(self, examples: Sequence[FewShotExample], condition: Condition, said: str) -> Float[Tensor, "n c"]:
        """Labels' logits at the query's forerunner of every prompt, under a condition."""
        order = self._order(examples)
        found = [self._answer(batch, condition) for batch in self._batches(examples, order, said=said)]
        return torch.cat(found)[order.argsort()]

    def _answer(self, batch: FewShotBatch, condition: Condition) -> Float[Tensor, "b c"]:
        with evaluation(self.model), condition(batch), output_rows(self.model, batch.query.unsqueeze(1)):
            logits = self.model(**to_device_of(self.model, self._inputs(batch.tokens))).logits
        return logits[:, 0, self.label_ids].float().cpu()

    def _counts(self, examples: Sequence[FewShotExample], cut: Cut, options: dict[str, bool]) -> Float[Tensor, " n"]:
        """Edges of a cut in each prompt."""
        order = self._order(examples)
        batches = self._batches(examples, order, said="counting edges")
        return torch.cat([batch.edges(cut, **options).sum((1, 2)) for batch in batches])[order.argsort()].double()

    def _cutting(self, cut: Cut, options: dict[str, bool], blocks: list[int]) -> Condition:
        return lambda batch: cut_attention(self.model, batch.edges(cut, **options), blocks)

    def _at_random(self, cut: Cut, options: dict[str, bool], blocks: list[int], seed: int) -> Condition:
        """As many random edges as the cut has in each prompt; the draws go on from batch to batch."""
        random = np.random.RandomState(seed)

        def condition(batch: FewShotBatch) -> contextlib.AbstractContextManager[Any]:
            counts = batch.edges(cut, **options).sum((1, 2))
            return cut_attention(self.model, batch.random_edges(counts, random_state=random), blocks)

        return condition

    @contextlib.contextmanager
    def _blind(self, batch: FewShotBatch, heads: dict[int, list[int]]) -> Iterator[None]:
        shape = batch.tokens.segment.shape
        every = torch.ones(*shape, shape[1], dtype=torch.bool)
        with contextlib.ExitStack() as stack:
            for layer, own in heads.items():
                stack.enter_context(cut_attention(self.model, every, [layer], heads=own))
            yield

    def _seen_in(
        self, name: str, subspace: Subspace | None, at: tuple[Tensor, Tensor], complement: bool
    ) -> contextlib.AbstractContextManager[Any]:
        if subspace is None:
            return contextlib.nullcontext()

        def changed(states: Tensor) -> Tensor:
            found = states.clone()
            seen = subspace.residual if complement else subspace.project
            found[at] = seen(states[at].flatten(0, 1)).to(states.dtype).view(*at[1].shape, -1)
            return found

        return intervene(self.model, name, changed, site="input")


def _unchanged(_: FewShotBatch) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()
