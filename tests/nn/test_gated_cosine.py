"""Gated cosines against gated keys written out."""

import inspect

import pytest
import torch

from subspan.nn import gated_cosine


def naive(z, k, g):
    """With the n m d tensor of gated keys."""
    queries, keys = z * g, k * g[:, None]
    sizes = queries.norm(dim=-1)[:, None] * keys.norm(dim=-1)
    return torch.einsum("nd,nmd->nm", queries, keys) / sizes


def drawn(*scales):
    z, k, g = torch.randn(5, 7, dtype=torch.float64), torch.randn(6, 7, dtype=torch.float64), torch.rand(5, 7).double()
    return [each.requires_grad_() for each in (z, k, g)]


def test_it_is_the_cosine_of_gated_keys_with_its_gradient():
    inputs, weight = drawn(), torch.randn(5, 6, dtype=torch.float64)
    ours, theirs = gated_cosine(*inputs), naive(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad((each * weight).sum(), inputs) for each in (ours, theirs))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_it_does_not_see_the_length_of_rows():
    z, k, g = (each.detach() for each in drawn())
    up = torch.rand(7, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(gated_cosine(z * up[:5], k * up[:6], g * up[:5]), gated_cosine(z, k, g))
    plain = torch.nn.functional.normalize(z) @ torch.nn.functional.normalize(k).mT
    torch.testing.assert_close(gated_cosine(z, k, torch.full_like(g, 0.3)), plain)
    before = gated_cosine(z, k, g, normalize="before")
    torch.testing.assert_close(before, (torch.nn.functional.normalize(z) * g**2) @ torch.nn.functional.normalize(k).mT)


def test_closed_gates_and_zero_vectors_have_no_cosine_and_no_gradient():
    z, k, g = drawn()
    with torch.no_grad():
        g[1], z[2], k[3] = 0, 0, 0
    found = gated_cosine(z, k, g)
    assert found[1].eq(0).all()
    assert found[2].eq(0).all()
    assert found[:, 3].eq(0).all()
    found.sum().backward()
    for each in (z, k, g):
        assert each.grad.isfinite().all()
    assert g.grad[1].eq(0).all()


def test_small_gates_survive_half_precision():
    z, k, g = (each.detach().float() for each in drawn())
    half = gated_cosine(z.half() * 100, k.half(), (g * 1e-4).half())
    torch.testing.assert_close(half.float(), gated_cosine(z, k, g), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gates": torch.ones(5, 6)}, "one width"),
        ({"gates": torch.ones(4, 7)}, "one a query"),
        ({"normalize": "after"}, "normalize: expected"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"queries": torch.ones(5, 7), "keys": torch.ones(6, 7), "gates": torch.ones(5, 7)}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(gated_cosine)(**{**given, **change})  # as it is called without the checker of the tests
