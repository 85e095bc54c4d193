"""Verdicts on planted subspaces, and models that are the same afterwards."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from subspan.models import write_weights
from subspan.probe import SubspaceAudit

D, K = 32, 8


def planted(kinds, *, share=1.0, rank=K, seed=0):
    """A reference update of some rank, and behaviours as coordinates of the output whose updates lie in it or not.

    kinds: behaviour → "inside", "outside" or "random"; share: of its energy that lies there; the rest lies elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(normal(D, D))[0]
    model = nn.Linear(D, D)
    own = torch.Generator().manual_seed(seed + 100)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -(D**-0.5), D**-0.5, generator=own)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    base = {
        "weight": before["weight"] - (basis[:, :rank] * torch.linspace(3, 1, rank)) @ normal(rank, D),
        "bias": before["bias"],
    }
    prompts = torch.rand(60, D, generator=generator) + 0.1
    inside, outside = (torch.linalg.qr(basis[:, part] @ normal(K, K))[0] for part in (slice(K), slice(D - K, D)))
    updates, metrics = {}, {}
    for number, (behaviour, where) in enumerate(kinds.items()):
        pair = {"inside": (inside, outside), "outside": (outside, inside)}
        main, rest = pair.get(where, (torch.linalg.qr(normal(D, K))[0],) * 2)
        direction = share**0.5 * main[:, number] + (1 - share) ** 0.5 * rest[:, number]
        direction = direction / direction.norm()
        updates[behaviour] = direction[:, None] @ torch.ones(1, D) / D

        def read(found, direction=direction):
            return (found(prompts) @ direction).detach()

        metrics[behaviour] = read
    return model, base, before, updates, metrics


def growing(counts=tuple(range(1, 9))):
    """A metric that gives one number more each time."""
    left = iter(counts)
    return lambda _: np.zeros(next(left))


def moved(before, *updates):
    return before | {"weight": before["weight"] + sum(updates)}


CASES = {
    "one inside, one outside": ({"safe": "inside", "useful": "outside"}, 1.0, "specific"),
    "three, of which one inside": ({"a": "outside", "b": "inside", "c": "outside"}, 1.0, "specific"),
    "mostly": ({"safe": "inside", "useful": "outside"}, 0.8, "specific"),
    "both inside": ({"safe": "inside", "useful": "inside"}, 1.0, "not specific"),
    "both half inside": ({"safe": "inside", "useful": "outside"}, 0.5, "not specific"),
    "both outside": ({"safe": "outside", "useful": "outside"}, 1.0, "not specific"),
}


@pytest.mark.parametrize("together", [True, False], ids=["one model", "a model each"])
@pytest.mark.parametrize("case", CASES)
def test_planted_subspaces_are_judged(case, together):
    kinds, share, expected = CASES[case]
    model, base, before, updates, metrics = planted(kinds, share=share)
    tuned = {"mixed": moved(before, *updates.values())}
    if not together:
        tuned = {name: moved(before, update) for name, update in updates.items()}
    report = SubspaceAudit(metrics, fractions=[0.25, 0.5]).run(base, model, tuned)
    assert report.verdict == expected, report.reason
    assert str(report).startswith(f"{expected}: ")
    curves = report.curves()
    for behaviour, where in kinds.items():
        # A reading along the update is its share of the energy; random subspaces keep k / d of it.
        part = share if where == "inside" else 1 - share
        assert curves[behaviour]["topk"][0.25] == pytest.approx(part, abs=1e-4)
        assert curves[behaviour]["random"][0.25] == pytest.approx(K / D, abs=0.2)
    best = max((row for row in report.selectivities if row.control == "random"), key=lambda row: row.estimate)
    if expected == "specific":
        assert kinds[best.behaviour] == "inside"
        assert f"{best.behaviour!r}" in report.reason


def test_selectivity_is_made_of_the_readings():
    model, base, before, updates, metrics = planted({"a": "inside", "b": "outside", "c": "random"})
    report = SubspaceAudit(metrics, fractions=[0.25], n_random=2).run(
        base, model, {"x": moved(before, *updates.values())}
    )
    start, end = ({row.behaviour: getattr(row, which) for row in report.changes} for which in ("aligned", "full"))
    share = {}
    for row in report.readings:
        kept = (row.score - start[row.behaviour]) / (end[row.behaviour] - start[row.behaviour])
        assert row.carried == pytest.approx(kept if row.mode == "same" else 1 - kept)
        share.setdefault((row.behaviour, row.kind), []).append(row.carried)
    assert {kind: len(values) for (_, kind), values in share.items()} == {
        "topk": 2, "randomk": 4, "random": 4, "scaled": 2,
    }  # fmt: skip
    for row in report.selectivities:
        more = {}
        for kind in ("topk", row.control):
            others = [np.mean(share[each, kind]) for each in metrics if each != row.behaviour]
            more[kind] = np.mean(share[row.behaviour, kind]) - np.mean(others)
        assert row.estimate == pytest.approx(more["topk"] - more[row.control], abs=1e-6)
        assert row.low <= row.estimate + 1e-9
        assert row.high >= row.estimate - 1e-9
    # Its own span, drawn anew: nothing is left beside it.
    assert all(abs(row.estimate) < 1e-5 for row in report.selectivities if row.control == "randomk")
    assert report.verdict == "specific"


def between(model, update, metric):
    """Share of the way from a model to the one with the update that a reading has gone, as a function of a model."""
    full = copy.deepcopy(model)
    full.weight.data += update
    start, end = (float(metric(each).mean()) for each in (model, full))
    return lambda found: (float(metric(found).mean()) - start) / (end - start)


