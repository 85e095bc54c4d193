"""The command `subspan`: one verb a task, the report, and the reproductions.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a reproduction's bar does not hold, 2 wrong
usage or input (one line on stderr, nothing written), 130 stopped with Ctrl-C. Verbs import what they need when called,
so that `--help` does not wait for torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from subspan.base.files import atomic_write, write_array, write_rows, write_text
from subspan.base.kinds import ARCHIVES, GRAPHS, INDEXES, TABLES, TEXTS, check_input
from subspan.base.outputs import Output, Outputs
from subspan.base.reading import UNPRINTABLE, printable, readable_name

if TYPE_CHECKING:
    from subspan.commands import Embeddings

    Progress = Callable[[str, float], None]

app = typer.Typer(
    name="subspan",
    help="Find, measure, use and map subspaces of learned representations.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="Pretrained models that are installed as packages.", no_args_is_help=True)
cache = typer.Typer(help="The folder of cached features, converted models and trained networks.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(cache, name="cache")

_TABLE = typer.Argument(
    metavar="TABLE|FOLDER",
    help="Embeddings (.npy, .npz, .safetensors, .parquet, .csv), texts (.txt, .jsonl, or .csv with --text-column), or "
    "a folder or zip of images. Left out: the docstrings of this Python's standard library.",
    show_default=False,
)

Table = Annotated[str | None, _TABLE]
Labels = Annotated[
    str | None, typer.Option("--labels", metavar="COLUMN|FILE", help="A label for each row: a column, or a file.")
]
Column = Annotated[
    str | None, typer.Option("--column", help="The column or array with the embeddings, where there are several.")
]
TextColumn = Annotated[str | None, typer.Option("--text-column", help="The column of texts to embed.")]
IdColumn = Annotated[str | None, typer.Option("--id-column", help="The column that names the rows.")]
SkipNan = Annotated[bool, typer.Option("--skip-nan", help="Leave rows with NaN or infinity out, and say how many.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all sampling.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
_RANKS = (
    "Directions to keep: a number, a share of the variance (0.95), or marchenko-pastur, gavish-donoho, effective or "
    "elbow."
)
Rank = Annotated[str, typer.Option("--rank", "-k", help=_RANKS)]


_ROWS = (*TABLES, *TEXTS, *ARCHIVES)
_TABLES = (".csv", ".json", ".npy")
_PAGES = (".html", ".htm")
_STOPPED = 130
"""The exit code after Ctrl-C; newer versions of typer return it, older ones raise Abort."""


def main() -> None:
    """Run the command line and exit with its code."""
    if hasattr(signal, "SIGPIPE"):
        # Where the reader of the output leaves early (`subspan list | head`), end like any other command.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for name in ("SIGTERM", "SIGHUP"):
        # Asked to end, tidy up first; what is ignored (by nohup) stays so.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)
    sys.exit(run())


def _end(number: int, _: Any) -> None:
    sys.exit(128 + number)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows fewer characters, or a name that is not UTF-8, must not end the work.
            stream.reconfigure(errors="backslashreplace")
    said: set[str] = set()

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        """Each warning as one line, and once."""
        line = f"warning: {' '.join(str(message).split())}"
        if line not in said:
            said.add(line)
            _say(line)

    with warnings.catch_warnings():
        warnings.showwarning = warn
        try:
            code = int(app(arguments, prog_name="subspan", standalone_mode=False) or 0)
        except (KeyboardInterrupt, typer.Abort):
            code = _STOPPED
        except Exception as error:
            if os.environ.get("SUBSPAN_TRACEBACK") or not _is_input_error(error):
                raise
            if type(error).__name__ != "NoArgsIsHelpError":  # the help is on the screen already
                _say(f"error: {_one_line(error)}")
            code = 2
    if code == _STOPPED:
        _say("stopped")
    return code


def _is_input_error(error: Exception) -> bool:
    """Whether the user can mend it: usage, values, files, missing extras. The rest is a defect, with its traceback."""
    return hasattr(error, "format_message") or isinstance(error, ValueError | TypeError | OSError | ImportError)


def _one_line(error: Exception) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)  # pyright: ignore
    return _short_line(message) or type(error).__name__


def _short_line(message: str) -> str:
    """One line, of which the middle is left out where it is longer than any that is meant."""
    line = printable(" ".join(message.split()))
    return line if len(line) <= 2000 else f"{line[:1500]}...{line[-480:]}"


def _say(message: str) -> None:
    print(f"subspan: {message}", file=sys.stderr, flush=True)


def _print(message: str) -> None:
    """A line on stdout, in which nothing of a file steers the terminal."""
    print(printable(message))


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"subspan {version('subspan')}")
        raise typer.Exit
    return wanted


@app.callback()
def options(
    data: Annotated[
        Path | None,
        typer.Option("--data", envvar="SUBSPAN_DATA", help="Folder of shared data sets.", show_default=False),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find, measure, use and map subspaces of learned representations."""
    if data is not None:
        if not data.is_dir():
            raise ValueError(f"--data: {str(data)!r} is not a folder")
        os.environ["SUBSPAN_DATA"] = str(data.resolve())


@contextlib.contextmanager
def _progress(title: str) -> Iterator[Progress]:
    """A progress bar on stderr, or silence where that is no terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda message, fraction: bar.update(task, description=message, completed=fraction)


def _print_json(value: Any) -> None:
    print(_json_text(value))


def _json_text(value: Any) -> str:
    """JSON whose control characters are escapes, as is all that is not ASCII where stdout cannot show it."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1, allow_nan=False)
    return UNPRINTABLE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


_RANK_RULES = ("marchenko-pastur", "gavish-donoho", "effective", "elbow")


