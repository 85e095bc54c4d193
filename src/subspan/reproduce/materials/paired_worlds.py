"""Worlds with two encoders that never met: code and docstrings, made shapes and captions, real models and names."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import hstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from subspan.datasets import (
    cached_features,
    is_available,
    load,
    load_sentence_encoder,
    procedural_shapes,
    stdlib_docstrings,
)
from subspan.models import SentenceEncoder
from subspan.nn.training import quiet_trainer

from ..training import kept
from .sentences import text_features

PACKAGES = ("numpy", "scipy", "sklearn", "networkx")
"""Packages, beside the standard library, whose functions are read; all come with this library's dependencies."""

STEPS, BATCH = 300, 64
"""Batches that train the point network, and their size."""


@dataclass(frozen=True)
class World:
    """Paired features of two encoders: x (n, p), y (n, q); queries come from groups of their own.

    anchors: the numbers of anchors to try. points: clouds of shapes, with a label of each for the analysis.
    """

    name: str
    x: Float[Tensor, "n p"]
    y: Float[Tensor, "n q"]
    groups: np.ndarray
    n_queries: int
    anchors: tuple[int, ...]
    points: Float[np.ndarray, "n m 3"] | None = None
    labels: tuple[str, ...] = ()


class _Masked(ast.NodeTransformer):
    """Every identifier becomes one letter; what remains is structure, operators and literals."""

    def visit(self, node: ast.AST) -> ast.AST:
        for name in ("id", "arg", "attr", "name", "asname", "module"):
            if isinstance(getattr(node, name, None), str):
                setattr(node, name, "v")
        if isinstance(node, ast.Global | ast.Nonlocal):
            node.names = ["v"] * len(node.names)
        if isinstance(node, ast.Call | ast.MatchClass):
            for keyword in getattr(node, "keywords", []):
                if isinstance(keyword, ast.keyword) and keyword.arg is not None:
                    keyword.arg = "v"
        return self.generic_visit(node)


def masked(code: str) -> tuple[str, str] | None:
    """(types of the syntax tree's nodes in order, source with every identifier masked); None where it does not parse.

    A body that was nothing but its docstring has nothing to compare.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return None
    body = tree.body[0].body if tree.body and isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef) else []
    if not body:
        return None
    # The signature is no part of the body.
    tree = ast.Module(body, [])
    kinds: list[str] = []
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        kinds.append(type(node).__name__)
        stack += reversed(list(ast.iter_child_nodes(node)))
    return " ".join(kinds), ast.unparse(ast.fix_missing_locations(_Masked().visit(tree)))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring's first paragraph."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".")


def functions(packages: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """(module, first sentence, node types, masked source) of documented functions, the standard library's with them."""
    seen = set()
    for package in ("", *packages):
        spec = importlib.util.find_spec(package) if package else None
        if package and (spec is None or spec.origin is None):
            continue
        folder = Path(spec.origin).parent if spec is not None and spec.origin is not None else None
        for entry in stdlib_docstrings(min_length=20, kinds=("function",), folder=folder):
            sentence = first_sentence(entry.text)
            key = sentence.lower()
            if key in seen or len(sentence) < 15 or "tests" in entry.module or not 60 <= len(entry.code) <= 6000:
                continue
            found = masked(entry.code)
            if found is not None and found[0].count(" ") >= 15:
                seen.add(key)
                yield f"{package}.{entry.module}", sentence, *found