def test_a_behaviour_that_needs_less_of_an_update_is_not_taken_for_a_specific_one():
    model, base, before, updates, metrics = planted({"a": "inside", "b": "inside"}, share=0.5)
    way = between(model, updates["a"], metrics["a"])
    both = metrics | {"a": lambda found: float(way(found) > 0.45)}
    found = {}
    for controls in (("random",), ("random", "scaled")):
        audit = SubspaceAudit(both, [0.25], controls, ("same",), random_state=3)
        found[controls] = audit.run(base, model, {"x": moved(before, *updates.values())}).verdict
    assert found == {("random",): "specific", ("random", "scaled"): "not specific"}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_same_to_the_bit(tmp_path, dtype, fails):
    model, base, before, updates, _ = planted({"safe": "inside", "useful": "outside"})
    for name, weights in (("base", base), ("tuned", moved(before, *updates.values()))):
        write_weights({key: value.to(dtype) for key, value in weights.items()}, tmp_path / name)
    model = model.to(dtype)
    kept = {name: (value.detach().clone(), value.data_ptr()) for name, value in model.named_parameters()}
    reads = []

    def safe(found):
        reads.append(float(found.weight.detach().float().norm()))
        found.bias.data.zero_()
        if fails and len(reads) == 4:
            raise RuntimeError("out of tokens")
        return reads[-1]

    def whole(found):
        # Moved by far more than rounding, which a sum of both signs is not.
        return float(found.weight.detach().double().square().sum())

    audit = SubspaceAudit({"safe": whole, "useful": lambda found: safe(found) + whole(found)}, [0.25], ["scaled"])
    model.bias.data.zero_()
    with pytest.raises(RuntimeError, match="out of tokens") if fails else contextlib.nullcontext():
        audit.run(tmp_path / "base", model, {"x": tmp_path / "tuned"})
    assert len(reads) == (4 if fails else 6)
    assert len(set(reads)) > 1  # in half precision some are alike
    for name, value in model.named_parameters():
        assert torch.equal(value, torch.zeros_like(value) if name == "bias" else kept[name][0])
        assert value.data_ptr() == kept[name][1]


def test_without_evidence_nothing_is_claimed():
    model, base, before, updates, metrics = planted({"safe": "inside", "useful": "outside"}, share=0.8)
    alone = SubspaceAudit(metrics, [0.25]).run(base, model, {"x": moved(before, updates["safe"])})
    assert alone.verdict == "no evidence"
    assert "only 'safe'" in alone.reason
    assert {row.behaviour: row.moved for row in alone.changes} == {"safe": True, "useful": False}
    noise = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))

    def noisy(number, name):
        """Prompts that differ half of the way only."""
        way = between(model, updates[name], metrics[name])
        return lambda found: metrics[name](found) + 40 * way(found) * (1 - way(found)) * noise[number]

    tuned = {"x": moved(before, *updates.values())}
    loud = {name: noisy(number, name) for number, name in enumerate(metrics)}
    report = SubspaceAudit(loud, [0.25], modes=["same"]).run(base, model, tuned)
    assert report.verdict == "no evidence"
    assert "not excluded" in report.reason
    assert all(row.moved for row in report.changes)
    assert SubspaceAudit(metrics, [0.25]).run(base, model, tuned).verdict == "specific"


def test_numbers_alone_and_frames():
    pandas = pytest.importorskip("pandas")
    model, base, before, updates, metrics = planted({"safe": "inside", "useful": "outside"})
    single = {name: lambda found, name=name: float(metrics[name](found).mean()) for name in metrics}
    told = []
    report = SubspaceAudit(single, [0.25], ["random"]).run(
        base, model, {"x": moved(before, *updates.values())}, progress=lambda said, share: told.append(share)
    )
    assert report.verdict == "specific"
    assert told == sorted(told)
    frame = pandas.DataFrame(report.columns())
    assert len(frame) == 2 * 2 * 4
    assert frame.query("kind == 'topk' and mode == 'same'").energy_kept.tolist() == pytest.approx([0.5, 0.5], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fractions": [0.0]}, "fractions: expected"),
        ({"fractions": []}, "fractions: at least one"),
        ({"fractions": [0.5, 0.5]}, "each once"),
        ({"controls": ["randomk"]}, "controls: 'random' or 'scaled'"),
        ({"controls": ["none"]}, "controls: expected"),
        ({"modes": ["other"]}, "modes: expected"),
        ({"n_random": 0}, "n_random"),
        ({"level": 1.0}, "level"),
        ({"metrics": {"safe": len}}, "metrics: two"),
        ({"metrics": {"a": lambda m: math.nan, "b": lambda m: 0.0}}, "'a' must give a finite"),
        ({"metrics": {"a": lambda m: [[1.0]], "b": lambda m: 0.0}}, "'a' must give a finite"),
        ({"metrics": {"a": growing(), "b": lambda m: 0.0}}, "gave 1 numbers"),
        ({"tuned": {}}, "tuned: at least one"),
        ({"tuned": {"x": None}}, "tuned: 'x' is the aligned"),
        ({"base": None}, "aligned: is the base"),
        ({"base": {"weight": torch.zeros(2, 2), "bias": torch.zeros(D)}}, "of other shapes: weight"),
    ],
)
def test_bad_input_is_named(options, said):
    model, base, before, updates, metrics = planted({"safe": "inside", "useful": "outside"})
    sources = {"base": base, "tuned": {"x": moved(before, *updates.values())}}
    given = {name: options.pop(name) for name in list(options) if name in sources}
    if given.get("base", base) is None:
        given["base"] = before
    if given.get("tuned") == {"x": None}:
        given["tuned"] = {"x": before}
    sources |= given
    with pytest.raises(ValueError, match=said):
        SubspaceAudit(**{"metrics": metrics} | options).run(sources["base"], model, sources["tuned"])