def _rank(text: str) -> int | float | str:
    """`--rank` as the library takes it."""
    try:
        rank: int | float | str = int(text) if text.isdecimal() else float(text)
    except ValueError:
        rank = text
    if isinstance(rank, str) and rank not in _RANK_RULES:
        raise ValueError(f"--rank: {text!r} is neither a number nor one of {', '.join(_RANK_RULES)}")
    if isinstance(rank, int) and rank < 1:
        raise ValueError(f"--rank: must be at least 1, got {text}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"--rank: a share of the variance lies in (0, 1], got {text}")
    return rank


def _check_inputs(*names: str | None, kinds: tuple[str, ...] = _ROWS) -> None:
    """Refuse inputs that cannot be read by their names, before anything heavy is loaded."""
    for name in names:
        if name is not None and "://" not in name:
            check_input(name, kinds)


def _check_rank(rank: int | float | str, data: Embeddings) -> None:
    most = min(len(data) - 1, data.dim)
    if isinstance(rank, int) and rank > most:
        shape = f"{len(data)} rows of {data.dim} columns"
        raise ValueError(f"--rank: {rank} directions asked for, {shape} span at most {most}")


def _naming(data: Embeddings, rows: Any) -> dict[str, list[Any]]:
    """The columns that say which rows these are."""
    columns: dict[str, list[Any]] = {"row": [int(row) for row in rows]}
    if data.ids is not None:
        columns["id"] = [str(data.ids[row]) for row in rows]
    if data.labels is not None:
        columns["label"] = [str(data.labels[row]) for row in rows]
    return columns


# ---------------------------------------------------------------------- report


@app.command()
def report(
    table: Table = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="A second embedding of the same rows: can it replace the first?"),
    ] = None,
    labels: Labels = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    json_output: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the facts as JSON too (- for stdout).")
    ] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
) -> None:
    """Write one page on what is in a set of embeddings and what can be done with it.

    Examples:

    - `subspan report` (the docstrings of this Python's standard library)

    - `subspan report vectors.npy --labels labels.txt -o report.html`

    - `subspan report old.parquet --against new.parquet --json facts.json`

    - `subspan report photos/`

    - `subspan report reviews.csv --text-column review --labels stars`
    """
    facts_file = None if json_output is None or str(json_output) == "-" else json_output
    outputs = Outputs(Output("-o", output, _PAGES), Output("--json", facts_file), inputs=(table, against, labels))
    _check_inputs(table, against)
    from subspan.commands import describe, read_embeddings
    from subspan.report import render

    with outputs, _progress("reading") as progress:
        data = read_embeddings(
            table,
            labels=labels,
            column=column,
            text_column=text_column,
            id_column=id_column,
            skip_nan=skip_nan,
            progress=progress,
        )
        other = None
        if against is not None:
            other = read_embeddings(
                against, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
                progress=progress,
            )  # fmt: skip
        facts = describe(data, other, seed=seed, progress=progress)
        progress("writing the page", 1.0)
        write_text(outputs[output], render(facts, data))
        text = json.dumps(facts, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        if facts_file is not None:
            write_text(outputs[facts_file], text)
    if json_output is not None and facts_file is None:
        _print_json(facts)
    else:
        _print(f"{output}: {facts['contents']['rows']} rows × {facts['contents']['columns']} columns")


# ---------------------------------------------------------------------- detect


@app.command()
def detect(
    table: Table = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="GOOD", help="Normal rows or images to fit to, instead of those that are scored."
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option("--rank", "-k", help=f"{_RANKS} By default 0.99.", show_default=False),
    ] = None,
    distance: Annotated[
        Literal["combined", "residual", "mahalanobis", "euclidean", "cosine"] | None,
        typer.Option(
            help="Rows: combined (by default) = in and out of the subspace and from the mean, of standardised columns;"
            " or of columns as they are: residual = outside the subspace, for rows fitted to good ones; mahalanobis,"
            " euclidean = inside it; cosine.",
            show_default=False,
        ),
    ] = None,
    labels: Labels = None,
    by_label: Annotated[
        bool, typer.Option("--by-label", help="Score each row against the other rows of its own label.")
    ] = False,
    label_errors: Annotated[
        bool,
        typer.Option("--label-errors", help="Ask the ten nearest rows of each for its label; score their dissent."),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=0, help="How many of the highest scores to print.")] = 10,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write every score: .csv, .json or .npy.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=1, help="Images: fit to so many good ones only, drawn by --seed.")
    ] = None,
    rotations: Annotated[
        int | None,
        typer.Option(
            "--rotations",
            min=0,
            help="Images: rotated views of each good one to fit to as well (8 for up to 16 good ones, else none).",
            show_default=False,
        ),
    ] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Score rows or images by their distance to the subspace of normal ones: the higher, the stranger.

    Rows: in standard deviations beyond what is usual, whatever the units of the columns; outliers are those more than
    three interquartile ranges above the upper quartile.

    An image folder (or zip) with train/good and test/… (the MVTec AD layout) is scored by patches: fitted to
    train/good, judged on test, with AUROC where there are defects.

    Examples:

    - `subspan detect vectors.npy -o scores.csv`

    - `subspan detect new.parquet --fit good.parquet --json`

    - `subspan detect vectors.parquet --labels class --by-label`

    - `subspan detect vectors.parquet --labels class --label-errors -o labels_to_check.csv`

    - `subspan detect bottle/ --shots 4 --rotations 8`
    """
    outputs = Outputs(Output("-o", output, _TABLES), inputs=(table, fit, labels))
    _check_inputs(table, fit)
    if rank is not None:
        _rank(rank)
    from subspan.commands.inputs import is_anomaly_layout

    images = table is not None and is_anomaly_layout(table)
    ranked = _rank(rank or "0.99")
    with outputs:
        if table is not None and images:
            if fit is not None or labels is not None or by_label or label_errors or distance is not None:
                raise ValueError(
                    "--fit, --labels, --by-label, --label-errors and --distance do not apply to a folder with "
                    "train/good and test"
                )
            columns, facts = _detect_in_images(table, ranked, shots, rotations, seed)
        else:
            if shots is not None or rotations is not None:
                raise ValueError("--shots and --rotations: for a folder with train/good and test only")
            reading = {
                "labels": labels, "column": column, "text_column": text_column, "id_column": id_column,
                "skip_nan": skip_nan,
            }  # fmt: skip
            if label_errors:
                if fit is not None or rank is not None or by_label or distance is not None:
                    raise ValueError(
                        "--label-errors: asks the neighbours, so --fit, --rank, --distance and --by-label do not apply"
                    )
                columns, facts = _detect_label_errors(table, **reading)
            else:
                columns, facts = _detect_in_rows(table, fit, ranked, distance or "combined", by_label, **reading)
        order = sorted(range(len(columns["score"])), key=lambda row: -columns["score"][row])[:top]
        facts["top"] = [{name: values[row] for name, values in columns.items()} for row in order]
        if output is not None:
            _write_columns(outputs[output], columns, "score")
            facts["output"] = str(output)
    if as_json:
        _print_json(facts)
        return
    _print(", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items() if name != "top"))
    _print_table(facts["top"])


def _detect_in_rows(
    table: str | None, fit: str | None, rank: Any, distance: str, by_label: bool, **reading: Any
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    import numpy as np

    from subspan.commands import read_embeddings
    from subspan.detect import SubspaceDetector

    with _progress("reading") as progress:
        data = read_embeddings(table, progress=progress, **reading)
        good = data
        if fit is not None:
            if by_label:
                raise ValueError("--by-label: fits to the rows of each label, so --fit does not apply")
            good = read_embeddings(fit, progress=progress, **{**reading, "labels": None})
        if by_label and data.labels is None:
            raise ValueError("--by-label: needs --labels")
        _check_rank(rank, good)
        names = np.unique(data.labels) if by_label and data.labels is not None else [None]
        scores, outlying = np.empty(len(data)), np.zeros(len(data), dtype=bool)
        for step, name in enumerate(names):
            rows = np.arange(len(data)) if name is None else np.flatnonzero(data.labels == name)
            if name is not None and len(rows) < 3:
                raise ValueError(f"--by-label: {name!r} has {len(rows)} rows; a subspace of its own needs at least 3")
            normal = good.rows if name is None else data.take(rows)
            detector = SubspaceDetector(rank, distance=distance, contamination="fence").fit(normal)
            for start in range(0, len(rows), 8192):
                part = rows[start : start + 8192]
                scores[part] = detector.anomaly_score(data.take(part))
                outlying[part] = scores[part] > -detector.offset_
                progress("scoring", (step + (start + len(part)) / len(rows)) / len(names))
    columns = {
        **_naming(data, range(len(data))),
        "score": scores.tolist(),
        "outlier": outlying.tolist(),
    }
    facts = {"rows": len(data), "fitted_to": len(good), "rank": rank, "distance": distance}
    return columns, {**facts, "outliers": int(outlying.sum())}


def _detect_label_errors(table: str | None, **reading: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    from subspan.commands import read_embeddings
    from subspan.detect import label_votes

    with _progress("reading") as progress:
        data = read_embeddings(table, progress=progress, **reading)
        if data.labels is None:
            raise ValueError("--label-errors: needs --labels")
        if len(data) < 3:
            raise ValueError(f"--label-errors: {len(data)} rows are too few to have neighbours")
        progress("asking the neighbours", 0.5)
        votes = label_votes(data.rows, data.labels, min(10, len(data) - 1))
    columns = {
        **_naming(data, range(len(data))),
        "suggested": [str(name) for name in votes.suggested],
        "score": votes.scores.tolist(),
        "suspect": votes.suspect.tolist(),
    }
    return columns, {"rows": len(data), "labels": len(set(data.labels.tolist())), "suspects": int(votes.suspect.sum())}


def _detect_in_images(
    folder: str, rank: Any, shots: int | None, rotations: int | None, seed: int
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    import numpy as np

    from subspan.datasets import anomaly_folder, image_preprocessing, load_model
    from subspan.detect import RandomRotations, SubspaceAD
    from subspan.measures import aupro, auroc
    from subspan.models import FeatureGrid, ImagePreprocessing
    from subspan.reproduce.subspacead import MIDDLE

    found = anomaly_folder(folder)
    good = found.train
    if shots is not None:
        good = good.subset(np.random.default_rng(seed).permutation(len(good))[:shots].tolist())
    with _progress("fitting") as progress:
        network = "efficientnet-lite0"
        preprocessing = ImagePreprocessing(**image_preprocessing(network), resize="squash")
        grid = FeatureGrid(load_model(network), MIDDLE, preprocessing=preprocessing)
        views = (8 if len(good) <= 16 else 0) if rotations is None else rotations
        augment = RandomRotations(views) if views else None
        detector = SubspaceAD(grid, augment=augment, rank=rank, normalize=True, random_state=seed)

        def watched(images: Any, title: str, first: float) -> Iterator[Any]:
            for index in range(len(images)):
                progress(title, first + 0.5 * index / len(images))
                yield images[index]

        detector.fit(watched(good, "fitting", 0.0))
        result = detector.predict(watched(found.test, "scoring", 0.5))
    columns = {
        "image": list(found.test.names),
        "type": list(found.test.labels),
        "score": result.scores.tolist(),
    }
    facts: dict[str, Any] = {"images": len(found.test), "fitted_to": len(good), "rank": detector.subspace_.dim}
    if 0 < found.anomalous.sum() < len(found.anomalous):
        facts["image_auroc"] = float(auroc(result.scores, found.anomalous))
        located = np.flatnonzero(found.located).tolist()
        facts["defects_without_mask"] = len(found.test) - len(located)
        masks = [_mask(found, index, result.maps[index].shape) for index in located]
        if any(mask.any() for mask in masks):
            pixels, defects = np.stack([result.maps[index] for index in located]), np.stack(masks)
            facts["pixel_auroc"] = float(auroc(pixels, defects))
            facts["aupro"] = float(aupro(pixels, defects))
    return columns, facts


def _mask(found: Any, index: int, shape: tuple[int, int]) -> Any:
    """A defect mask at the size of its score map."""
    import numpy as np
    from PIL import Image

    mask = Image.fromarray(found.mask(index))
    return np.asarray(mask.resize((shape[1], shape[0]), Image.Resampling.NEAREST)).astype(bool)


def _write_columns(path: Path, columns: dict[str, list[Any]], numbers: str) -> None:
    """Columns as .csv or .json, or one of them as .npy."""
    if path.suffix.lower() == ".npy":
        write_array(path, columns[numbers])
    else:
        write_rows(path, columns)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items():
        justify = "right" if isinstance(value, int | float) else "left"
        table.add_column(printable(name).replace("_", " "), justify=justify, no_wrap=name == "name")
    for row in rows:
        table.add_row(*(printable(_short(value)) for value in row.values()))
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000  # a line a row, for whatever reads it
    console.print(table)


# ---------------------------------------------------------------------- select


@app.command()
def select(
    table: Table = None,
    size: Annotated[
        str, typer.Option("-m", "--size", help="How many rows: a number, or a share of all (0.1).")
    ] = "0.1",
    method: Annotated[
        Literal["leverage", "sample", "medoids", "farthest", "random"],
        typer.Option(help="Highest leverage, drawn by leverage, cluster centres, farthest first, or random."),
    ] = "medoids",
    unique: Annotated[
        bool, typer.Option("--unique", help="Leave copies and near copies (cosine >= 0.99) of earlier rows out.")
    ] = False,
    rank: Rank = "0.9",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the chosen rows: .csv, .json, or .npy (row numbers).")
    ] = None,
    labels: Labels = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose a few rows that stand for all: the middles of clusters, or those that span the main subspace.

    Examples:

    - `subspan select vectors.npy -m 1000 -o chosen.csv`

    - `subspan select pool.parquet -m 0.16 --method sample --json`

    - `subspan select corpus.jsonl --text-column text -m 200 --unique`
    """
    outputs = Outputs(Output("-o", output, _TABLES), inputs=(table, labels))
    _check_inputs(table)
    ranked = _rank(rank)
    import numpy as np

    from subspan.commands import read_embeddings
    from subspan.commands.survey import first_copies
    from subspan.select import LeverageSelector, retention
    from subspan.select.baselines import distinct_rows, k_center, k_medoids, random_rows
    from subspan.select.leverage import budget

    with outputs, _progress("reading") as progress:
        data = read_embeddings(
            table, labels=labels, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
            progress=progress,
        )  # fmt: skip
        _check_rank(ranked, data)
        pool = np.flatnonzero(first_copies(data) == np.arange(len(data))) if unique else np.arange(len(data))
        rows = data.take(pool)
        if unique:
            progress("looking for near copies", 0.3)
            distinct = distinct_rows(rows)
            pool, rows = pool[distinct], rows[distinct]
        try:
            count = budget(_size(size), len(pool))
        except ValueError as error:
            raise ValueError(str(error).replace("n_select:", "--size:")) from error
        progress("choosing", 0.5)
        leverage = None
        if method in ("leverage", "sample"):
            strategy = "top" if method == "leverage" else "sample"
            selector = LeverageSelector(count, rank=ranked, strategy=strategy, random_state=seed).fit(rows)
            chosen, leverage = selector.indices_, selector.scores_
        elif method == "medoids":
            chosen = k_medoids(rows, count, random_state=seed)
        elif method == "farthest":
            chosen = np.sort(k_center(rows, count, random_state=seed))
        else:
            chosen = random_rows(len(rows), count, random_state=seed)
        kept = retention(rows, chosen, ranked)
        columns = _naming(data, pool[chosen])
        if leverage is not None:
            columns["leverage"] = leverage[chosen].tolist()
        if data.texts is not None:
            columns["text"] = [data.texts[row] for row in pool[chosen]]
        if output is not None:
            _write_columns(outputs[output], columns, "row")
    facts: dict[str, Any] = {
        "rows": len(data),
        "candidates": len(pool),
        "chosen": len(chosen),
        "method": method,
        "retention": kept,
        **({} if output is None else {"output": str(output)}),
    }
    if as_json:
        _print_json({**facts, "indices": pool[chosen].tolist()})
        return
    _print(", ".join(f"{name} {_short(value)}" for name, value in facts.items()))
    if output is None:
        columns.pop("text", None)
        _print_table([dict(zip(columns, values)) for values in zip(*columns.values())])


