"""What mkdocs does beside Markdown: tables from the recorded reproductions, and formulas as MathML."""

import json
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "src" / "subspan" / "reproduce" / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"


def number(value):
    """A cell as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "\\|")


def table(columns, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(number(c) for c in columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(number(cell) for cell in row) + " |" for row in rows])


def record(name):
    """The recorded full run of a system, or None."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def measured(name):
    """Everything a system's full run measured, as Markdown."""
    facts = record(name)
    if facts is None:
        return "No full run of this protocol has been recorded yet."
    verdict = "All bars hold here." if facts["holds"] else "**Not all bars hold here.**"
    parts = [
        f"*{facts['data']}* Model: {facts['model']}. {facts['seconds']:.0f} s on {facts['versions']['machine']}, "
        f"seed {facts['seed']}. {verdict}",
        f"Main bar, {facts['metric']}: {facts['bar']}. Measured {number(facts['ours'])}: "
        + ("**holds**." if facts["main_bar_holds"] else "**does not hold**."),
        table(["method", facts["metric"]], [["ours", facts["ours"]], *facts["baselines"].items()]),
    ]
    if facts["checks"]:
        verdicts = {True: "holds", False: "does not hold"}
        rows = [
            [
                c["name"],
                c["metric"],
                c["value"],
                c["bar"],
                verdicts[c["holds"]] + ("" if c["required"] else " (reported)"),
            ]
            for c in facts["checks"]
        ]
        parts.append(table(["effect", "metric", "measured", "bar", "result"], rows))
    for one in facts["tables"]:
        parts += [f"**{one['title']}**", table(one["columns"], one["rows"])]
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    parts.append(f"Run it: `subspan reproduce {name}` (`--quick` for under a minute).")
    return "\n\n".join(parts)


def summary():
    """One row a system: what it is for, what was measured, whether its bars hold."""
    from subspan.reproduce import listing

    rows = []
    for entry in listing():
        facts = record(entry["name"])
        if facts is None:
            outcome, state = "not recorded", ""
        else:
            outcome = f"{facts['metric']} {number(facts['ours'])}"
            best = "; ".join(f"{k} {number(v)}" for k, v in list(facts["baselines"].items())[:2])
            outcome += f" ({best})" if best else ""
            state = "holds" if facts["holds"] else "not all"
        name = f"[{entry['public'].split('.')[-1]}](systems/{entry['name']}.md)"
        rows.append([name, entry["title"], entry["paper"], outcome, state])
    return table(["system", "for", "paper", "measured here (baselines)", "bars"], rows)


def benchmark(name):
    """What a benchmark's recorded run measured, as Markdown."""
    path = BENCHMARKS / f"{name}.json"
    if not path.exists():
        return f"No run has been recorded yet; `python benchmarks/{name}.py` prints one."
    facts = json.loads(path.read_text(encoding="utf-8"))
    load = " and ".join(f"{value:g}" for value in facts["load"])
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    parts = [
        f"{facts['setting']}. *{facts['machine']}, threads used: {facts['threads']}; load of the machine at the start "
        f"and at the end {load}. {versions}.*"
    ]
    for one in facts["tables"]:
        rows = [[f"{cell:.3g}" if isinstance(cell, float) else cell for cell in row] for row in one["rows"]]
        parts += [f"**{one['title']}**", table(one["columns"], rows)]
    if facts["targets"]:
        rows = [
            [one["target"], one["bound"], f"{one['measured']:.3g}", "holds" if one["holds"] else "**does not hold**"]
            for one in facts["targets"]
        ]
        parts.append(table(["target", "bound", "measured", "result"], rows))
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    return "\n\n".join(parts)


def on_page_markdown(markdown, page, **_):
    """Put the recorded tables where a page asks for them."""
    markdown = re.sub(r"<!-- benchmark: ([\w-]+) -->", lambda match: benchmark(match[1]), markdown)
    markdown = re.sub(r"<!-- results: ([\w-]+) -->", lambda match: measured(match[1]), markdown)
    if "<!-- systems -->" in markdown:
        text = summary() if page.file.src_uri == "index.md" else summary().replace("(systems/", "(")
        markdown = markdown.replace("<!-- systems -->", text)
    return markdown


def on_page_content(html, **_):
    """Formulas become MathML, which browsers draw without a script."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: convert(unescape(m[1])), html, flags=re.S)
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda m: convert(unescape(m[1]), display="block"),
        html,
        flags=re.S,
    )
