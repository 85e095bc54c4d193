"""Nested heads and losses against their literal definitions."""

import pytest
import torch
from torch.nn import functional as F

from subspan.nn import (
    MatryoshkaAdapter,
    MatryoshkaLinear,
    MatryoshkaLogitLoss,
    MatryoshkaLoss,
    info_nce,
    nesting_weights,
)

DIMS = (3, 5, 12)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x):
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_running_sums_are_slices_of_the_shared_weight(bias, normalize):
    head = MatryoshkaLinear((12, 3, 5), 4, efficient=True, bias=bias, normalize=normalize).double()
    x = draw(2, 6, 12, dtype=torch.float64)
    weight = head.heads[0].weight
    for m, logits in zip(DIMS, head(x)):
        part = unit(x[..., :m]) if normalize else x[..., :m]
        expected = part @ weight[:, :m].mT + (head.heads[0].bias if bias else 0)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(head.logits(x, m), expected, rtol=0, atol=1e-12)


def test_separate_heads_see_their_prefix_only():
    head = MatryoshkaLinear(DIMS, 4)
    x = draw(6, 12)
    logits = head(x)
    assert logits.shape == (3, 6, 4)
    for level, m in enumerate(DIMS):
        torch.testing.assert_close(logits[level], head.heads[level](x[:, :m]))
        changed = x.clone()
        changed[:, m:] = 9.0
        torch.testing.assert_close(head(changed)[level], logits[level])
    assert sum(p.numel() for p in head.parameters()) == sum(4 * m + 4 for m in DIMS)
    shared = MatryoshkaLinear(DIMS, 4, efficient=True)
    assert sum(p.numel() for p in shared.parameters()) == 4 * 12 + 4


def test_half_precision_sums_blocks_in_single():
    head = MatryoshkaLinear((8, 512), 3, efficient=True)
    x = draw(5, 512)
    half = head.bfloat16()(x.bfloat16())
    exact = torch.stack([head.logits(x.bfloat16(), m) for m in (8, 512)])
    torch.testing.assert_close(half.float(), exact.float(), rtol=0.05, atol=0.05)
    zero = MatryoshkaLinear(DIMS, 3, efficient=True, normalize=True).half()(torch.zeros(2, 12).half())
    assert torch.isfinite(zero).all()


def test_one_size_is_the_plain_loss():
    x, y = draw(8, 12), draw(8, 12, seed=1)
    torch.testing.assert_close(MatryoshkaLoss(F.mse_loss, [12])(x, y), F.mse_loss(x, y))
    labels = torch.arange(8) % 3
    logits = draw(1, 8, 3)
    torch.testing.assert_close(MatryoshkaLogitLoss([12])(logits, labels), F.cross_entropy(logits[0], labels))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_the_weighted_sum_with_both_sides_cut(normalize):
    x, y = draw(8, 12), draw(8, 12, seed=1)

    def base(a, b):
        return info_nce(a, b, temperature=0.3) + a.square().sum()

    loss = MatryoshkaLoss(base, (12, 3, 5), weights=(0.5, 2.0, 1.0), normalize=normalize)(x, y)
    cut = (lambda t, m: unit(t[:, :m])) if normalize else (lambda t, m: t[:, :m])
    expected = sum(w * base(cut(x, m), cut(y, m)) for m, w in ((3, 2.0), (5, 1.0), (12, 0.5)))
    torch.testing.assert_close(loss, expected)
    again = MatryoshkaLoss(base, (3, 5, 12), weights=(2.0, 1.0, 0.5), normalize=normalize)(x, y)
    torch.testing.assert_close(again, loss)


def test_auto_normalises_what_came_normalised_and_keyword_teachers_are_cut():
    x, teacher = unit(draw(8, 12)), draw(8, 12, seed=1)
    seen = []

    def base(a, teacher, mask):
        seen.append((a, teacher, mask))
        return (a - teacher).square().mean()

    mask = torch.ones(8, 12, dtype=torch.bool)
    MatryoshkaLoss(base, DIMS)(x, teacher=teacher, mask=mask)
    for m, (a, b, kept) in zip(DIMS, seen):
        torch.testing.assert_close(a, unit(x[:, :m]))
        torch.testing.assert_close(b, teacher[:, :m])
        assert kept is mask


def test_named_embeddings_alone_are_cut():
    x, target = draw(12, 12), draw(12, 12, seed=1)
    seen = []
    MatryoshkaLoss(lambda a, t: seen.append(t) or a.sum(), DIMS, embeddings=(0,))(x, target)
    assert all(t is target for t in seen)