def _size(text: str) -> int | float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"--size: a number of rows or a share is needed, got {text!r}") from None


# ---------------------------------------------------------------------- cluster


@app.command()
def cluster(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE|FOLDER|GRAPH",
            help="What the other verbs read, or a graph: an edge list (.edges, or any text with --attributes) or an "
            ".npz with adj_* and attr_* arrays.",
            show_default=False,
        ),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option("-c", "--clusters", min=1, help="How many. Left out: counted, and said how far to trust."),
    ] = None,
    method: Annotated[
        Literal["auto", "lsr", "lrr", "ssc", "ensc", "omp", "tsc", "ksubspaces"],
        typer.Option(help="Rows: how each is expressed by others. auto: lsr (tsc above 5 000 rows) or k-means."),
    ] = "auto",
    dim: Annotated[int | None, typer.Option("--dim", min=1, help="Dimension that each cluster's subspace has.")] = None,
    affine: Annotated[bool, typer.Option("--affine", help="The subspaces need not go through the origin.")] = False,
    attributes: Annotated[
        str | None, typer.Option("--attributes", metavar="TABLE", help="Graphs: a row of attributes for each node.")
    ] = None,
    objective: Annotated[
        Literal["conductance", "modularity"], typer.Option(help="Graphs: S²CAG or M-S²CAG.")
    ] = "conductance",
    order: Annotated[int, typer.Option(min=0, help="Graphs: steps of the walks that smooth the attributes.")] = 10,
    decay: Annotated[float, typer.Option(min=0, help="Graphs: weight of each step against the one before.")] = 0.9,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the cluster of every row: .csv, .json or .npz.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", help="Write a page on the clusters, .html.")] = None,
    labels: Labels = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Cluster rows, images or the nodes of a graph by the subspaces that they lie in.

    Labels, where given, are compared with the clusters and never used to find them.

    Examples:

    - `subspan cluster faces/ -c 40 --dim 9 -o clusters.csv --report clusters.html`

    - `subspan cluster vectors.npy --json`

    - `subspan cluster cora.npz -c 7 --order 16 --decay 1.2`

    - `subspan cluster links.edges --attributes words.csv --id-column id -o clusters.npz`
    """
    outputs = Outputs(
        Output("-o", output, (".csv", ".json", ".npz")), Output("--report", page, _PAGES),
        inputs=(table, attributes, labels),
    )  # fmt: skip
    _check_inputs(table, kinds=(*_ROWS, *GRAPHS) if attributes is None else ())
    _check_inputs(attributes, kinds=TABLES)
    from subspan.datasets.graphs import is_graph_file

    graph = table is not None and (attributes is not None or (Path(table).is_file() and is_graph_file(table)))
    with outputs, _progress("reading") as progress:
        if graph:
            if method != "auto" or dim is not None or affine or text_column is not None or column is not None:
                raise ValueError("--method, --dim, --affine, --column and --text-column: for rows, not for a graph")
            data, found = _cluster_graph(
                str(table), attributes, clusters, labels, id_column, progress,
                objective=objective, order=order, decay=decay, seed=seed,
            )  # fmt: skip
        else:
            from subspan.commands import read_embeddings
            from subspan.commands.clustering import cluster_rows

            if attributes is not None:
                raise ValueError("--attributes: needs an edge list")
            data = read_embeddings(
                table, labels=labels, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
                progress=progress,
            )  # fmt: skip
            _check_clusters(clusters, len(data))
            found = cluster_rows(data, clusters, method=method, dim=dim, affine=affine, seed=seed, progress=progress)
        facts = found.facts
        columns = {
            **_naming(data, range(len(data))),
            "cluster": found.labels.tolist(),
            "residual": found.residuals.tolist(),
        }
        if output is not None:
            _write_clusters(outputs[output], columns, found)
            facts["output"] = str(output)
        if page is not None:
            from subspan.report import render_clusters

            facts["report"] = str(page)
            write_text(outputs[page], render_clusters(facts, data))
    if as_json:
        _print_json({**facts, "labels": found.labels.tolist()})
        return
    _print_clusters(facts)


def _check_clusters(clusters: int | None, n: int) -> None:
    if clusters is not None and clusters > n:
        raise ValueError(f"--clusters: {clusters} asked for of {n} rows")
    if n < 4:
        raise ValueError(f"{n} rows are too few to cluster")


def _cluster_graph(
    table: str, attributes: str | None, clusters: int | None, labels: str | None, id_column: str | None,
    progress: Progress, **options: Any,
) -> tuple[Embeddings, Any]:  # fmt: skip
    import numpy as np

    from subspan.commands import Embeddings
    from subspan.commands.clustering import cluster_graph
    from subspan.commands.inputs import read_labels
    from subspan.datasets import read_graph

    label_file = Path(labels) if labels is not None and Path(labels).is_file() else None
    graph = read_graph(table, attributes, id_column=id_column, label_column=None if label_file else labels)
    if label_file is not None:
        graph = graph.with_classes(read_labels(label_file, len(graph)).tolist())
    _check_clusters(clusters, len(graph))
    found = cluster_graph(graph, clusters, progress=progress, **options)
    width, name = found.facts["columns"], readable_name(Path(table).name)
    edges = found.facts["edges"]
    counted = f"{width} attribute{'s' * (width != 1)} and {edges} edge{'s' * (edges != 1)}"
    source = f"{len(graph)} nodes with {counted} of {name}."
    # The page needs names and labels; the attributes stay sparse.
    stand_in = np.zeros((len(graph), 1), dtype=np.float32)
    data = Embeddings(
        stand_in, name, argument=readable_name(table), source=source, labels=graph.class_names, ids=graph.names
    )  # fmt: skip
    return data, found


def _write_clusters(path: Path, columns: dict[str, list[Any]], found: Any) -> None:
    if path.suffix.lower() != ".npz":
        write_rows(path, columns)
        return
    import numpy as np

    arrays: dict[str, Any] = {}
    arrays |= {name: np.asarray(values) for name, values in columns.items() if name not in ("row", "cluster")}
    with atomic_write(path) as unfinished:
        np.savez(unfinished, cluster=found.labels, **arrays)


def _print_clusters(facts: dict[str, Any]) -> None:
    from subspan.commands.clustering import count_in_words, kmeans_in_words

    names = ("rows", "method", "clusters", "silhouette", "modularity", "output", "report")
    shown = {name: facts[name] for name in names if facts.get(name) is not None}
    _print(", ".join(f"{name} {_short(value)}" for name, value in shown.items()))
    if "count" in facts:
        advice = "" if facts["count"]["trusted"] else " Say how many with --clusters."
        _print(count_in_words(facts["count"]) + advice)
    if "scores" in facts:
        _print("against the labels: " + ", ".join(f"{name} {value:.3f}" for name, value in facts["scores"].items()))
    _print(kmeans_in_words(facts))
    _print_table(
        [
            {"cluster": index, "rows": size, "dimensions": dim, "representatives": " ".join(map(str, rows))}
            for index, (size, dim, rows) in enumerate(
                zip(facts["sizes"], facts["dimensions"], facts["representatives"])
            )
        ]
    )


# ---------------------------------------------------------------------- shorten


@app.command()
def shorten(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE|INDEX|FOLDER",
            help="What the other verbs read, or a FAISS index, a folder of tables, or Qdrant (see `upgrade`).",
            show_default=False,
        ),
    ] = None,
    rank: Rank = "0.95",
    method: Annotated[
        Literal["pca", "matryoshka", "prefix"],
        typer.Option(
            help="The leading principal directions; a rotation of them, trained so that every prefix serves "
            "(--rank N); or the first columns as they are (--rank N)."
        ),
    ] = "pca",
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the mean first. Without it cosines are kept best.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The shorter vectors: .npy, or with ids .safetensors, .parquet, .faiss."),
    ] = Path("short.npy"),
    subspace: Annotated[
        Path | None, typer.Option("--map", help="Write the subspace too, .safetensors, to shorten new rows with.")
    ] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    collection: Annotated[str | None, typer.Option(help="Which collection of Qdrant, if there are several.")] = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write vectors with fewer columns, and say what recall@10 each number of columns leaves.

    Vectors of unit length are scaled to it again, so that cosine, inner product and L2 still rank them alike; scale
    new rows that `--map` shortens too. Others are left as they come out. The recall is by the metric of the index,
    of tables by cosine, and printed with it.

    Examples:

    - `subspan shorten vectors.npy --rank 128 -o short.npy --map pca.safetensors`

    - `subspan shorten vectors.parquet --id-column id --rank marchenko-pastur --center -o short.parquet`

    - `subspan shorten vectors.npy --method matryoshka --rank 64 -o short.npy`

    - `subspan shorten images.faiss --method prefix --rank 256 -o short.faiss`
    """
    _check_inputs(table, kinds=(*_ROWS, *INDEXES))
    ranked = _rank(rank)
    from subspan.datasets.index_writing import check_destination
    from subspan.datasets.indexes import in_memory, is_stored, open_index

    suffixes = (".npy", ".safetensors", ".parquet", *INDEXES)
    outputs = Outputs(
        Output(
            "-o", output, suffixes if output.suffix or table is None or not is_stored(table) else (), resumable=True
        ),
        Output("--map", subspace, (".safetensors",)),
        inputs=(table,),
    )
    from subspan.commands import read_embeddings
    from subspan.commands.shortening import matryoshka_head, pca_head, prefix_head
    from subspan.commands.shortening import shorten as shorten_vectors

    with outputs, _progress("reading") as progress:
        if table is not None and is_stored(table):
            source = open_index(table, column=column, id_column=id_column, collection=collection)
        else:
            data = read_embeddings(
                table, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan,
                progress=progress,
            )  # fmt: skip
            named = data.ids if id_column is not None else None
            source = in_memory(data.rows, data.argument or data.name, named)
        check_destination(source, output, overwrite=True)
        if method == "pca":
            head = pca_head(source, ranked, center=center, progress=progress)
        elif method == "matryoshka":
            head = matryoshka_head(source, ranked, seed=seed, progress=progress)
        else:
            head = prefix_head(source, ranked)
        drawn = None if subspace is None else outputs[subspace]
        facts = shorten_vectors(source, head, outputs[output], subspace=drawn, seed=seed, progress=progress)
    facts |= {"output": str(output), **({} if subspace is None else {"map": str(subspace)})}
    if as_json:
        _print_json(facts)
        return
    shown = {name: value for name, value in facts.items() if name not in ("curve", "verified")}
    _print(", ".join(f"{name} {_short(value)}" for name, value in shown.items()))
    _print_table(
        [
            {"columns": entry["columns"], "bytes a row": entry["bytes"]}
            | {name: entry[name]["recall"] for name in ("pca", "matryoshka", "prefix") if name in entry}
            for entry in facts["curve"]
        ]
    )