def code_world(packages: Sequence[str] = PACKAGES, most: int | None = None) -> World:
    """Bodies (TF-IDF of node types and masked characters, 512 singular directions) and first sentences (MiniLM).

    most: take so many functions, evenly spaced.
    """
    versions = {name: importlib.metadata.version("scikit-learn" if name == "sklearn" else name) for name in packages}
    encoder = SentenceEncoder(*load_sentence_encoder())

    def compute(start: int) -> Iterator[np.ndarray]:
        found = list(functions(packages))
        chosen = np.linspace(0, len(found), min(most or len(found), len(found)), endpoint=False, dtype=int)
        modules, sentences, kinds, sources = zip(*(found[row] for row in chosen))
        counts = TfidfVectorizer(
            ngram_range=(1, 4), token_pattern=r"\S+", min_df=5, max_features=40_000, sublinear_tf=True
        )
        letters = TfidfVectorizer(analyzer="char", ngram_range=(3, 4), min_df=5, max_features=40_000, sublinear_tf=True)
        table = hstack([counts.fit_transform(kinds), letters.fit_transform(sources)]).tocsr()
        body = TruncatedSVD(512, n_iter=2, random_state=0).fit_transform(table)
        text = encoder.encode(sentences)
        number = np.unique(modules, return_inverse=True)[1]
        rows = np.concatenate([body, text, number[:, None]], axis=1).astype(np.float32)
        yield rows[start:]

    options = {"what": "functions, masked bodies 512 and first sentences 384", "recipe": 2, "most": most}
    data = {"python": platform.python_version(), "packages": versions}
    rows = torch.from_numpy(np.array(cached_features(compute, model=encoder.model, data=data, options=options)))
    sizes = (500, 1000, 2000, 4000, 8000)
    return World("code and docstrings", rows[:, :512], rows[:, 512:-1], rows[:, -1].numpy(), 500, sizes)


def point_network(clouds: Float[np.ndarray, "n m 3"], steps: int = STEPS) -> Any:
    """A PointNet trained on unlabelled clouds by contrast of two views, or the same from the cache folder."""
    from subspan.nn.pointnet import PointContrast

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PointContrast(keep=128)
        data: Any = torch.from_numpy(clouds)

        def fit() -> None:
            loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, drop_last=True)
            with quiet_trainer(max_steps=steps, max_epochs=-1) as trainer:
                trainer.fit(model.objective(), loader)

        key = {"clouds": clouds, "steps": steps, "batch": BATCH, "start": model, "views": model.keep}
        return kept(model, "point-network", key, fit)


def _shape_features(model: Any, clouds: Float[np.ndarray, "n m 3"]) -> Float[Tensor, "n p"]:
    def compute(start: int) -> Iterator[Tensor]:
        for first in range(start, len(clouds), 64):
            yield model(torch.from_numpy(clouds[first : first + 64]))

    return torch.from_numpy(np.array(cached_features(compute, model=model.encoder, data=clouds)))


def real_shapes() -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Points (n, 1024, 3) and records of the real models, in the scale and with the upward axis of the made ones."""
    data = load("named_shapes")
    points = data["points"]["points"].astype(np.float32) / 32767
    # Models stand on the plane of their first and last axis; the made shapes' upward axis is the last.
    points = points[:, :, [0, 2, 1]]
    points -= (points.min(1, keepdims=True) + points.max(1, keepdims=True)) / 2
    return points / np.linalg.norm(points, axis=2).max(1)[:, None, None], data["shapes"]


def shape_worlds(n: int = 5000, steps: int = STEPS) -> list[World]:
    """Made shapes with captions and, where the data set is there, real models with their names.

    One point network sees all clouds, without captions; the text encoder saw none of the texts.
    """
    made = procedural_shapes(n)
    real = real_shapes() if is_available("named_shapes") else None
    model = point_network(made.points if real is None else np.concatenate([made.points, real[0]]), steps)
    encoder = SentenceEncoder(*load_sentence_encoder())

    def world(name: str, points: Any, texts: Sequence[str], keys: Sequence[str], *rest: Any) -> World:
        shapes, words = _shape_features(model, points), text_features(texts, encoder, repeated=True)
        n_queries, anchors, labels = rest
        return World(name, shapes, words, np.array(keys), n_queries, anchors, points, tuple(labels))

    sizes = (500, 1000, 2000, 4000)
    worlds = [world("made shapes and captions", made.points, made.captions, made.captions, 200, sizes, made.families)]
    if real is not None:
        points, records = real
        names, groups = ([record[key] for record in records] for key in ("name", "group"))
        texts = [f"a {name} ({group})" for name, group in zip(names, groups)]
        worlds.append(world("real models and names", points, texts, names, 150, (200, 400, 600), groups))
    return worlds
