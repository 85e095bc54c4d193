"""Word problems with right and wrong solutions that models wrote, as OpenAI published them beside GSM8K."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from .shared import data_folder
from .texts import iterate_records

_NAME = "example_model_solutions.jsonl"
_SOURCE = f"https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{_NAME}"
# In a folder of the file alone, and in a clone of the repository.
_PLACES = ("", "grade_school_math/data/")
_CALCULATIONS = re.compile(r"<<[^>]*>>")


@dataclass(frozen=True)
class ModelSolutions:
    """A problem, how it is solved, and what models wrote.

    Attributes
    ----------
    question, answer
        The problem and its solution.
    solutions
        By name of the model.
    right
        By name of the model, whether its solution is right.
    """

    question: str
    answer: str
    solutions: dict[str, str]
    right: dict[str, bool]


def solutions_file(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Where `model_solutions` finds its file, or None."""
    root = data_folder(folder)
    files = (
        [] if root is None else [root / "gsm8k" / f"{place}{_NAME}{end}" for place in _PLACES for end in ("", ".gz")]
    )
    return next((file for file in files if file.is_file()), None)


def model_solutions(
    folder: str | os.PathLike[str] | None = None, *, calculations: bool = False
) -> list[ModelSolutions]:
    """GSM8K's test problems with the solutions of four models each, two of which were told by a verifier (MIT licence).

    The file is `example_model_solutions.jsonl` of openai/grade-school-math. It is looked for, also as .gz, in the
    folder `gsm8k` of the data folder, which may be a clone of that repository.

    Parameters
    ----------
    folder
        The data folder; None: see `data_folder`.
    calculations
        Whether the notes for a calculator, such as ``<<16-3=13>>``, stay in the texts.

    Returns
    -------
    list of ModelSolutions, 1319 of the whole file.

    Raises
    ------
    ValueError
        Where there is no such file, saying where it comes from, and for records that are none.

    References
    ----------
    Cobbe et al. (2021), Training verifiers to solve math word problems, arXiv 2110.14168.

    Examples
    --------
    >>> import json
    >>> from pathlib import Path
    >>> from subspan.datasets import model_solutions
    >>> Path("data/gsm8k").mkdir(parents=True)
    >>> row = {"question": "1 + 1?", "ground_truth": "2", "6b": {"solution": "1 + 1 = <<1+1=2>>2", "is_correct": True}}
    >>> _ = Path("data/gsm8k/example_model_solutions.jsonl").write_text(json.dumps(row))
    >>> model_solutions("data")[0].solutions
    {'6b': '1 + 1 = 2'}
    """
    root = data_folder(folder)
    files = (
        [] if root is None else [root / "gsm8k" / f"{place}{_NAME}{end}" for place in _PLACES for end in ("", ".gz")]
    )
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        where = "no data folder is set (SUBSPAN_DATA)" if root is None else f"{str(root)!r} has no gsm8k/{_NAME}"
        raise ValueError(f"folder: {where}; the file comes from {_SOURCE}")

    def text(value: str) -> str:
        return value if calculations else _CALCULATIONS.sub("", value)

    found = []
    for number, row in enumerate(iterate_records(path)):
        written = {name: each for name, each in row.items() if isinstance(each, dict)}
        try:
            solutions = {name: text(each["solution"]) for name, each in written.items()}
            right = {name: bool(each["is_correct"]) for name, each in written.items()}
            found.append(ModelSolutions(row["question"], text(row["ground_truth"]), solutions, right))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"folder: record {number} of {str(path)!r} needs question, ground_truth, and solution and is_correct "
                f"of each model; {error} is missing or no text"
            ) from None
    return found
