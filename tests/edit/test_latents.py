"""Directions in latent spaces: found, replaced and measured."""

import pytest
import torch
from torch import nn

from subspan.edit import displacement_mixing, displacements, latent_directions, orthogonalize_projections, path_length
from subspan.geometry import principal_angles
from subspan.geometry.grassmann import random_basis
from subspan.nn import HouseholderProjector


def matrix(out=5, width=8, seed=0):
    return torch.randn(out, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_sefa_gives_the_right_singular_vectors_of_layers_and_kernels():
    a = matrix()
    found = latent_directions(a, 2)
    _, s, vh = torch.linalg.svd(a)
    torch.testing.assert_close(found.basis, vh[:2].mT)
    torch.testing.assert_close(found.variances, s[:2].square())
    kernel = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(latent_directions(kernel, 3).basis, latent_directions(kernel.flatten(1), 3).basis)
    layer = nn.Conv2d(2, 6, 3)
    torch.testing.assert_close(latent_directions(layer, 3).basis, latent_directions(layer.weight, 3).basis)


def test_the_projector_gives_its_frame_and_the_jacobian_axes_without_a_gauge():
    torch.manual_seed(0)
    layer = HouseholderProjector.from_linear(nn.Linear(8, 6), 3)
    found = latent_directions(layer, 3, method="householder")
    torch.testing.assert_close(found.basis, layer.directions.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.variances, layer.gain.double().square().expand(3))
    a, latents = matrix(7), torch.randn(20, 8, dtype=torch.float64)
    canonical = latent_directions(layer, 3, method="jacobian", effect=lambda w: w @ a.mT, latents=latents)
    v = layer.directions.double()
    values, turn = torch.linalg.eigh(v.mT @ a.mT @ a @ v)
    torch.testing.assert_close(canonical.variances, values.flip(0), atol=1e-6, rtol=1e-6)
    cosines = ((v @ turn.flip(1)) * canonical.basis).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    with torch.no_grad():
        rotation = random_basis(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
        for part in (layer.u, layer.v):
            part.frame = part.frame @ rotation
    again = latent_directions(layer, 3, method="jacobian", effect=lambda w: w @ a.mT, latents=latents)
    torch.testing.assert_close(again.basis, canonical.basis, atol=1e-5, rtol=0)
    assert not torch.allclose(latent_directions(layer, 3, method="householder").basis, found.basis, atol=1e-2)


def test_the_jacobian_of_a_plain_layer_is_that_of_the_mean_square():
    torch.manual_seed(0)
    layer, latents = nn.Linear(8, 6), torch.randn(30, 8, dtype=torch.float64)
    last = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    weight = layer.weight.detach().double()

    def effect(w):
        return last(w @ weight.mT)

    found = latent_directions(layer, 2, method="jacobian", effect=effect, latents=latents)
    jacobians = torch.stack([torch.func.jacrev(effect)(w) for w in latents]).detach()
    values, vectors = torch.linalg.eigh((jacobians.mT @ jacobians).mean(0))
    torch.testing.assert_close(found.variances, values.flip(0)[:2], rtol=1e-3, atol=1e-8)
    assert float(principal_angles(found.basis[:, :1], vectors[:, -1:]).max()) < 1e-2


def test_path_lengths_and_mixing_of_a_linear_map():
    a = matrix()
    latents, v = torch.randn(200, 8, dtype=torch.float64), torch.eye(8, 2, dtype=torch.float64)

    def made(w):
        return w @ a.mT

    assert path_length(made, latents, v[:, :1]) == pytest.approx(float(a[:, 0].square().mean()), rel=1e-6)
    assert path_length(made, latents, v[:, :1], distance=lambda x, y: (x - y).abs().sum(1), eps=0.5) == pytest.approx(
        float(a[:, 0].abs().sum()) / 0.5, rel=1e-6
    )
    pairs = latents[torch.randperm(200, generator=torch.Generator().manual_seed(3))] - latents
    expected = (pairs @ a.mT).square().mean(1).sort().values[2:-2].mean()
    found = path_length(made, latents, random=torch.Generator().manual_seed(3))
    assert found == pytest.approx(float(expected), rel=1e-6)
    moved = displacements(made, latents, v)
    torch.testing.assert_close(moved[0], a[:, :2].mT, atol=1e-8, rtol=0)
    cosine = torch.nn.functional.cosine_similarity(a[:, 0], a[:, 1], dim=0).abs()
    assert displacement_mixing(moved) == pytest.approx(float(cosine), rel=1e-6)


def test_a_layer_s_own_latent_alone_is_moved():
    seen = []

    def made(w):
        seen.append(w)
        return w.flatten(1)

    latents = torch.zeros(100, 3, 4)
    directions = torch.eye(4, 2).expand(3, 4, 2)
    assert path_length(made, latents, directions, eps=0.5) == pytest.approx(1 / 12, rel=1e-5)
    moved = seen[1]
    assert bool(((moved != 0).flatten(1).sum(1) == 1).all())
    assert set(moved.nonzero()[:, 1].tolist()) == {0, 1, 2}
    assert set(moved.nonzero()[:, 2].tolist()) == {0, 1}


def test_surgery_on_projections_is_warm_started_and_reversible():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(9, 8)
    before = model(x)
    surgery = orthogonalize_projections(model, ["0"], 3, example=x)
    assert isinstance(model[0], HouseholderProjector)
    assert isinstance(model[2], nn.Linear)
    assert 0 < surgery.sites[0].error < 1
    torch.testing.assert_close(surgery.undo()(x), before)
    assert len(orthogonalize_projections(model, "*[02]", 3).sites) == 2


def test_refuses_bad_input():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    a, w = matrix(), torch.randn(3, 8)
    for call, match in [
        (lambda: orthogonalize_projections(model, "1"), "'1' is a ReLU; linear layers are 0, 2"),
        (lambda: orthogonalize_projections(model, "x"), "names no module; linear layers are 0, 2"),
        (lambda: orthogonalize_projections(model, []), "at least one"),
        (lambda: orthogonalize_projections(model, ["0", "2"], 5), r"\[1, 4\], got 5"),
        (lambda: latent_directions(a, 6), "rank"),
        (lambda: latent_directions(a, 2, method="pca"), "method"),
        (lambda: latent_directions(a, 2, method="householder"), "HouseholderProjector"),
        (lambda: latent_directions(a, 2, method="jacobian"), "needs both"),
        (lambda: latent_directions(nn.ReLU(), 2), "layer"),
        (lambda: latent_directions(a * torch.nan, 2), "NaN"),
        (lambda: path_length(lambda x: x, w, eps=0), "eps"),
        (lambda: path_length(lambda x: x, w, torch.eye(7, 2)), "directions"),
        (lambda: displacement_mixing(torch.ones(2, 1, 3)), "two"),
        (lambda: displacement_mixing(torch.zeros(2, 2, 3)), "changes nothing"),
        (lambda: displacements(lambda x: x, w, torch.eye(8, 2), eps=-1.0), "eps"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    assert isinstance(model[0], nn.Linear)
