"""What mkdocs does beside Markdown: tables from the recorded reproductions, and formulas as MathML."""

import json
import re
import sys
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).resolve().parent))
from house import picture

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
    from subspan.reproduce.protocol import status, verdict

    parts = [
        f"*{facts['data']}* Model: {facts['model']}. {facts['seconds']:.0f} s on {facts['versions']['machine']}, "
        f"seed {facts['seed']}. **{status(facts).capitalize()}.**",
        f"Main bar, {facts['metric']}: {facts['bar']}. Measured {number(facts['ours'])}: "
        + ("**holds**." if facts["main_bar_holds"] else "**does not hold**."),
        table(["method", facts["metric"]], [["ours", facts["ours"]], *facts["baselines"].items()]),
    ]
    if facts["checks"]:
        rows = [[c["name"], c["metric"], c["value"], c["bar"], verdict(c)] for c in facts["checks"]]
        parts.append(table(["effect", "metric", "measured", "bar", "result"], rows))
    for one in facts["tables"]:
        parts += [f"**{one['title']}**", table(one["columns"], one["rows"])]
    if facts["notes"]:
        parts.append("\n".join(f"- {note}" for note in facts["notes"]))
    parts.append(f"Run it: `subspan reproduce {name}` (`--quick` for under a minute).")
    return "\n\n".join(parts)


def summary():
    """One row a system: what it is for, what was measured, how many of its checks hold."""
    from subspan.reproduce import listing

    rows = []
    for entry in listing():
        facts = record(entry["name"])
        if facts is None:
            outcome = "not recorded"
        else:
            best = "; ".join(f"{k} {number(v)}" for k, v in list(facts["baselines"].items())[:2])
            outcome = f"{facts['metric']} {number(facts['ours'])}" + (f" ({best})" if best else "")
        name = f"[{entry['public'].split('.')[-1]}]({entry['name']}.md)"
        rows.append([name, entry["title"], entry["paper"], outcome, entry["main_claim"], entry["checks"]])
    return table(["system", "for", "paper", "measured here (baselines)", "main claim", "checks"], rows)


