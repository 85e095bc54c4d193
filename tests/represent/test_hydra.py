"""Gates of pairs of classes, and the loss that they are trained with."""

import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from subspan.edit import SpectralSteering
from subspan.geometry import CoordinateSubspace
from subspan.represent import (
    ArbitraryPairLoss,
    HydraProjector,
    HydraTraining,
    NearbyPartners,
    PairGate,
    pair_masks,
    sign_agreement_gate,
)
from subspan.represent.hydra import drawn_partners

SMALL = {"embed_dim": 8, "hidden": 16}
OPEN = PairGate(4, 3, kind="open")


# ---------------------------------------------------------------------- the gate


@pytest.mark.parametrize("kind", ["sigmoid", "gumbel", "stochastic", "open"])
@pytest.mark.parametrize("fuse", ["mean", "product"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_a_gate_is_symmetric_and_within_bounds(kind, fuse, norm):
    gate = PairGate(5, 6, kind=kind, fuse=fuse, norm=norm, **SMALL)
    a, b = torch.arange(5), torch.tensor([3, 3, 0, 1, 2])
    drawn = gate(a, b)
    assert drawn.shape == (5, 6)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    gate.eval()
    torch.testing.assert_close(gate(a, b), gate(b, a))
    torch.testing.assert_close(gate(a[:1], b[:1]), gate(a, b)[:1])
    if kind != "open" and fuse == "product":
        own = PairGate.forward(gate, a, a)
        assert not torch.allclose(own, gate(a, b))


def test_gates_are_read_as_subspaces_and_relations():
    gate = PairGate(5, 6, **SMALL).train()
    gate(torch.arange(4), torch.arange(4))
    soft = gate.soft_subspace([0, 1], [2, 3])
    assert gate.training  # the mode is put back
    found = gate.subspace(0, 2, top_k=2)
    assert isinstance(found, CoordinateSubspace)
    assert found.indices.tolist() == sorted(soft.weights[0].topk(2).indices.tolist())
    with pytest.raises(ValueError, match=re.escape("second: the gate was not trained on classes [4]")):
        gate.subspace(0, 4)
    gate(torch.arange(5), torch.arange(5))
    weights = [[gate.soft_subspace(a, b).weights for b in range(5)] for a in range(5)]
    for metric in ("overlap", "open"):
        relations = gate.relations(metric)
        torch.testing.assert_close(relations, relations.mT)
        g, own, other = weights[1][3], weights[1][1], weights[3][3]
        wanted = g.mean() if metric == "open" else (own * other * g).sum() / g.sum()
        torch.testing.assert_close(relations[1, 3], wanted)


def test_signs_of_a_classifier_make_gates():
    weight = torch.randn(4, 9)
    gates = sign_agreement_gate(weight, torch.tensor([0, 2]), torch.tensor([1, 2]))
    assert gates[0].tolist() == (weight[0].sign() == weight[1].sign()).float().tolist()
    assert gates[1].eq(1).all()
    with pytest.raises(ValueError, match=re.escape("second: classes must lie in [0, 3]")):
        sign_agreement_gate(weight, torch.tensor([0]), torch.tensor([4]))


# ---------------------------------------------------------------------- the loss


def test_masks_leave_the_own_class_out():
    labels, partners = torch.tensor([0, 1, 0]), torch.tensor([1, 1, 0])
    positives, excluded = pair_masks(labels, partners, labels, same_rows=True)
    assert positives.int().tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert excluded.int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert not (positives & excluded).any()


def test_open_gates_and_own_classes_are_supervised_contrast():
    z1, z2, labels = torch.randn(8, 3), torch.randn(8, 3), torch.arange(8) % 4
    found, log = ArbitraryPairLoss(OPEN, pairing="identical", temperature=0.5)(z1, z2, labels)

    def direct(z, k):
        logits = F.normalize(z) @ F.normalize(k).mT / 0.5
        terms = []
        for b in range(8):
            others = logits[b, labels != labels[b]].exp().sum()
            terms += [-(logits[b, n] - (logits[b, n].exp() + others).log()) for n in range(8) if labels[n] == labels[b]]
        return torch.stack(terms).mean()

    torch.testing.assert_close(found, (direct(z1, z2) + direct(z2, z1)) / 2)
    assert float(log["open_gates"]) == 1


def test_four_samples_by_hand():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    loss = ArbitraryPairLoss(
        PairGate(4, 2, kind="open"), temperature=1.0, pair_sampler=lambda labels: torch.tensor([1, 0, 3, 2])
    )
    # Cosine 0 to the one positive; of the two negatives one has cosine 1 and the other 0.
    assert float(loss(z, None, torch.arange(4))[0]) == pytest.approx(math.log(2 + math.e))


def test_keys_of_the_own_class_change_nothing():
    labels = torch.tensor([0, 0, 1, 2, 3])
    # Class 0 alone has positives: the one of class 1.
    loss = ArbitraryPairLoss(PairGate(5, 3, kind="open"), pair_sampler=lambda labels: torch.where(labels == 0, 1, 4))
    z = torch.randn(5, 3)
    plain, log = loss(z, None, labels)
    moved = z.clone()
    moved[0] = z[1]
    # Of the anchors 0 and 1, now alike, each has what anchor 1 had before, and one another do not count.
    alone = loss(z[1:], None, labels[1:])[0]
    torch.testing.assert_close(loss(moved, None, labels)[0], alone)
    assert not torch.isclose(plain, alone)
    assert float(log["own_cosine"]) == pytest.approx(float(F.cosine_similarity(z[:1], z[1:2])), abs=1e-6)


def test_without_positives_or_negatives_there_is_a_loss_of_zero_with_a_graph():
    z = torch.randn(3, 3, requires_grad=True)
    alone = ArbitraryPairLoss(OPEN, pairing="identical")(z, None, torch.arange(3))[0]
    two = ArbitraryPairLoss(OPEN, pair_sampler=lambda labels: 1 - labels)(z[:2], None, torch.arange(2))[0]
    for found in (alone, two):
        assert float(found.detach()) == 0
        assert torch.autograd.grad(found, z)[0].eq(0).all()


def test_partners():
    labels = torch.arange(60) % 3
    assert drawn_partners(labels, "identical").equal(labels)
    assert drawn_partners(labels, "arbitrary").sort().values.equal(labels.sort().values)
    distinct = drawn_partners(labels, "distinct")
    assert not (distinct == labels).any()
    assert all(len(distinct[labels == c].unique()) == 2 for c in range(3))
    far = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [5.0, 5.0, 0.0]])
    near = torch.cat([NearbyPartners(far, power=8)(labels) for _ in range(20)])
    own = (near.reshape(20, -1) == labels).double().mean()
    assert 0.98 < float(own) < 1
    assert set(NearbyPartners(far, largest=1)(labels)[labels == 2].tolist()) == {2}


