"""What an unlearned model still says, and whether a little further training brings answers back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation
from subspan.measures import AnswerScores, rouge_l_recall
from subspan.models import continuation_log_likelihood, greedy_continuations, linear_names
from subspan.models.layers import Layers, layer_names

from .low_rank_starts import answer_logits
from .unlearning_data import Example, checked_examples, padded_batch


def question_prompt(question: str) -> str:
    """`Question: …` and `Answer:` below it.

    Parameters
    ----------
    question
        A text.

    Returns
    -------
    str

    Examples
    --------
    >>> from subspan.edit import question_prompt
    >>> question_prompt("Who?")
    'Question: Who?\\nAnswer:'
    """
    return f"Question: {question}\nAnswer:"


def answer_log_likelihood(
    model: nn.Module, examples: Sequence[Example], *, batch_size: int = 8, pad_token_id: int = 0
) -> Float[Tensor, " n"]:
    """Mean log-likelihood (nats a token) of the answers in examples that are in tokens.

    Parameters
    ----------
    model
        A causal model of transformers, or one that takes input_ids and attention_mask and gives logits (b, t, v).
    examples
        As of `answer_examples`.
    batch_size
        Texts a pass.
    pad_token_id
        What fills short texts.

    Returns
    -------
    Tensor (n,), on the CPU; exp of it is TOFU's probability of an answer.

    Examples
    --------
    ``answer_log_likelihood(model, examples).exp().mean()``.

    >>> import torch
    >>> from subspan.edit import answer_log_likelihood
    >>> model = torch.nn.Sequential(torch.nn.Embedding(4, 4))
    >>> model[0].weight.data.zero_()
    tensor([[0., 0., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    >>> model.forward = lambda input_ids, attention_mask: model[0](input_ids)
    >>> answer_log_likelihood(model, [{"input_ids": [1, 2], "labels": [-100, 2]}]).exp()
    tensor([0.2500])
    """
    found = []
    checked = checked_examples(examples, "examples")
    with torch.no_grad(), evaluation(model):
        for at in range(0, len(checked), batch_size):
            part = checked[at : at + batch_size]
            logits, labels, owner = answer_logits(model, padded_batch(part, pad_token_id=pad_token_id))
            likelihood = -F.cross_entropy(logits, labels, reduction="none")
            total = torch.zeros(len(part), device=logits.device).index_add(0, owner, likelihood)
            found.append((total / owner.bincount(minlength=len(part))).cpu())
    return torch.cat(found)


def answer_scores(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    *,
    prompt: Callable[[str], str] = question_prompt,
    before: str = " ",
    after: str = "",
    choices: bool = False,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    add_special_tokens: bool = True,
) -> AnswerScores:
    """TOFU's numbers of one set of questions.

    Parameters
    ----------
    model, tokenizer
        A causal model of transformers, and its fast tokenizer.
    records
        With question, answer, perturbed_answer (a list, as many in each record) and, where there is one,
        paraphrased_answer.
    prompt
        Of a question, such as from a chat template.
    before, after
        Text around answers, such as a space and the end token.
    choices
        As in `AnswerScores`.
    max_new_tokens
        Of what the model says, which is compared with the answer and not kept; 0: it is not asked, ROUGE-L is NaN.
    batch_size
        Texts a pass.
    add_special_tokens
        False for prompts that come from a chat template.

    Returns
    -------
    AnswerScores

    Raises
    ------
    ValueError
        For no records, and records with unequal numbers of perturbed answers.

    References
    ----------
    TOFU (arXiv 2401.06121).

    Examples
    --------
    ``answer_scores(model, tokenizer, load("tofu")["forget10_perturbed"])``.

    >>> from subspan.edit import answer_scores
    >>> answer_scores(None, None, [])
    Traceback (most recent call last):
    ValueError: records: at least one is needed, each with as many perturbed answers
    """
    if len({len(record["perturbed_answer"]) for record in records}) != 1:
        raise ValueError("records: at least one is needed, each with as many perturbed answers")
    prompts = [prompt(record["question"]) for record in records]
    options: Any = {"batch_size": batch_size, "add_special_tokens": add_special_tokens}

    def losses(texts: Sequence[str], times: int = 1) -> np.ndarray:
        repeated = [each for each in prompts for _ in range(times)]
        whole = [before + text + after for text in texts]
        return -continuation_log_likelihood(model, tokenizer, repeated, whole, **options).double().numpy()

    answers = [record["answer"] for record in records]
    wrong = [text for record in records for text in record["perturbed_answer"]]
    rouge = np.full(len(records), np.nan)
    if max_new_tokens:
        said = greedy_continuations(model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options)
        rouge = np.array([rouge_l_recall(answer, text) for answer, text in zip(answers, said)])
    right = losses(answers)
    paraphrased = [record.get("paraphrased_answer", record["answer"]) for record in records]
    other = right if paraphrased == answers else losses(paraphrased)
    times = len(wrong) // len(records)
    return AnswerScores(right, other, losses(wrong, times).reshape(-1, times), rouge, choices)


@contextlib.contextmanager
def relearned(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    steps: int = 20,
    learning_rate: float = 5e-5,
    batch_size: int = 4,
    layers: Layers | None = None,
    pad_token_id: int = 0,
) -> Iterator[nn.Module]:
    """Within the block the model after a few steps of ordinary tuning; after it the model as it was, to the bit.

    On texts that have nothing to do with what was forgotten, answers that come back were hidden and not forgotten.

    Parameters
    ----------
    model
        Any causal model, also with low-rank changes in it.
    examples
        To tune on, in order and over again.
    steps, learning_rate, batch_size
        Of AdamW without decay.
    layers
        Whose weights are tuned, as in `layer_names`; None: all linear layers inside the model's blocks.
    pad_token_id
        What fills short texts.

    Yields
    ------
    The model.

    Examples
    --------
    ``with relearned(model, unrelated): print(answer_log_likelihood(model, forget).exp().mean())``.

    >>> import torch
    >>> from subspan.edit import relearned
    >>> model = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 4))
    >>> model.forward = lambda input_ids, attention_mask: model[1](model[0](input_ids))
    >>> before = model[1].weight.clone()
    >>> with relearned(model, [{"input_ids": [1, 2], "labels": [-100, 2]}], steps=2, layers="1"):
    ...     print(torch.equal(model[1].weight, before))
    False
    >>> torch.equal(model[1].weight, before)
    True
    """
    checked = checked_examples(examples, "examples")
    names = linear_names(model) if layers is None else layer_names(model, layers)
    owners: list[Any] = [model.get_submodule(name) for name in names]
    weights: list[nn.Parameter] = list({id(owner.weight): owner.weight for owner in owners}.values())
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = [weight.data for weight in weights]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.data = weight.data.clone()
            weight.requires_grad_(True)
        optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
        endless = cycle(checked)
        with torch.enable_grad(), evaluation(model):
            for _ in range(steps):
                batch = padded_batch(list(islice(endless, batch_size)), pad_token_id=pad_token_id)
                logits, labels, _ = answer_logits(model, batch)
                gradients = torch.autograd.grad(F.cross_entropy(logits, labels), weights)
                for weight, gradient in zip(weights, gradients):
                    weight.grad = gradient
                optimizer.step()
        for weight in weights:
            weight.grad = None
        yield model
    finally:
        for weight, before in zip(weights, kept):
            weight.data, weight.grad = before, None
        for parameter, before in trained.items():
            parameter.requires_grad_(before)