def reached():
    """What the jobs of the front page reach, each number out of a record."""
    system = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    target = {
        (path.stem, one["target"]): one["measured"]
        for path in BENCHMARKS.glob("*.json")
        for one in json.loads(path.read_text(encoding="utf-8"))["targets"]
    }

    def ours(name):
        return f"{system[name]['ours']:.3g}"

    def rival(name, baseline):
        return f"{system[name]['baselines'][baseline]:.3g}"

    def bench(name, one, form=".1f"):
        return f"{target[name, one]:{form}}"

    def check(name, one):
        return next(c["value"] for c in system[name]["checks"] if c["name"] == one)

    rocket = "ROCKET's eigenbasis"
    published = "published code over ours, processor time"
    rounded = "published code over S2CAG with its rounding, processor time"
    rows = [
        [
            "change the encoder of an index in use",
            "[`subspan upgrade`](guides/upgrade.md)",
            f"new queries on old vectors find {ours('embedding-upgrade')} of the true ten through a map "
            f"({rival('embedding-upgrade', 'none')} without), mean of upgrades between real encoders; a million "
            f"vectors migrate within {bench('upgrade_index', 'peak memory of the whole command, GiB')} GiB",
        ],
        [
            "find and localise defects from a few good photos",
            "[`subspan detect`](guides/inspection.md)",
            f"pixel AUROC {ours('subspacead')} without training; scores "
            f"{bench('subspacead', 'memory bank, faiss: scoring over ours, processor time', '.0f')} times as fast as a "
            f"memory bank on faiss ({rival('subspacead', 'memory bank (1-NN)')}) and keeps "
            f"{check('subspacead', 'storage'):.0f} times less",
        ],
        [
            "make a checkpoint's linear layers smaller without training",
            "[`subspan compress`](systems/cospadi.md)",
            f"a fifth fewer bits of SmolLM2: perplexity {ours('cospadi')} (whitened SVD "
            f"{rival('cospadi', 'whitened SVD')}, ROCKET's way {rival('cospadi', rocket)}, "
            f"dense {rival('cospadi', 'dense')}); rounding to as many bits costs less still, which the command says",
        ],
        [
            "make several fine-tunes of one model one",
            "[`subspan merge`](systems/concrete-merging.md)",
            f"{rival('concrete-merging', 'TSV-M')} % right over four tasks without data, "
            f"{rival('concrete-merging', 'layer-wise Concrete')} with a learnt mask (task arithmetic "
            f"{rival('concrete-merging', 'task arithmetic')}, each its own expert "
            f"{rival('concrete-merging', 'each its expert')})",
        ],
        [
            "cluster the nodes of a graph",
            "[`S2CAG`](systems/s2cag.md)",
            f"accuracy {ours('s2cag')} over four graphs (k-means on the attributes "
            f"{rival('s2cag', 'k-means on TF-IDF')}); "
            f"{bench('s2cag', 'wiki: ' + rounded)} to {bench('s2cag', 'citeseer: ' + rounded, '.0f')} times as fast as "
            "the published code",
        ],
        [
            "cluster rows and faces by subspace",
            "[`subspan cluster`](systems/subspace-clustering.md)",
            f"elastic net {bench('subspace_clustering', 'ensc: ' + published)}, matching pursuit "
            f"{bench('subspace_clustering', 'omp: ' + published, '.0f')} times as fast as the published code; 70,000 "
            f"rows within {bench('subspace_rows', 'EnSC: GiB at 70000 rows')} GiB",
        ],
        [
            "choose a subset that stands for all",
            "[`subspan select`](systems/scalselect.md)",
            "the same choice as the published path in "
            f"{bench('scalselect', 'published path over ours, processor time')} times less time and "
            f"{bench('scalselect', 'published path over ours, memory')} times less memory",
        ],
        [
            "bring texts and images, or two encoders, together",
            "[`ReAlign`](systems/realign.md), [`SubspaceAligner`](systems/plato-3d-text.md)",
            f"modality gap {rival('realign', 'no alignment')} closed to {ours('realign')}, in closed form; code found "
            f"by its docstring in the top five {ours('plato-3d-text')} of the time (affine map of the whole spaces "
            f"{rival('plato-3d-text', 'full, affine')})",
        ],
        [
            "principal directions of data larger than memory",
            "[`fit_moments`](guides/tables.md)",
            "exact, in one pass, "
            f"{bench('moments', 'faster than scikit-learn IncrementalPCA: its processor time over ours', '.0f')} times "
            "as fast as scikit-learn's IncrementalPCA",
        ],
        [
            "layers with subspace structure",
            "[`HouseholderProjector`](systems/householder-projector.md), [`SimVQ`](systems/simvq.md)",
            "orthogonal factors "
            f"{bench('orthogonal', 'householder_product over compact WY with backward, d = 1024, k = d / 4', '.0f')} "
            f"times as fast as torch's own with backward; codebooks with {ours('simvq')} % of the codes in use (plain "
            f"{rival('simvq', 'plain VQ')} %)",
        ],
    ]
    return table(["job", "with", "reached here"], rows)


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


def modules(room):
    """Every module of a room that has public names, in the order of their paths, as what mkdocstrings expands."""
    folder = ROOT / "src" / "subspan" / room
    public = re.compile(r"^(def|class) [a-zA-Z]", re.MULTILINE)
    found = [path for path in sorted(folder.rglob("*.py")) if public.search(path.read_text(encoding="utf-8"))]
    return "\n".join("::: " + ".".join(path.relative_to(ROOT / "src").with_suffix("").parts) for path in found)


def on_page_markdown(markdown, **_):
    """Put the recorded tables where a page asks for them."""
    markdown = re.sub(r"<!-- benchmark: ([\w-]+) -->", lambda match: benchmark(match[1]), markdown)
    markdown = re.sub(r"<!-- results: ([\w-]+) -->", lambda match: measured(match[1]), markdown)
    markdown = re.sub(r"<!-- modules: (\w+) -->", lambda match: modules(match[1]), markdown)
    markdown = markdown.replace("<!-- house -->", picture())
    markdown = markdown.replace("<!-- systems -->", summary())
    return markdown.replace("<!-- reached -->", reached())


def on_page_content(html, **_):
    """Formulas become MathML, which browsers draw without a script."""
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: convert(unescape(m[1])), html, flags=re.S)
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>',
        lambda m: convert(unescape(m[1]), display="block"),
        html,
        flags=re.S,
    )
