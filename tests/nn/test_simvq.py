"""Quantisers whose codes are moved by one map."""

import pytest
import torch
from torch.nn import functional as F

from processes import in_processes
from subspan.nn import GroupedSimVQ, ResidualSimVQ, SimVQ, code_usage
from subspan.solvers import nearest_code
from subspan.statistics import Moments


def made(dim=6, num_codes=40, seed=0, **options):
    torch.manual_seed(seed)
    return SimVQ(dim, num_codes, **options)


def latents(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_forward_is_the_published_formula_row_by_row():
    layer, z = made(), latents(3, 5, 6)
    found = layer(z)
    codes = layer.basis @ layer.transform.weight.mT + layer.transform.bias
    losses = []
    for i in range(3):
        for j in range(5):
            distance = (codes - z[i, j]).square().sum(-1)
            assert int(found.codes[i, j]) == int(distance.argmin())
            chosen = codes[distance.argmin()]
            torch.testing.assert_close(found.values[i, j], chosen)
            losses.append((chosen - z[i, j]).square().mean() * 1.25)
    torch.testing.assert_close(found.loss, torch.stack(losses).mean())


def test_every_code_moves_by_the_sum_over_chosen_ones_and_plain_codes_stay():
    layer, z = made(bias=False, commitment=0.0), latents(4, 6)
    before = layer.codebook.detach()
    frozen = layer.basis.clone()
    found = layer(z)
    found.loss.backward()
    with torch.no_grad():
        layer.transform.weight -= 0.1 * layer.transform.weight.grad
    residual = 2 / z.numel() * (before[found.codes] - z)
    expected = -0.1 * (layer.basis @ layer.basis[found.codes].mT) @ residual
    torch.testing.assert_close(layer.codebook.detach() - before, expected, atol=1e-6, rtol=1e-4)
    assert bool((expected.abs().sum(-1) > 0).all())
    assert torch.equal(layer.basis, frozen)
    control = made(train_basis=True)
    found = control(z)
    found.loss.backward()
    moved = control.basis.grad.abs().sum(-1) > 0
    assert set(moved.nonzero()[:, 0].tolist()) == set(found.codes.tolist())
    assert control.transform.weight.grad is None


@pytest.mark.parametrize("block", [1, 7, 40, 64, 10_000])
def test_search_in_blocks_is_the_dense_one_and_equals_go_to_the_lowest(block):
    rows, codes = latents(33, 6), latents(40, 6, seed=2)
    codes[30] = codes[3]
    rows[0] = codes[3]
    dense = (rows.unsqueeze(1) - codes).square().sum(-1).argmin(1)
    assert torch.equal(nearest_code(rows, codes, block=block), dense)
    assert int(dense[0]) == 3
    # Far from the origin float32 has no digits left for the differences unless the origin is moved.
    assert torch.equal(nearest_code(rows + 1000, codes + 1000, block=block), nearest_code(rows + 1000, codes + 1000))


def test_search_keeps_its_digits_far_from_the_origin_and_in_half_precision():
    rows, codes = latents(200, 6).double(), latents(40, 6, seed=2).double()
    exact = nearest_code(rows, codes)
    assert float((nearest_code((rows + 300).float(), (codes + 300).float()) == exact).float().mean()) > 0.97
    half = (rows.bfloat16(), codes.bfloat16())
    assert torch.equal(nearest_code(*half), nearest_code(half[0].double(), half[1].double()))


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: made(**o),
        lambda **o: ResidualSimVQ(6, 40, 3, **o),
        lambda **o: GroupedSimVQ(6, 40, 2, **o),
    ],
)
@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((7, 6), -1), ((2, 6, 5), 1), ((2, 3, 4, 6), -1), ((2, 6, 3, 4), 1)]
)
def test_stored_codes_decode_to_the_last_bit(make, shape, channel_dim):
    torch.manual_seed(3)
    layer = make(channel_dim=channel_dim)
    found = layer(latents(*shape))
    assert found.values.shape == shape
    assert torch.equal(layer.decode(found.codes), found.values.detach())
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1
    again = layer(latents(*shape))
    assert torch.equal(layer.decode(again.codes), again.values.detach())
    assert not torch.equal(again.values, found.values)


