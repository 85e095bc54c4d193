"""Shapes as points on their surfaces, made by rule: families with continuous parameters, and a caption of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Rng = np.random.Generator
Piece = tuple[np.ndarray, float]
"""A surface as points that are uniform on it, and its area; pieces are drawn in proportion to their areas."""

_DENSE = 512


@dataclass(frozen=True)
class Shapes:
    """Point clouds in the unit ball, with the family and a caption of each.

    Attributes
    ----------
    points
        (n, m, 3).
    families, captions
        One a cloud.
    """

    points: Float[np.ndarray, "n m 3"]
    families: tuple[str, ...]
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.points)


def procedural_shapes(n: int, *, points: int = 1024, random_state: int = 0) -> Shapes:
    """Draw shapes as point clouds, evenly from their families: each with its parameters, a turn about z and a caption.

    Captions name the family and its proportions in words ("a very tall table with a round top and four legs").

    Parameters
    ----------
    n
        Number of shapes.
    points
        Points of each.
    random_state
        Of all that is drawn.

    Returns
    -------
    Shapes

    Raises
    ------
    ValueError
        For n or points below 1.

    Examples
    --------
    >>> from subspan.datasets import procedural_shapes
    >>> shapes = procedural_shapes(4, points=64)
    >>> shapes.points.shape, len(shapes.captions)
    ((4, 64, 3), 4)
    """
    if n < 1 or points < 1:
        raise ValueError(f"n, points: at least 1, got {n} and {points}")
    generator = np.random.default_rng(random_state)
    names = list(FAMILIES)
    clouds, families, captions = np.empty((n, points, 3), np.float32), [], []
    for row in range(n):
        name = names[int(generator.integers(len(names)))]
        pieces, caption = FAMILIES[name](generator)
        clouds[row] = _on_surface(pieces, points, generator)
        families.append(name)
        captions.append(caption.replace("a open", "an open").replace("a elongated", "an elongated"))
    return Shapes(clouds, tuple(families), tuple(captions))


def _on_surface(pieces: list[Piece], points: int, generator: Rng) -> np.ndarray:
    areas = np.array([area for _, area in pieces])
    counts = generator.multinomial(points, areas / areas.sum())
    drawn = [cloud[generator.integers(len(cloud), size=count)] for (cloud, _), count in zip(pieces, counts)]
    cloud = np.concatenate(drawn)
    angle = generator.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    cloud = (cloud - (cloud.min(0) + cloud.max(0)) / 2) @ turn.T
    return (cloud / np.linalg.norm(cloud, axis=1).max())[generator.permutation(points)]


# ---------------------------------------------------------------------- surfaces


def _box(g: Rng, size: tuple[float, float, float], at: tuple[float, float, float] = (0, 0, 0)) -> Piece:
    """A box with its lowest face centred at `at`."""
    a, b, c = size
    areas = np.array([b * c, a * c, a * b])
    axis = g.choice(3, size=_DENSE, p=areas / areas.sum())
    cloud = g.uniform(-0.5, 0.5, (_DENSE, 3))
    cloud[np.arange(_DENSE), axis] = g.choice([-0.5, 0.5], size=_DENSE)
    return cloud * size + np.array(at) + [0, 0, c / 2], 2 * float(areas.sum())


def _tube(g: Rng, low: float, high: float, height: float, at: tuple[float, float, float] = (0, 0, 0)) -> Piece:
    """The mantle of a truncated cone with radii `low` and `high`, standing at `at`."""
    slant = np.hypot(height, low - high)
    share = g.uniform(size=_DENSE)
    # Area grows with the radius, so the height is drawn by the inverse of its square-root law.
    t = share if np.isclose(low, high) else (np.sqrt(low**2 + share * (high**2 - low**2)) - low) / (high - low)
    angle, radius = g.uniform(0, 2 * np.pi, _DENSE), low + t * (high - low)
    cloud = np.stack([radius * np.cos(angle), radius * np.sin(angle), t * height], 1)
    return cloud + np.array(at), float(np.pi * (low + high) * slant)


def _disc(g: Rng, radius: float, at: tuple[float, float, float] = (0, 0, 0), inner: float = 0.0) -> Piece:
    r, angle = np.sqrt(g.uniform(inner**2, radius**2, _DENSE)), g.uniform(0, 2 * np.pi, _DENSE)
    cloud = np.stack([r * np.cos(angle), r * np.sin(angle), np.zeros(_DENSE)], 1)
    return cloud + np.array(at), float(np.pi * (radius**2 - inner**2))


def _ball(g: Rng, axes: tuple[float, float, float], at: tuple[float, float, float] = (0, 0, 0)) -> Piece:
    """An ellipsoid about `at`."""
    cloud = g.standard_normal((4 * _DENSE, 3))
    cloud /= np.linalg.norm(cloud, axis=1, keepdims=True)
    stretch = np.linalg.norm(cloud / axes, axis=1)
    kept = g.uniform(0, stretch.max(), len(cloud)) < stretch
    a, b, c = (axis**1.6 for axis in axes)
    return cloud[kept][:_DENSE] * axes + np.array(at), float(4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6))


def _ring(g: Rng, radius: float, thick: float, at: tuple[float, float, float] = (0, 0, 0), arc: float = 1.0) -> Piece:
    """A torus about the z axis, or the share `arc` of it."""
    turn, around = g.uniform(0, 2 * np.pi * arc, 4 * _DENSE), g.uniform(0, 2 * np.pi, 4 * _DENSE)
    kept = g.uniform(0, radius + thick, 4 * _DENSE) < radius + thick * np.cos(around)
    turn, around = turn[kept][:_DENSE], around[kept][:_DENSE]
    r = radius + thick * np.cos(around)
    cloud = np.stack([r * np.cos(turn), r * np.sin(turn), thick * np.sin(around)], 1)
    return cloud + np.array(at), float(4 * np.pi**2 * radius * thick * arc)


def _upright(piece: Piece, at: tuple[float, float, float]) -> Piece:
    """What lies about the z axis, stood up about the y axis and moved."""
    return piece[0][:, [0, 2, 1]] + np.array(at), piece[1]


def _word(value: float, low: float, high: float, words: tuple[str, str, str], *, graded: bool = True) -> str:
    """The word for the lower, middle or upper part of a range; graded: "very" at its two ends."""
    fifth = min(4, max(0, int(5 * (value - low) / (high - low))))
    word = words[(0, 0, 1, 2, 2)[fifth]]
    return f"very {word}" if graded and fifth in (0, 4) else word


def _says(*words: str) -> str:
    return " ".join(word for word in words if word)


# ---------------------------------------------------------------------- families


def _a_box(g: Rng) -> tuple[list[Piece], str]:
    a, h = g.uniform(0.4, 1.6), g.uniform(0.2, 2)
    shape = _word(a, 0.4, 1.6, ("narrow", "", "wide")), _word(h, 0.2, 2, ("flat", "", "tall"))
    return [_box(g, (a, 1, h))], _says("a", *shape, "box")


def _cone(g: Rng) -> tuple[list[Piece], str]:
    h, top = g.uniform(0.6, 3), g.uniform(0, 0.5)
    tip = _word(top, 0, 0.5, ("pointed tip", "blunt tip", "broad tip"))
    pieces = [_tube(g, 1, top, h), _disc(g, 1), _disc(g, top, (0, 0, h))]
    return pieces, _says("a", _word(h, 0.6, 3, ("low", "", "steep")), "cone with a", tip)


def _cylinder(g: Rng) -> tuple[list[Piece], str]:
    h, open_top = g.uniform(0.3, 5), bool(g.integers(2))
    pieces = [_tube(g, 1, 1, h), _disc(g, 1)] + ([] if open_top else [_disc(g, 1, (0, 0, h))])
    shape = _word(h, 0.3, 5, ("short", "", "long"))
    return pieces, _says("a", shape, "open pipe closed at the bottom" if open_top else "solid cylinder")


def _sphere(g: Rng) -> tuple[list[Piece], str]:
    h = g.uniform(0.4, 1.8)
    return [_ball(g, (1, 1, h))], _says("a", _word(h, 0.4, 1.8, ("flat", "round", "elongated")), "ball")


def _torus(g: Rng) -> tuple[list[Piece], str]:
    thick = g.uniform(0.08, 0.5)
    return [_ring(g, 1, thick)], _says("a", _word(thick, 0.08, 0.5, ("thin ring", "ring", "thick doughnut")))


def _pyramid(g: Rng) -> tuple[list[Piece], str]:
    h, steps = g.uniform(0.6, 2.4), int(g.integers(3, 9))
    pieces = [
        _box(g, (2 * (1 - i / steps), 2 * (1 - i / steps), h / steps), (0, 0, i * h / steps)) for i in range(steps)
    ]
    return pieces, _says(
        "a", _word(h, 0.6, 2.4, ("low", "", "high")), "step pyramid with", ("few" if steps < 6 else "many"), "terraces"
    )


def _table(g: Rng) -> tuple[list[Piece], str]:
    h, long, is_round, column = g.uniform(0.5, 1.8), g.uniform(1, 2.5), bool(g.integers(2)), bool(g.integers(2))
    thick = 0.08
    if is_round:
        pieces = [_disc(g, 1, (0, 0, h)), _disc(g, 1, (0, 0, h + thick)), _tube(g, 1, 1, thick, (0, 0, h))]
        place = [(x, y) for x in (-0.6, 0.6) for y in (-0.6, 0.6)]
    else:
        pieces = [_box(g, (long, 1, thick), (0, 0, h))]
        place = [(x, y) for x in (0.08 - long / 2, long / 2 - 0.08) for y in (-0.42, 0.42)]
    if column:
        pieces += [_tube(g, 0.12, 0.12, h), _disc(g, 0.5)]
    else:
        pieces += [_box(g, (0.1, 0.1, h), (x, y, 0)) for x, y in place]
    top = "round" if is_round else _word(long, 1, 2.5, ("square", "rectangular", "long rectangular"), graded=False)
    legs = "one central column" if column else "four legs"
    return pieces, _says("a", _word(h, 0.5, 1.8, ("low", "", "tall")), "table with a", top, "top and", legs)


def _chair(g: Rng) -> tuple[list[Piece], str]:
    seat, back, arms = g.uniform(0.5, 1.3), g.uniform(0.3, 1.5), bool(g.integers(2))
    pieces = [_box(g, (1, 1, 0.1), (0, 0, seat)), _box(g, (0.1, 1, back), (-0.45, 0, seat + 0.1))]
    pieces += [_box(g, (0.1, 0.1, seat), (x, y, 0)) for x in (-0.42, 0.42) for y in (-0.42, 0.42)]
    if arms:
        pieces += [_box(g, (0.9, 0.08, 0.08), (0, y, seat + 0.35)) for y in (-0.45, 0.45)]
        pieces += [_box(g, (0.08, 0.08, 0.3), (0.4, y, seat + 0.1)) for y in (-0.45, 0.45)]
    height, support = _word(seat, 0.5, 1.3, ("low", "", "high")), _word(back, 0.3, 1.5, ("short", "", "tall"))
    kind = "armchair" if arms else "chair"
    return pieces, _says("a", height, kind, "with a", support, "back")


def _mug(g: Rng) -> tuple[list[Piece], str]:
    h, flare = g.uniform(0.9, 3), g.uniform(0.7, 1.3)
    handle = _upright(_ring(g, 0.3 * h, 0.08), (0.5 + flare / 2 + 0.1, 0, h / 2))
    pieces = [_tube(g, 1, flare, h), _disc(g, 1), handle]
    shape = _word(flare, 0.7, 1.3, ("narrow rim", "straight rim", "wide rim"))
    return pieces, _says("a", _word(h, 0.9, 3, ("squat", "", "tall")), "mug with a handle and a", shape)


def _stairs(g: Rng) -> tuple[list[Piece], str]:
    steps, rise, wide = int(g.integers(3, 12)), g.uniform(0.5, 1.6), g.uniform(0.5, 2)
    run = 2 / steps
    pieces = [_box(g, (run, wide, rise * run * (i + 1)), (i * run, 0, 0)) for i in range(steps)]
    return pieces, _says(
        "a",
        _word(rise, 0.5, 1.6, ("gentle", "", "steep")),
        _word(wide, 0.5, 2, ("narrow", "", "wide")),
        "staircase with",
        _word(steps, 3, 12, ("few", "several", "many")),
        "steps",
    )


def _lamp(g: Rng) -> tuple[list[Piece], str]:
    h, shade = g.uniform(0.8, 4), g.uniform(0.5, 1.2)
    pieces = [_disc(g, 0.6), _tube(g, 0.06, 0.06, h), _tube(g, shade, 0.35 * shade, 0.7, (0, 0, h))]
    kind = _word(h, 0.8, 4, ("table lamp", "lamp", "floor lamp"), graded=False)
    return pieces, _says("a", kind, "with a", _word(shade, 0.5, 1.2, ("small", "medium", "wide")), "shade")


def _bottle(g: Rng) -> tuple[list[Piece], str]:
    body, neck, thin = g.uniform(1, 3), g.uniform(0.3, 1.5), g.uniform(0.15, 0.5)
    pieces = [
        _disc(g, 0.8),
        _tube(g, 0.8, 0.8, body),
        _tube(g, 0.8, thin, 0.4, (0, 0, body)),
        _tube(g, thin, thin, neck, (0, 0, body + 0.4)),
    ]
    size, part = _word(body, 1, 3, ("squat", "", "slender")), _word(neck, 0.3, 1.5, ("short", "", "long"))
    return pieces, _says("a", size, "bottle with a", part, _word(thin, 0.15, 0.5, ("thin", "", "wide")), "neck")


def _bed(g: Rng) -> tuple[list[Piece], str]:
    wide, head = g.uniform(0.8, 2), g.uniform(0.3, 1.4)
    pieces = [_box(g, (2, wide, 0.3), (0, 0, 0.3)), _box(g, (0.08, wide, head), (-1, 0, 0.3))]
    pieces += [_box(g, (0.1, 0.1, 0.3), (x, y * wide, 0)) for x in (-0.9, 0.9) for y in (-0.45, 0.45)]
    kind = _word(wide, 0.8, 2, ("single", "", "double"), graded=False)
    return pieces, _says("a", kind, "bed with a", _word(head, 0.3, 1.4, ("low", "", "high")), "headboard")


def _shelf(g: Rng) -> tuple[list[Piece], str]:
    boards, h, wide = int(g.integers(2, 7)), g.uniform(1, 3), g.uniform(0.6, 2)
    pieces = [_box(g, (0.5, wide, 0.06), (0, 0, i * h / boards)) for i in range(boards + 1)]
    pieces += [_box(g, (0.5, 0.06, h), (0, y * wide, 0)) for y in (-0.5, 0.5)]
    return pieces, _says(
        "a",
        _word(h, 1, 3, ("low", "", "tall")),
        _word(wide, 0.6, 2, ("narrow", "", "wide")),
        "bookshelf with",
        ("few" if boards < 4 else "many"),
        "boards",
    )


def _barbell(g: Rng) -> tuple[list[Piece], str]:
    bar, radius = g.uniform(0.8, 4), g.uniform(0.3, 0.8)
    pieces = [
        _tube(g, 0.1, 0.1, bar),
        _ball(g, (radius, radius, radius), (0, 0, 0)),
        _ball(g, (radius, radius, radius), (0, 0, bar)),
    ]
    pieces = [(cloud[:, [2, 1, 0]], area) for cloud, area in pieces]
    length, size = _word(bar, 0.8, 4, ("short", "", "long")), _word(radius, 0.3, 0.8, ("small", "", "large"))
    return pieces, _says("a", length, "dumbbell with", size, "weights")


def _mushroom(g: Rng) -> tuple[list[Piece], str]:
    stem, cap = g.uniform(0.5, 2.5), g.uniform(0.5, 1.3)
    ball, area = _ball(g, (cap, cap, 0.6 * cap))
    dome = ball[ball[:, 2] > 0] + [0, 0, stem]
    pieces = [_tube(g, 0.25, 0.2, stem), (dome, area / 2), _disc(g, cap, (0, 0, stem))]
    return pieces, _says(
        "a", _word(stem, 0.5, 2.5, ("short", "", "tall")), "mushroom with a",
        _word(cap, 0.5, 1.3, ("small", "", "broad")), "cap",
    )  # fmt: skip


FAMILIES: dict[str, Callable[[Rng], tuple[list[Piece], str]]] = {
    "box": _a_box,
    "cone": _cone,
    "cylinder": _cylinder,
    "ball": _sphere,
    "ring": _torus,
    "pyramid": _pyramid,
    "table": _table,
    "chair": _chair,
    "mug": _mug,
    "stairs": _stairs,
    "lamp": _lamp,
    "bottle": _bottle,
    "bed": _bed,
    "bookshelf": _shelf,
    "dumbbell": _barbell,
    "mushroom": _mushroom,
}
"""Name → a drawn shape of the family and its caption."""