def test_sampled_sizes_have_the_whole_loss_as_expectation():
    x, y = draw(8, 12), draw(8, 12, seed=1)
    whole = MatryoshkaLoss(F.mse_loss, DIMS)(x, y)
    sampled = MatryoshkaLoss(F.mse_loss, DIMS, dims_per_step=1)
    torch.manual_seed(0)
    mean = torch.stack([sampled(x, y) for _ in range(600)]).mean()
    assert float(mean) == pytest.approx(float(whole), rel=0.02)
    torch.testing.assert_close(sampled.eval()(x, y), whole)


def test_gradients_reach_every_coordinate_and_zero_prefixes_do_no_harm():
    x = draw(4, 12)
    x[0, :3] = 0
    x.requires_grad_()
    MatryoshkaLoss(lambda a: (a.sum(1) - 1).square().sum(), DIMS, normalize=True)(x).backward()
    assert torch.isfinite(x.grad).all()
    assert bool((x.grad[1:].abs().sum(0) > 0).all())


def test_weights():
    assert nesting_weights([4, 8], None) == {4: 1.0, 8: 1.0}
    inverse = nesting_weights([4, 8], "inverse")
    assert inverse[4] == 2 * inverse[8]
    assert sum(inverse.values()) == pytest.approx(2)


@pytest.mark.parametrize("kind", ["rotation", "linear", "mlp"])
def test_adapters(kind):
    basis = torch.linalg.qr(draw(10, 6, dtype=torch.float64)).Q
    adapter = MatryoshkaAdapter(10, (2, 6), kind=kind, basis=basis, shift=draw(10, seed=3), scale=2.0)
    x = draw(5, 10, seed=4)
    z = adapter(x)
    assert z.shape == (5, 6)
    if kind == "mlp":
        assert adapter.matrix is None
        return
    torch.testing.assert_close(z, (x - adapter.shift) / 2 @ basis.float(), rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    adapter(x).pow(3).sum().backward()
    optimizer.step()
    torch.testing.assert_close(adapter(x), (x - adapter.shift) / 2 @ adapter.matrix.mT, rtol=0, atol=1e-4)
    if kind == "rotation":
        torch.testing.assert_close(adapter.matrix @ adapter.matrix.mT, torch.eye(6), rtol=0, atol=1e-5)
        assert float((adapter.matrix - basis.mT).abs().max()) > 1e-3


def test_the_optimal_nested_linear_code_of_gaussian_rows_is_the_principal_flag():
    d, dims = 6, (1, 2, 4)
    frame = torch.linalg.qr(draw(d, d, seed=5, dtype=torch.float64)).Q
    spread = torch.tensor([3.0, 2.0, 1.4, 1.0, 0.6, 0.3], dtype=torch.float64)
    covariance = frame @ spread.square().diag() @ frame.mT

    def reconstruction(code):
        # Squared error of the best linear decoder of coordinates code'x.
        cross = covariance @ code
        return covariance.trace() - (torch.linalg.solve(code.mT @ cross, cross.mT) * cross.mT).sum()

    loss = MatryoshkaLoss(reconstruction, dims, normalize=False)
    encoder = torch.linalg.qr(draw(d, d, seed=6, dtype=torch.float64)).Q[:, :4].contiguous().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [encoder], max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(encoder)
        value.backward()
        return value

    optimizer.step(closure)
    for m in dims:
        learnt = torch.linalg.qr(encoder.detach()[:, :m]).Q
        outside = learnt - frame[:, :m] @ (frame[:, :m].mT @ learnt)
        assert float(torch.linalg.matrix_norm(outside, 2)) < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MatryoshkaLinear([], 3), "dims"),
        (lambda: MatryoshkaLinear([4, 4], 3), "repeated"),
        (lambda: MatryoshkaLinear([0, 4], 3), "dims"),
        (lambda: MatryoshkaLinear([4], 0), "num_classes"),
        (lambda: MatryoshkaLinear([4], 2)(torch.zeros(1, 3)), "at least 4"),
        (lambda: MatryoshkaLinear([2, 4], 2).logits(torch.zeros(1, 4), 3), "m: expected one of"),
        (lambda: MatryoshkaLogitLoss([2, 4])(torch.zeros(3, 1, 2), torch.zeros(1, dtype=torch.int64)), "layers"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2], weights=[1, 2]), "weights"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2], weights=[-1]), "weights"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2], weights="log"), "weights"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2], dims_per_step=2), "dims_per_step"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2], normalize="maybe"), "normalize"),
        (lambda: MatryoshkaLoss(F.mse_loss, [5])(torch.zeros(2, 4), torch.zeros(2, 4)), "at least 5"),
        (lambda: MatryoshkaLoss(F.mse_loss, [2])(torch.zeros(4)), "embeddings"),
        (lambda: MatryoshkaAdapter(4, [2], kind="tree"), "kind"),
        (lambda: MatryoshkaAdapter(4, [5]), "dims"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