def test_the_exported_codebook_is_all_that_decoding_needs():
    layer = made(basis_dim=3)
    found = layer(latents(9, 6))
    assert torch.equal(layer.export()[found.codes], found.values.detach())
    # The frozen codes themselves are no values.
    assert layer.basis.shape == (40, 3)


def test_gradients_of_both_estimators():
    z = latents(5, 6).requires_grad_()
    weight = latents(5, 6, seed=4)
    (made()(z).values * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    layer = made(estimator="rotation")
    z = latents(5, 6).requires_grad_()
    found = layer(z)
    (found.values * weight).sum().backward()
    for row, value, gradient, direction in zip(z.detach(), found.values.detach(), z.grad, weight):
        a, b = F.normalize(row, dim=0), F.normalize(value, dim=0)
        middle = F.normalize(a + b, dim=0)
        rotation = torch.eye(6) - 2 * middle.outer(middle) + 2 * b.outer(a)
        torch.testing.assert_close(rotation @ a, b, atol=1e-5, rtol=0)
        expected = rotation.mT @ direction * value.norm() / row.norm()
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_a_start_from_moments_has_the_latents_mean_and_covariance():
    mixing = latents(6, 6)
    z = latents(4000, 6) @ mixing.mT + 5
    moments = Moments(6).update(z)
    layer = made(num_codes=4000)
    layer.init_from(moments)
    codes = layer.codebook.detach().double()
    assert float((codes.mean(0) - moments.mean).norm() / moments.mean.norm()) < 0.05
    covariance = moments.covariance()
    assert float((codes.mT.cov() - covariance).norm() / covariance.norm()) < 0.15
    with pytest.raises(ValueError, match="bias"):
        made(bias=False).init_from(moments)
    with pytest.raises(ValueError, match="expected 5 dimensions"):
        made(dim=5).init_from(moments)


def test_codes_gather_in_the_plane_of_the_latents():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q
    layer = made(dim=16, num_codes=256, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(100):
        z = torch.randn(128, 3, generator=generator) @ plane.mT
        optimizer.zero_grad()
        layer(z).loss.backward()
        optimizer.step()
    used = layer.codebook.detach()[layer(z).codes]
    outside = used - used @ plane @ plane.mT
    assert float(outside.norm() / used.norm()) < 0.2


def test_residual_codes_refine_and_prefixes_are_useful():
    torch.manual_seed(0)
    layer = ResidualSimVQ(6, 64, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for step in range(100):
        optimizer.zero_grad()
        layer(latents(128, 6, seed=step)).loss.backward()
        optimizer.step()
    z = latents(200, 6, seed=1000)
    codes = layer(z).codes
    errors = [float((layer.decode(codes[..., :depth]) - z).square().mean()) for depth in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2]
    z.requires_grad_()
    layer(z).values.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))
    dropped = ResidualSimVQ(6, 64, 4, dropout=True)
    kept = {int((dropped(latents(3, 6)).codes[0] >= 0).sum()) for _ in range(30)}
    assert kept == {1, 2, 3, 4}
    assert int((dropped.eval()(latents(3, 6)).codes >= 0).sum()) == 12
    partial = torch.tensor([[3, -1, -1, -1]])
    assert torch.equal(dropped.decode(partial)[0], dropped.quantizers[0].codebook.detach()[3])


@pytest.mark.parametrize("estimator", ["straight-through", "rotation"])
@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda **options: made(**options),
        lambda **options: ResidualSimVQ(6, 40, 3, **options),
        lambda **options: GroupedSimVQ(6, 40, 2, **options),
    ],
)
def test_padding_is_neither_coded_nor_learnt_from(make, channel_dim, estimator):
    layer = make(channel_dim=channel_dim, estimator=estimator)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    rows = latents(2, 10, 6).requires_grad_()
    padded = torch.where(mask.unsqueeze(-1), rows, torch.nan)
    found = layer(padded.movedim(-1, channel_dim), mask)
    true = torch.cat([rows[0], rows[1, :4]]).detach().requires_grad_()
    # A sequence of fourteen tokens.
    alone = layer(true.unsqueeze(0).movedim(-1, channel_dim))
    torch.testing.assert_close(found.loss, alone.loss)
    values = found.values.movedim(channel_dim, -1)
    assert torch.equal(values[mask], alone.values.movedim(channel_dim, -1)[0])
    assert not bool(values[~mask].any())
    assert torch.equal(found.codes[mask], alone.codes[0])
    assert bool((found.codes[~mask] == -1).all())
    decoded = [] if isinstance(layer, ResidualSimVQ) else [mask]
    assert torch.equal(layer.decode(found.codes, *decoded), found.values.detach())
    (found.loss + (found.values * 3).sum()).backward()
    (alone.loss + (alone.values * 3).sum()).backward()
    torch.testing.assert_close(rows.grad[mask], true.grad)
    assert not bool(rows.grad[~mask].any())
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 10\), got \(2, 9\)"):
        layer(padded.movedim(-1, channel_dim), mask[:, :9])
    with pytest.raises(ValueError, match="mask: leaves no latents"):
        layer(padded.movedim(-1, channel_dim), torch.zeros_like(mask))
    with pytest.raises(ValueError, match="NaN"):
        layer(padded.movedim(-1, channel_dim), torch.ones_like(mask))