def test_a_binary_penalty_is_added():
    gate = PairGate(4, 3, **SMALL).eval()
    z, labels = torch.randn(8, 3), torch.arange(8) % 4
    plain, heavy = (
        ArbitraryPairLoss(gate, pairing="identical", binary_penalty=weight)(z, None, labels)[0] for weight in (0, 2)
    )
    g = gate(labels, labels)
    torch.testing.assert_close(heavy - plain, 2 * (g * (1 - g)).mean())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: ArbitraryPairLoss(OPEN, temperature=0), "temperature: must be positive"),
        (lambda: ArbitraryPairLoss(OPEN, binary_penalty=-1), "binary_penalty: must be 0 or more"),
        (lambda: ArbitraryPairLoss(OPEN)(torch.ones(2, 4), None, torch.arange(2)), "of 3 coordinates, got 4"),
        (lambda: ArbitraryPairLoss(OPEN)(torch.ones(2, 3), None, torch.zeros(2).long()), "at least 2 classes"),
        (lambda: PairGate(4, 3)(torch.tensor([4]), torch.tensor([0])), r"first: classes must lie in \[0, 3\], got 4"),
        (lambda: PairGate(0, 3), "n_classes: must be at least 1"),
        (lambda: NearbyPartners(-torch.ones(2, 2)), "distances: expected"),
    ],
)
def test_what_makes_no_sense_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# ---------------------------------------------------------------------- training


