"""Texts with what a probe is to read of them: columns of a file, or the standard library's docstrings by module."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from subspan.base import require
from subspan.base.columns import listed
from subspan.base.kinds import suffix_of
from subspan.base.reading import quoted, reading, regular_file
from subspan.datasets import iterate_records, stdlib_docstrings
from subspan.models.text_states import Span

_FEWEST = 10
_FEWEST_TEXTS = 40
_MODULES = 6
_ARROW = (".parquet", ".arrow", ".feather")
# Whole columns of different numbers are no classes.
_MOST_CLASSES = 50


@dataclass(frozen=True)
class PropertyTexts:
    """Texts, what is read of each and where, and what was left out.

    Parameters
    ----------
    texts, values
        One each; values are labels or numbers.
    name
        Of the property.
    numeric
        Whether values are numbers.
    spans
        Characters whose tokens are read; None: all.
    others
        Further labels by name.
    left_out
        How many records were left out, by reason.
    """

    texts: tuple[str, ...]
    values: tuple[Any, ...]
    name: str
    numeric: bool = False
    spans: tuple[Span, ...] | None = None
    others: Mapping[str, tuple[str, ...]] | None = None
    left_out: Mapping[str, int] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, chosen: Iterable[int], reason: str) -> PropertyTexts:
        """Some of them alone; the others count as left out for this reason."""
        places = list(chosen)
        left_out = dict(self.left_out or {})
        if len(places) < len(self):
            left_out[reason] = len(self) - len(places)
        return replace(
            self,
            texts=tuple(self.texts[i] for i in places),
            values=tuple(self.values[i] for i in places),
            spans=None if self.spans is None else tuple(self.spans[i] for i in places),
            others={name: tuple(row[i] for i in places) for name, row in (self.others or {}).items()},
            left_out=left_out,
        )

    def without_copies(self) -> PropertyTexts:
        """Each text once, at its first place: a copy of a text that was learnt from tells nothing when held out."""
        first: dict[Any, int] = {}
        for place, text in enumerate(self.texts):
            first.setdefault((text, None if self.spans is None else self.spans[place]), place)
        return self.rows(first.values(), "copies of earlier texts")

    def drawn(self, most: int, seed: int) -> PropertyTexts:
        """At most so many, drawn with the values in proportion, without classes of which there would be under ten.

        Raises ValueError where fewer than two classes, or than forty texts, are left.
        """
        found = self
        if not self.numeric:
            counts = Counter(self.values)
            least = _FEWEST * max(1.0, len(self) / most)
            common = [place for place, value in enumerate(self.values) if counts[value] >= least]
            if len({self.values[place] for place in common}) < 2:
                shown = ", ".join(f"{quoted(name, 40)} ({count})" for name, count in counts.most_common(4))
                raise ValueError(
                    f"--label: two classes of {_FEWEST} texts each among {min(most, len(self))} are the fewest, "
                    f"{self.name!r} has {shown}"
                )
            found = self.rows(common, f"in classes of which fewer than {_FEWEST} would be read")
        if len(found) < _FEWEST_TEXTS:
            raise ValueError(f"--texts: {_FEWEST_TEXTS} texts are the fewest, {len(found)} are left")
        if len(found) <= most:
            return found
        ties = np.random.default_rng(seed).permutation(len(found))
        order = sorted(ties.tolist(), key=lambda place: found.values[place])
        places = {order[int((step + 0.5) * len(order) / most)] for step in range(most)}
        return found.rows(sorted(places), "beyond the number that is read (--max-texts)")


def docstring_texts() -> PropertyTexts:
    """Docstrings of the standard library and their module, of the modules with most of them."""
    found = stdlib_docstrings()
    common = {name for name, _ in Counter(entry.label for entry in found).most_common(_MODULES)}
    own = [entry for entry in found if entry.label in common]
    return PropertyTexts(tuple(entry.text for entry in own), tuple(entry.label for entry in own), "module")


def column_texts(
    path: Path,
    *,
    label: str | None = None,
    value: str | None = None,
    order: Sequence[str] = (),
    text_column: str | None = None,
    span: str | None = None,
    others: Sequence[str] = (),
    skip_nan: bool = False,
) -> PropertyTexts:
    """Columns of a file (.csv, .tsv, .jsonl, .parquet, .arrow, .feather).

    label or value: the column of classes, or of numbers (with `order`, of words that stand for 0, 1, …). span: a column
    with a part of the text, whose tokens are read. Raises ValueError, in one line that names the record, for what is
    missing and no number; records where something is missing are left out where `skip_nan`.
    """
    if (label is None) == (value is None):
        raise ValueError("--label, --value: one of them is needed beside --texts: what is to be read of each text")
    records = _records(path)
    if not records:
        raise ValueError(f"--texts: {str(path)!r} holds no records")
    name = label if label is not None else str(value)
    named = [name, *others, *([span] if span else [])]
    text = text_column or _text_column(records[0], named, path)
    options = {"--label" if label is not None else "--value": name, "--text-column": text, "--span": span}
    columns = {option: column for option, column in options.items() if column is not None}
    for option, column in [*columns.items(), *(("--other", each) for each in others)]:
        if not any(column in record for record in records):
            raise ValueError(f"{option}: {str(path)!r} has no {column!r}; it has {listed(records[0])}")
        lacking = [place for place, record in enumerate(records) if _is_missing(record.get(column))]
        if lacking and not skip_nan:
            raise ValueError(
                f"{option}: {len(lacking)} of {len(records)} records have no {column!r} (the first is record "
                f"{lacking[0] + 1}); leave them out with --skip-nan"
            )
    wanted = {text, *named}
    kept = [place for place, row in enumerate(records) if not any(_is_missing(row.get(column)) for column in wanted)]
    if not kept:
        raise ValueError(f"--texts: no record of {str(path)!r} has all of {listed(sorted(wanted))}")
    rows = [records[place] for place in kept]
    left_out = {"with something missing": len(records) - len(rows)} if len(rows) < len(records) else {}
    values: tuple[Any, ...] = tuple(str(row[name]) for row in rows)
    if value is not None:
        values = tuple(_number(row[name], place + 1, name, order) for place, row in zip(kept, rows))
        if len(set(values)) == 1:
            raise ValueError(f"--value: {name!r} is {values[0]:g} in every text; there is nothing to read")
    elif len(set(values)) == 1:
        raise ValueError(f"--label: {name!r} is {quoted(values[0], 40)} in every text; there is nothing to tell apart")
    elif len(set(values)) > _MOST_CLASSES and all(map(_is_number, values)):
        raise ValueError(
            f"--label: {name!r} has {len(set(values))} different numbers; read them as numbers with --value {name}"
        )
    texts = tuple(str(row[text]) for row in rows)
    spans = span and tuple(_place(texts[i], str(row[span]), kept[i] + 1) for i, row in enumerate(rows))
    return PropertyTexts(
        texts,
        values,
        name,
        value is not None,
        spans or None,
        {each: tuple(str(row[each]) for row in rows) for each in others},
        left_out,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    if suffix_of(path) not in _ARROW:
        return list(iterate_records(path))
    source = regular_file(path)
    parquet = suffix_of(path) == ".parquet"
    arrow = require("pyarrow.parquet" if parquet else "pyarrow.feather", extra="tables")
    with reading(source):
        table = arrow.read_table(source)
        # Vectors and the like are no part of what is read here.
        plain = [field.name for field in table.schema if not hasattr(field.type, "value_type")]
        return table.select(plain).to_pylist()


def _text_column(record: Mapping[str, Any], named: Sequence[str], path: Path) -> str:
    texts = [column for column, entry in record.items() if isinstance(entry, str) and column not in named]
    if "text" in texts:
        return "text"
    if len(texts) != 1:
        raise ValueError(f"--text-column: {str(path)!r} has {listed(record)}; say which one holds the texts")
    return texts[0]


def _is_missing(entry: Any) -> bool:
    return entry is None or (isinstance(entry, float) and math.isnan(entry)) or not str(entry).strip()


def _is_number(entry: Any) -> bool:
    try:
        return math.isfinite(float(entry))
    except (TypeError, ValueError):
        return False


def _number(entry: Any, record: int, name: str, order: Sequence[str]) -> float:
    if order:
        if str(entry) not in order:
            raise ValueError(
                f"--order: record {record} has {quoted(entry, 40)} in {name!r}, which is none of the order"
            )
        return float(order.index(str(entry)))
    if not _is_number(entry):
        raise ValueError(
            f"--value: record {record} has {quoted(entry, 40)} in {name!r}, a finite number is needed; of words "
            "say the order (--order low,medium,high)"
        )
    return float(entry)


def _place(text: str, part: str, record: int) -> Span:
    """Where a part stands in its text for the first time, as a whole word where it does."""
    found = re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) or re.search(re.escape(part), text)
    if found is None:
        raise ValueError(f"--span: {quoted(part, 40)} of record {record} does not stand in its text")
    return found.span()