def test_a_residual_quantizer_with_dropout_trains_distributed():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.quantizer = torch.nn.Linear(6, 6), ResidualSimVQ(6, 40, 4, dropout=True)

        def forward(self, x):
            found = self.quantizer(self.inner(x))
            return found.loss + found.values.square().mean(), found.codes

    def train(rank):
        torch.manual_seed(0)
        net, left_out = torch.nn.parallel.DistributedDataParallel(Net()), 0
        for step in range(8):
            net.zero_grad()
            loss, codes = net(latents(16, 6, seed=step))
            loss.backward()
            left_out += int((codes == -1).any())
            for number, quantizer in enumerate(net.module.quantizer.quantizers):
                used = bool(quantizer.transform.weight.grad.any())
                assert used == bool((codes[:, number] >= 0).all())
        assert left_out > 2

    in_processes(train)


def test_the_decoder_is_that_of_the_weights_of_now():
    layer = made(dim=64, num_codes=300)
    codes = torch.arange(300)
    layer.decode(codes)
    layer.half().float()
    assert torch.equal(layer.decode(codes), layer.codebook.detach())


def test_groups_are_quantised_apart_and_their_losses_averaged():
    torch.manual_seed(0)
    layer, z = GroupedSimVQ(6, 40, 2), latents(5, 6)
    found, parts = layer(z), [one(part) for one, part in zip(layer.quantizers, z.split(3, -1))]
    torch.testing.assert_close(found.loss, (parts[0].loss + parts[1].loss) / 2)
    assert torch.equal(found.values, torch.cat([part.values for part in parts], -1))
    assert torch.equal(found.codes, torch.stack([part.codes for part in parts], -1))


def test_usage():
    usage = code_usage(torch.tensor([[0, 0], [1, -1]]), 8)
    assert usage.active == 0.25
    assert usage.reachable == pytest.approx(2 / 3)
    assert usage.perplexity == pytest.approx(3 / 2 ** (2 / 3), rel=1e-6)
    with pytest.raises(ValueError, match="there are none"):
        code_usage(torch.tensor([-1]), 8)


def test_refuses_bad_input():
    with pytest.warns(UserWarning, match="5 codes in 6 dimensions"):
        made(num_codes=5)
    for options in ({"num_codes": 1}, {"dim": 0}, {"commitment": -1.0}, {"estimator": "none"}, {"block": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            made(**options)
    layer = made()
    with pytest.raises(ValueError, match="expected 6 channels in dimension -1"):
        layer(latents(3, 5))
    with pytest.raises(ValueError, match="there are none"):
        layer(latents(0, 6))
    with pytest.raises(ValueError, match="NaN"):
        layer(torch.full((2, 6), torch.inf))
    with pytest.raises(TypeError, match="integers"):
        layer.decode(torch.zeros(3))
    for wrong in (40, -1):
        with pytest.raises(ValueError, match=r"must lie in \[0, 40\)"):
            layer.decode(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="must divide dim"):
        GroupedSimVQ(6, 40, 4)
    with pytest.raises(ValueError, match="depth"):
        ResidualSimVQ(6, 40, 0)