# ---------------------------------------------------------------------- align


@app.command()
def align(
    source: Annotated[str, typer.Argument(help="Embeddings to map.")],
    target: Annotated[str, typer.Argument(help="Embeddings of the same rows (realign: of any) to map them to.")],
    method: Annotated[
        Literal["procrustes", "scaled", "ridge", "cca", "realign"],
        typer.Option(help="Rotation, rotation and scale, affine, through the shared directions, or without pairs."),
    ] = "procrustes",
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the map, .safetensors.")] = None,
    apply: Annotated[Path | None, typer.Option("--apply", help="Write the mapped source rows, .npy.")] = None,
    column: Column = None,
    text_column: TextColumn = None,
    id_column: IdColumn = None,
    skip_nan: SkipNan = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Fit a map from one embedding to another, say how well it does on held-out rows, and keep it.

    Examples:

    - `subspan align old.npy new.npy -o map.safetensors`

    - `subspan align old.parquet new.parquet --method ridge --id-column id --json`

    - `subspan align texts.npy images.npy --method realign --apply mapped.npy`
    """
    outputs = Outputs(
        Output("-o", output, (".safetensors",)), Output("--apply", apply, (".npy",)), inputs=(source, target)
    )
    _check_inputs(source, target)
    import numpy as np

    from subspan.commands import read_embeddings

    with outputs, _progress("reading") as progress:
        first, second = (
            read_embeddings(
                path, column=column, text_column=text_column, id_column=id_column, skip_nan=skip_nan, progress=progress
            )
            for path in (source, target)
        )
        if method == "realign":
            fitted, operator, facts = _align_unpaired(first, second)
        else:
            fitted, operator, facts = _align_paired(first, second, method, seed, progress)
        facts = {"method": method, "source_rows": len(first), "target_rows": len(second), **facts}
        if output is not None:
            operator.save(outputs[output])
            facts["output"] = str(output)
        if apply is not None:
            write_array(outputs[apply], fitted.transform(np.asarray(first.rows)))
            facts["applied"] = str(apply)
    if as_json:
        _print_json(facts)
        return
    held_out = facts.pop("held_out", None)
    _print(", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items()))
    if held_out is not None:
        _print_table(
            [
                {
                    "on held-out rows": name,
                    "own row first": entry["recall@1"]["value"],
                    "own row in 10": entry["recall@10"]["value"],
                    "neighbours kept": entry["neighbours_kept"]["share"],
                }
                for name, entry in held_out.items()
            ]
        )


def _align_paired(
    first: Embeddings, second: Embeddings, method: str, seed: int, progress: Progress
) -> tuple[Any, Any, dict[str, Any]]:
    from subspan.commands.comparison import fit_map, paired

    fitted, facts = fit_map(*paired(first, second), method, seed=seed, progress=progress)
    return fitted, fitted.map_, facts


def _align_unpaired(first: Embeddings, second: Embeddings) -> tuple[Any, Any, dict[str, Any]]:
    from subspan.align import ReAlign

    fitted = ReAlign()
    fitted.fit(first.rows, second.rows)
    facts = {"gap_before": fitted.gap_before_, "gap_after": fitted.gap_after_, "scale": fitted.scale_}
    return fitted, fitted.to_module(), facts


# ---------------------------------------------------------------------- upgrade


@app.command()
def upgrade(
    index: Annotated[
        str,
        typer.Argument(
            metavar="INDEX",
            help="The vectors in use: a FAISS index (.faiss, .index), a table (.npy, .safetensors, .parquet), a folder "
            "of such tables, or Qdrant (a local folder, or http://…).",
        ),
    ],
    sample: Annotated[
        str, typer.Argument(metavar="NEW_SAMPLE", help="The new encoder's vectors of some of the same items.")
    ],
    index_ids: Annotated[
        Path | None, typer.Option("--index-ids", help="Ids of the index, one a row (.npy, .txt), if it holds none.")
    ] = None,
    sample_ids: Annotated[
        Path | None,
        typer.Option("--sample-ids", help="Ids of the sample, one a row. Without ids: as many rows, in one order."),
    ] = None,
    queries_new: Annotated[
        str | None, typer.Option("--queries-new", metavar="TABLE", help="Queries by the new encoder.")
    ] = None,
    queries_old: Annotated[
        str | None, typer.Option("--queries-old", metavar="TABLE", help="The same queries by the old encoder.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option("--labels", metavar="COLUMN|FILE", help="Labels of the sample: items of one label are relevant."),
    ] = None,
    query_labels: Annotated[
        str | None, typer.Option("--query-labels", metavar="FILE", help="Labels of the queries.")
    ] = None,
    metric: Annotated[
        Literal["cosine", "inner", "euclidean"] | None,
        typer.Option(help="What is ranked by (default: as the index does; tables by cosine if of unit length)."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Which map: linear (the simplest as good as the best on held-out pairs, of procrustes, scaled, "
            "low-rank, cca and ridge), one of these, mlp, or auto (the network too; takes minutes)."
        ),
    ] = "linear",
    target: Annotated[
        float, typer.Option(min=0.01, max=1, help="Good enough: this share of the recall of embedding all anew.")
    ] = 0.9,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "-o",
            "--adapter",
            help="Write the map of new queries to the old space: .safetensors, .onnx, or .faiss (transforms alone).",
        ),
    ] = None,
    wrapped: Annotated[
        Path | None,
        typer.Option("--wrap", metavar="OUT", help="Write the FAISS index so that it answers new queries: .faiss."),
    ] = None,
    migrate: Annotated[
        Path | None,
        typer.Option("--migrate", metavar="OUT", help="Write all vectors, mapped into the new space; can be resumed."),
    ] = None,
    backfill: Annotated[
        Path | None,
        typer.Option(
            "--backfill-order",
            metavar="OUT",
            help="Write the ids in the order to embed them anew, nearest to the sample's new vectors first: .txt or "
            ".npy. The page shows what it is worth against a random order.",
        ),
    ] = None,
    page: Annotated[Path | None, typer.Option("--report", metavar="OUT", help="Write a page: .html.")] = None,
    column: Column = None,
    id_column: IdColumn = None,
    collection: Annotated[str | None, typer.Option(help="Which collection of Qdrant, if there are several.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all input and say what would be written; write nothing.")
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say whether a new encoder can serve on an index in use, and write what it takes: adapter, migrated index, order.

    Compares recall@10 of the old encoder, of new queries on old vectors without and with a map, of new queries on
    migrated vectors, and of embedding everything anew; all on held-out pairs. Exits with 1 where nothing short of
    embedding everything anew is good enough.

    Examples:

    - `subspan upgrade images.faiss new_sample.parquet --report upgrade.html`

    - `subspan upgrade images.faiss new.npy --sample-ids ids.npy -o queries.onnx --wrap answers_new_queries.faiss`

    - `subspan upgrade old.parquet new.parquet --labels category --migrate migrated.parquet --backfill-order ids.txt`

    - `subspan upgrade qdrant_folder/ new.parquet --migrate new_folder --json`
    """
    _check_inputs(index, sample, queries_new, queries_old, kinds=(*TABLES, *INDEXES))
    from subspan.commands.upgrading import UpgradeFiles, run_upgrade
    from subspan.report import render_upgrade

    files = UpgradeFiles(adapters=tuple(adapter or ()), wrapped=wrapped, migrated=migrate, order=backfill, page=page)
    with _progress("reading") as progress:
        facts = run_upgrade(
            index,
            sample,
            files,
            index_ids=index_ids,
            sample_ids=sample_ids,
            queries_new=queries_new,
            queries_old=queries_old,
            labels=labels,
            query_labels=query_labels,
            metric=metric,
            method=method,
            target=target,
            column=column,
            id_column=id_column,
            collection=collection,
            dry_run=dry_run,
            seed=seed,
            render=render_upgrade,
            progress=progress,
        )
    if as_json:
        _print_json(facts)
    else:
        _print_upgrade(facts)
    if facts.get("verdict", {}).get("answer") == "re-embed":
        raise typer.Exit(1)


def _print_upgrade(facts: dict[str, Any]) -> None:
    found = facts["index"]
    _print(f"{found['source']}: {found['n']} vectors of {found['d']} dimensions, {found['form']}, {facts['metric']}")
    if "retrieval" not in facts:
        _print(f"{facts['pairs']} pairs; nothing was fitted or written (--dry-run)")
        for name, path in facts["files"].items():
            _print(f"  would write {name.replace('_', ' ')}: {path}")
        return
    _print(
        f"{facts['pairs']} pairs, {facts['fitted_to']} fitted to; {facts['queries']} queries among "
        f"{facts['searched']} held-out items; truth: {facts['truth']}"
    )
    if facts["left_out"]:
        print(f"{facts['left_out']} items of the sample are not in the index and are left out")
    if facts["few_pairs"]:
        _print("fewer pairs to fit to than dimensions: the maps are kept to the directions that the pairs span")
    _print_table(
        [
            {
                "queries/collection": name,
                "recall@10": entry["value"],
                "low": entry["interval"][0],
                "high": entry["interval"][1],
            }
            for name, entry in facts["retrieval"].items()
            if entry is not None
        ]
    )
    verdict = facts["verdict"]
    _print(f"{verdict['answer']}: {verdict['text']}")
    _print(verdict["reason"])
    if verdict["bridge"]:
        _print(verdict["bridge"])
    for name, path in facts["files"].items():
        _print(f"{name.replace('_', ' ')}: {path}")
    if "migrated_index" in facts["files"] and facts["migrated_unit_length"]:
        _print("the migrated vectors have length one: scale new ones that replace them, or are added, likewise")


# ---------------------------------------------------------------------- systems


@app.command("list")
def list_systems(as_json: AsJson = False) -> None:
    """List the systems: name, title, paper, year, room, and how their last recorded reproduction went.

    Examples:

    - `subspan list`

    - `subspan list --json`
    """
    from subspan.reproduce import listing

    entries = listing()
    if as_json:
        _print_json(entries)
    else:
        shown = ("name", "room", "year", "main_claim", "checks", "title")
        _print_table([{name: entry[name] for name in shown} for entry in entries])


@app.command()
def reproduce(
    names: Annotated[list[str], typer.Argument(metavar="NAME...|all", help="Systems by name, or all.")],
    quick: Annotated[bool, typer.Option("--quick", help="A smaller run, under a minute a system.")] = False,
    results: Annotated[
        Path | None, typer.Option("--results", metavar="DIR", help="Write each record to a folder as NAME.json.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run systems on real data against their baselines and bars. Exits with 1 where a bar does not hold.

    Examples:

    - `subspan reproduce subspacead --quick`

    - `subspan reproduce all --json > results.json`
    """
    from subspan.reproduce import find
    from subspan.reproduce import run as run_protocol

    if results is not None and results.exists() and not results.is_dir():
        raise ValueError(f"--results: {str(results)!r} is not a folder")
    records = []
    for system in find(names):
        with _progress(system.name) as progress:
            records.append(run_protocol(system, quick=quick, seed=seed, progress=progress, results=results))
        if not as_json:
            _print_record(records[-1])
    if as_json:
        _print_json(records)
    if not all(record["holds"] for record in records):
        raise typer.Exit(1)


def _print_record(record: dict[str, Any]) -> None:
    from subspan.reproduce.protocol import status, verdict

    say = Console(markup=False, emoji=False, highlight=False).print
    say(f"{record['system']}: {status(record)} ({record['seconds']:.0f} s)", style="bold")
    for name in ("claim", "data", "model", "bar"):
        say(f"  {name}: {record[name]}")
    _print_table(
        [{"": "ours", record["metric"]: record["ours"]}]
        + [{"": name, record["metric"]: value} for name, value in record["baselines"].items()]
    )
    for check in record["checks"]:
        say(f"  {check['name']}: {_short(check['value'])} ({check['metric']}; {check['bar']}): {verdict(check)}")
    for table in record["tables"]:
        say(f"  {table['title']}")
        _print_table([dict(zip(table["columns"], row)) for row in table["rows"]])
    for note in record["notes"]:
        say(f"  note: {note}")


# ---------------------------------------------------------------------- models and cache


@models.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the pretrained models, their licences and whether they are installed.

    Example: `subspan models list`
    """
    from subspan.datasets import WEIGHT_PACKAGES, is_installed

    entries = [
        {
            "name": name,
            "installed": is_installed(name),
            "megabytes": package.megabytes,
            "license": package.license,
            "title": package.title,
        }
        for name, package in WEIGHT_PACKAGES.items()
    ]
    if as_json:
        _print_json(entries)
    else:
        _print_table(entries)


@models.command("install")
def install_models(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Models; all where none is named.")
    ] = None,
) -> None:
    """Install pretrained models, pinned by hash and without the dependencies that they declare.

    Example: `subspan models install minilm`
    """
    from subspan.datasets import WEIGHT_PACKAGES, install

    wanted = names or list(WEIGHT_PACKAGES)
    try:
        install(wanted)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    _print(f"installed: {', '.join(wanted)}")


@cache.command("info")
def cache_info(as_json: AsJson = False) -> None:
    """Say where the cache is and what it holds.

    Example: `subspan cache info`
    """
    from subspan.datasets import cache_entries, cache_folder

    entries = [
        {
            "kind": entry.kind,
            "megabytes": round(entry.megabytes, 1),
            "folder": entry.key[:16],
            "state": "finished" if entry.finished else "unfinished",
        }
        for entry in cache_entries()
    ]
    total = round(sum(entry["megabytes"] for entry in entries), 1)
    if as_json:
        _print_json({"folder": str(cache_folder()), "megabytes": total, "entries": entries})
        return
    _print(f"{cache_folder()}: {len(entries)} entries, {total} MB")
    _print_table(entries)


@cache.command("clear")
def cache_clear(
    older_than_days: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Only entries at least so old.")
    ] = 0.0,
) -> None:
    """Remove what is in the cache and what killed runs left there, but for what a process is making.

    Example: `subspan cache clear --older-than 30`
    """
    from subspan.datasets import clear_cache

    _print(f"{clear_cache(older_than_days=older_than_days):.1f} MB freed")
