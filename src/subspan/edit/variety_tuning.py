"""Fine-tuning of a language model on several varieties, kept apart: records in, the tuned model and its history out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subspan.base import require
from subspan.models import SegmentTokens

from .decoupling import Refresh, SubspaceDecoupling
from .unlearning_data import answer_examples, padded_batch


def decouple_finetune(
    model: Any,
    tokenizer: Any,
    records: Sequence[Mapping[str, Any]],
    dominant: Any,
    *,
    variety_key: str = "variety",
    prompt_key: str = "prompt",
    text_key: str = "text",
    probed: int = 200,
    batch_size: int = 8,
    add_special_tokens: bool = True,
    arguments: Mapping[str, Any] | None = None,
    random_state: int = 0,
    **options: Any,
) -> tuple[Any, list[Refresh]]:
    """Supervised fine-tuning by transformers' Trainer with the penalty of `SubspaceDecoupling` on the last states.

    Parameters
    ----------
    model
        A causal model of transformers; it is trained in place.
    tokenizer
        A fast one.
    records
        Dicts with a text to say, the prompt before it (or none), and the variety of the text.
    dominant
        One of the varieties.
    variety_key, prompt_key, text_key
        Where in a record they are.
    probed
        Of each variety so many texts are drawn for the probes, without their prompts.
    batch_size
        Texts a batch, in training unless `arguments` say otherwise, and for the probes.
    add_special_tokens
        False for prompts that come from a chat template.
    arguments
        Of `transformers.TrainingArguments`, such as learning_rate, num_train_epochs, max_steps, output_dir. Default:
        theirs, without reports, and with no file kept.
    random_state
        Seed of the draw, of the probes and of the trainer.
    **options
        Of `SubspaceDecoupling`: weight, every, kind, probe, settings, … and layer, by default the model's body, whose
        output is the last normalised state.

    Returns
    -------
    (model, history)
        The same model, in evaluation mode, and what each estimate found.

    Raises
    ------
    ValueError
        For no records, records without a text or a variety, and varieties without the dominant one or with it alone.

    References
    ----------
    When Alignment Hurts (2025), arXiv 2508.12803.

    Examples
    --------
    >>> from subspan.edit import decouple_finetune
    >>> model, history = decouple_finetune(
    ...     model, tokenizer, records, "msa", weight=0.01, every=500, arguments={"max_steps": 2000}
    ... )  # doctest: +SKIP
    >>> [each.accuracy for each in history]  # doctest: +SKIP
    >>> decouple_finetune(None, None, [{"text": "a"}], "msa")
    Traceback (most recent call last):
    ValueError: records: number 0 has no 'variety'
    """
    for number, record in enumerate(records):
        if missing := [key for key in (variety_key, text_key) if record.get(key) in (None, "")]:
            raise ValueError(f"records: number {number} has no {' and no '.join(map(repr, missing))}")
    pairs = [(record.get(prompt_key) or "", record[text_key]) for record in records]
    examples = answer_examples(tokenizer, pairs, add_special_tokens=add_special_tokens)
    varieties = np.asarray([record[variety_key] for record in records])
    draws = np.random.default_rng(random_state)
    drawn = [
        place
        for variety in dict.fromkeys(varieties.tolist())
        for place in draws.permutation(np.flatnonzero(varieties == variety))[:probed].tolist()
    ]
    batches = [
        SegmentTokens.from_segments(
            tokenizer,
            [[(records[place][text_key], "text")] for place in drawn[start : start + batch_size]],
            add_special_tokens=add_special_tokens,
            padding_side="right",
        ).batch
        for start in range(0, len(drawn), batch_size)
    ]
    transformers = require("transformers", extra="llm")
    settings = {"layer": model.base_model_prefix, "random_state": random_state, **options}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with (
        tempfile.TemporaryDirectory() as folder,
        SubspaceDecoupling(
            model, batches=batches, labels=varieties[drawn], dominant=dominant, **settings
        ) as decoupling,
    ):
        given: dict[str, Any] = {
            "output_dir": folder, "save_strategy": "no", "report_to": [], "seed": random_state,
            "per_device_train_batch_size": batch_size, **(arguments or {}),
        }  # fmt: skip
        decoupling.trainer(transformers.Trainer)(
            model=model,
            args=transformers.TrainingArguments(**given),
            train_dataset=examples,
            data_collator=lambda rows: padded_batch(rows, pad_token_id=pad),
        ).train()
    return model.eval(), decoupling.history_