def planted(classes=5, each=20):
    """Embeddings with two coordinates for every two classes, on which their samples agree and no others do."""
    pairs = torch.combinations(torch.arange(classes)).tolist()
    labels = torch.arange(classes).repeat(each)
    z = 4 * torch.randn(len(labels), 2 * len(pairs)).sign()
    shared = {}
    for block, (a, b) in enumerate(pairs):
        shared[a, b] = CoordinateSubspace.of([2 * block, 2 * block + 1], z.shape[1])
        z[(labels == a) | (labels == b), 2 * block : 2 * block + 2] = torch.tensor([4.0, -4.0])
    return z + 0.3 * torch.randn_like(z), labels, shared


def test_trained_gates_open_what_two_classes_share():
    z, labels, shared = planted()
    gate = PairGate(5, z.shape[1], norm="layer", embed_dim=32, hidden=32)
    loss = ArbitraryPairLoss(gate, pairing="distinct")
    optimizer = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss(z, None, labels)[0].backward()
        optimizer.step()
    for (a, b), wanted in shared.items():
        weights = gate.soft_subspace(a, b).weights
        # The cosine does not see how open all gates are together: their ratio is what is learnt.
        assert float(weights[wanted.mask].mean()) > 5 * float(weights[~wanted.mask].mean())
        assert float(gate.subspace(a, b, top_k=2).overlap(wanted)) == 1


def blobs(n=120, d=10, classes=4):
    generator = np.random.default_rng(0)
    y = np.arange(n) % classes
    return generator.normal(size=(n, d)) + 3 * np.random.default_rng(1).normal(size=(classes, d))[y], y


def test_a_projector_for_embeddings():
    pytest.importorskip("lightning")
    x, y = blobs()
    names = np.array(["a", "b", "c", "d"])[y]
    small = {"features": 24, "hidden": 24, "embed_dim": 16, "gate_hidden": 32, "random_state": 0}
    model = HydraProjector(12, epochs=6, batch_size=40, learning_rate=3e-3, **small).fit(x, names)
    assert model.losses_[-1] < 0.85 * model.losses_[0]
    assert model.relations_.shape == (4, 4)
    assert all(each.ambient_dim == 12 for each in model.subspaces_)
    assert model.features_of(x).shape == (120, 24)
    shared = model.pair_subspace("a", "c", top_k=5)
    # What another room does with it: prototypes of the classes are steered in the coordinates of the two alone.
    z = torch.from_numpy(model.transform(x)).float()
    means = torch.stack([z[torch.from_numpy(y) == c].mean(0) for c in range(4)])
    steering = SpectralSteering(means, 10.0, subspace=shared.to_subspace(torch.float32), keep=0.5)
    found = steering.explain(z[:8])
    assert found.coefficients.shape == (1, 5)
    assert bool(found.entropy_after < found.entropy_before)
    with pytest.raises(ValueError, match="class 'e' was not seen"):
        model.pair_subspace("a", "e")
    with pytest.raises(ValueError, match="at least 2 classes"):
        HydraProjector(12, **small).fit(x, np.zeros(120))


def test_only_the_gate_is_trained_at_first():
    loss = ArbitraryPairLoss(PairGate(4, 6, **SMALL))
    module = HydraTraining(torch.nn.Linear(5, 7), loss, features=7, hidden=8, gate_warmup=3)
    batch = (torch.randn(12, 5), torch.randn(12, 5), torch.arange(12) % 4)
    for step, moves in ((2, False), (3, True)):
        module.zero_grad()
        module.training_loss(batch, step)[0].backward()
        assert (module.encoder.weight.grad is not None) == moves
        assert loss.gate.embedding.weight.grad.abs().sum() > 0
