"""`subspan audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subspan.base.files import write_text
from subspan.base.outputs import Output, Outputs

from .options import PAGES, AsJson, Seed
from .printing import print_facts, print_json, print_line, print_table, progress_bar

_FOLDER = "a folder with safetensors weights"


def audit(
    base: Annotated[Path, typer.Argument(metavar="BASE", help=f"Before the alignment: {_FOLDER}.")],
    aligned: Annotated[Path, typer.Argument(metavar="ALIGNED", help="After it; the update between is looked into.")],
    tuned: Annotated[list[Path], typer.Argument(metavar="TUNED...", help="Tuned on from ALIGNED, one or more.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help='A behaviour, two or more times: JSON lines with "prompt", "target" and perhaps "against", another '
            "target. Without them weights alone are compared."
        ),
    ] = None,
    subspace: Annotated[
        Path | None,
        typer.Option(help="A subspace of the states, from `subspan probe`: how much updates write into it."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template of ALIGNED.")] = False,
    fraction: Annotated[float, typer.Option(help="Share of each tensor's directions that is judged.")] = 0.25,
    draws: Annotated[int, typer.Option(min=1, help="Random subspaces of each kind whose behaviour is read.")] = 3,
    page: Annotated[Path | None, typer.Option("--report", help="Write a page on what is found, .html.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, its size and time, and stop.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Is the subspace of an alignment update about one behaviour, or do other updates lie in it as well?

    From weights, tensor by tensor: how much of each tuned model's update lies in the main directions of the update from
    BASE to ALIGNED, beside random directions of the same number, and at what angles the updates lie. With prompts: how
    much of each behaviour's change these directions carry, beside controls, and whether that is more of one than of
    the others. Nothing is generated.

    Examples:

    - `subspan audit llama-base llama-chat llama-math llama-harmful --plan`

    - `subspan audit llama-base llama-chat llama-math llama-harmful --report audit.html`

    - `subspan audit llama-base llama-chat llama-math --subspace found/subspace.safetensors`

    - `subspan audit base chat math harmful --prompts refusing.jsonl --prompts solving.jsonl --chat --report audit.html`
    """
    files = [*(prompts or []), *([] if subspace is None else [subspace])]
    outputs = Outputs(Output("--report", page, PAGES), inputs=(base, aligned, *tuned, *files))
    for name, path in (("BASE", base), ("ALIGNED", aligned), *(("TUNED", path) for path in tuned)):
        if not path.is_dir():
            raise ValueError(f"{name}: {str(path)!r} is not a folder")
    for path in files:
        if not path.is_file():
            raise ValueError(f"{'--subspace' if path is subspace else '--prompts'}: {str(path)!r} is not a file")
    from subspan.commands.auditing import Audit

    job = Audit(base, aligned, tuple(tuned), tuple(prompts or ()), chat, fraction, draws, seed, subspace)
    if plan:
        facts = job.plan()
        print_json(facts) if as_json else print_facts(facts)
        return
    with outputs, progress_bar("reading") as progress:
        facts = job.run(progress)
        if page is not None:
            from subspan.report import render_audit

            write_text(outputs[page], render_audit(facts))
            facts["report"] = str(page)
    if as_json:
        print_json(facts)
    else:
        _print_audit(facts)


def _print_audit(facts: dict[str, Any]) -> None:
    weights, behaviours = facts["weights"], facts["behaviours"]
    print_line(f"{facts['verdict']} (by {facts['read_from']}): {facts['reason']}")
    if behaviours is not None:
        print_line(f"by weights alone, {weights['verdict']}: {weights['reason']}")
        print_table(
            [
                {"behaviour": name, "main directions carry": kinds["topk"]}
                | {words: kinds[kind] for kind, words in KINDS.items()}
                for name, kinds in behaviours["carried"].items()
            ]
        )
    place = weights["fractions"].index(facts["fraction"])
    print_table(
        [
            {
                "update of": name,
                "in the main directions": curve["kept"][place],
                "in any of them": curve["drawn"][place],
                "in random ones": curve["chance"][place],
                "cosine": weights["cosines"][name],
            }
            for name, curve in weights["curves"].items()
        ]
    )
    print_table(
        [
            {
                "updates": f"{row['first']} · {row['second']}",
                "overlap": row["overlap"],
                "by chance": row["chance"],
                "mean angle": row["mean"],
                "matrices": row["matrices"],
            }
            for row in weights["pairs"]
        ]
    )
    if inside := facts["subspace"]:
        print_line(f"{inside['file']}, {inside['verdict']}: {inside['reason']}")
        print_table(
            [
                {"update of": name, "written into the subspace": share, "into a random one": inside["chance"]}
                for name, share in inside["shares"].items()
            ]
        )
        for name in inside["unmoved"]:
            print_line(f"the update of {name} changes no matrix that writes into the states")
    if "report" in facts:
        print_line(f"report {facts['report']}")


KINDS = {"randomk": "any of its directions", "random": "random ones", "scaled": "scaled update"}
