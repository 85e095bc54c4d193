"""Encoders of series and views: shapes at any length, masks, what each branch sees, and the small map."""

import pytest
import torch

from subspan.nn import LatentMapper, ScalogramEncoder, SeriesEncoder, SpectrumEncoder, nt_xent


def by_hand(x, y, temperature):
    rows = torch.nn.functional.normalize(torch.cat([x, y]), dim=1)
    n, found = len(x), []
    for a in range(2 * n):
        s = {b: float(rows[a] @ rows[b]) / temperature for b in range(2 * n) if b != a}
        partner = (a + n) % (2 * n)
        found.append(torch.tensor(list(s.values())).double().logsumexp(0) - s[partner])
    return torch.stack(found).mean()


@pytest.mark.parametrize("n", [2, 5])
def test_the_contrast_of_two_views_is_a_loop_over_both(n):
    x, y = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64)
    torch.testing.assert_close(nt_xent(x, y, temperature=0.3), by_hand(x, y, 0.3))
    same = torch.ones(n, 3)
    assert float(nt_xent(same, same, temperature=0.15).exp()) == pytest.approx(2 * n - 1, rel=1e-5)
    with pytest.raises(ValueError, match="at least two rows are needed, as many of one as of the other, got 1 and 1"):
        nt_xent(x[:1], y[:1])
    with pytest.raises(ValueError, match=f"got {n} and {n + 1}"):
        nt_xent(x, torch.randn(n + 1, 4, dtype=torch.float64))


@pytest.mark.parametrize("length", [16, 17, 128])
@pytest.mark.parametrize("channels", [1, 5])
def test_series_of_any_length_become_vectors(length, channels):
    encoder = SeriesEncoder(channels, 9, width=4).eval()
    x = torch.randn(3, channels, length)
    assert encoder(x).shape == (3, 9)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]))
    everything = torch.ones(3, length, dtype=torch.bool)
    torch.testing.assert_close(encoder(x, mask=everything), encoder(x))


def test_filling_is_left_out_of_the_mean():
    encoder = SeriesEncoder(1, 6, width=4).eval()
    x = torch.randn(1, 1, 640, requires_grad=True)
    reach = 152  # of the convolutions, on either side
    for mask, last in (((torch.arange(640) < 300)[None], 300), (None, 640)):
        grad = torch.autograd.grad(encoder(x, mask=mask).sum(), x)[0][0, 0].abs()
        assert float(grad[last - 16 : last].max()) > 0
        assert float(grad[last + reach :].sum()) == 0


@pytest.mark.parametrize("size", [9, 26, 51])
def test_amplitudes_and_phases_have_a_branch_each(size):
    encoder = SpectrumEncoder((3, 2, size), 12, width=4)
    x = torch.randn(5, 3, 2, size, requires_grad=True)
    own = encoder.branches[0](x[:, 0]).sum()
    grad = torch.autograd.grad(own, x)[0]
    assert float(grad[:, 0].abs().sum()) > 0
    assert float(grad[:, 1:].abs().max()) == 0
    assert encoder(x).shape == (5, 12)
    assert isinstance(SpectrumEncoder((2, 1, size), 32, width=4).linear, torch.nn.Identity)
    assert len(SpectrumEncoder((1, 2, size), 12, width=4).branches) == 1
    with pytest.raises(ValueError, match=r"x: expected views of shape \(3, 2, "):
        encoder(torch.randn(5, 2, 2, size))


@pytest.mark.parametrize("shape", [(1, 48, 128), (3, 7, 33), (2, 12, 16)])
def test_scalograms_of_any_size_become_vectors(shape):
    encoder = ScalogramEncoder(shape, 10, width=4)
    x = torch.randn(4, *shape, requires_grad=True)
    encoder(x).sum().backward()
    assert encoder(x).shape == (4, 10)
    assert bool((x.grad.abs().sum((0, 1)) > 0).all())
    assert encoder.over_scales.in_features == -(-shape[1] // 8)
    assert encoder.over_time.in_features == -(-shape[2] // 8)


def test_the_last_two_convolutions_see_averages_of_the_view_itself():
    for blind in ("third", "second"):
        encoder, x = ScalogramEncoder((2, 16, 16), 10, width=4).eval(), torch.randn(1, 2, 16, 16)
        torch.nn.init.zeros_(encoder.get_submodule(blind)[0].weight)
        if blind == "second":  # what is left is the way into the third
            torch.nn.init.zeros_(encoder.fourth[0].weight[:, 12:])
        assert not torch.allclose(encoder(x), encoder(-x))


@pytest.mark.parametrize("dim", [1, 7, 128])
def test_the_map_keeps_the_number_of_coordinates(dim):
    assert LatentMapper(dim, 3)(torch.randn(4, dim)).shape == (4, dim)
    assert sum(p.numel() for p in LatentMapper(dim).parameters()) == 449
    assert sum(p.numel() for p in LatentMapper(dim, 1).parameters()) == 8
