import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.geometry import Subspace, linear_cka
from subspan.statistics import CovarianceSketch, GroupedMoments, JointMoments, Moments


def draw(n=600, d=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )
    return (x + 2).to(dtype)


@given(cuts=st.lists(st.integers(1, 199), max_size=6, unique=True), order=st.randoms())
def test_any_chunks_in_any_order_give_the_same_moments(cuts, order):
    x = draw(200)
    parts = [Moments(12).update(part) for part in torch.tensor_split(x, sorted(cuts))]
    order.shuffle(parts)
    total = Moments(12)
    for part in parts:
        total = total + part
    torch.testing.assert_close(total.mean, x.mean(0))
    torch.testing.assert_close(total.covariance(), torch.cov(x.mT), rtol=1e-10, atol=1e-10)
    assert total.count == 200


@pytest.mark.parametrize("d", [5, 600])
def test_panels_and_chunks_equal_the_plain_product(d):
    x = torch.randn(7000 if d == 5 else 1500, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(Moments(d).update(x).covariance(), torch.cov(x.mT), rtol=1e-10, atol=1e-11)


def test_float32_rows_with_a_mean_far_from_zero_keep_six_digits():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30000, 16, generator=generator, dtype=torch.float64)
    x = (x + 1e4).float()
    exact = torch.cov(x.double().mT)
    found = Moments(16).update(x).covariance()
    assert float(((found.diagonal() / exact.diagonal()) - 1).abs().max()) < 2e-6
    naive = x.mT @ x / len(x) - torch.outer(x.mean(0), x.mean(0))
    assert float(((naive.diagonal() / exact.diagonal()) - 1).abs().max()) > 0.1


def test_drifting_means_keep_their_digits():
    x = draw(4000, 8, dtype=torch.float32)
    drift = torch.linspace(0, 1e5, 4000).unsqueeze(-1).round()
    x = (x + drift).float()
    exact = torch.cov(x.double().mT)
    moments = Moments(8)
    for part in x.split(100):
        moments.update(part)
    torch.testing.assert_close(moments.covariance(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_weights_are_repetitions():
    x = draw(50)
    times = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    weighted = Moments(12).update(x, weights=times.double())
    repeated = Moments(12).update(x.repeat_interleave(times, 0))
    torch.testing.assert_close(weighted.covariance(), repeated.covariance())
    torch.testing.assert_close(weighted.mean, repeated.mean)
    nothing = Moments(12).update(x, weights=torch.zeros(50))
    assert nothing.count == 0


def test_half_precision_complex_and_large_values():
    x = draw(300, 6)
    assert Moments(6).update(x.to(torch.bfloat16)).mean.dtype == torch.float64
    z = torch.complex(draw(300, 6, seed=1), draw(300, 6, seed=2))
    moments = Moments(6, dtype=torch.complex128).update(z)
    centred = z - z.mean(0)
    torch.testing.assert_close(moments.covariance(), centred.mT @ centred.conj() / 299)
    direct = Subspace.fit(z, rank=2)
    assert float(direct.angles(moments.subspace(2)).max()) < 1e-6
    huge = Moments(6).update((x * 1e30).float())
    torch.testing.assert_close(huge.covariance() / 1e60, torch.cov(x.mT), rtol=1e-5, atol=1e-5)


def test_subspace_equals_the_in_memory_fit():
    x = draw(400)
    for center in (True, False):
        streamed = Moments(12).update(x[:150]) + Moments(12).update(x[150:])
        one, two = streamed.subspace(4, center=center), Subspace.fit(x, rank=4, center=center)
        torch.testing.assert_close(one.projector, two.projector, atol=1e-10, rtol=0)
        torch.testing.assert_close(one.leverage(x), two.leverage(x))
    torch.testing.assert_close(Moments(12).update(x).second_moment(), x.mT @ x / 400)


def test_a_refused_batch_changes_nothing():
    moments = Moments(12).update(draw())
    before = moments.copy()
    bad = draw()
    bad[5, 2] = torch.inf
    with pytest.raises(ValueError, match=r"batch: 1 of 600 rows contain NaN or infinity \(the first is row 5\)"):
        moments.update(bad)
    with pytest.raises(ValueError, match="expected 12 columns, got 3"):
        moments.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="weights"):
        moments.update(draw(), weights=torch.full((600,), -1.0))
    with pytest.raises(ValueError, match="overflow float64"):
        moments.update(draw() * 1e200)
    assert torch.equal(moments.scatter, before.scatter)
    assert moments.count == before.count
    with pytest.raises(ValueError, match="need at least 2 rows"):
        Moments(3).update(torch.zeros(1, 3)).covariance()


def test_files_round_trip(tmp_path):
    moments = Moments(12).update(draw())
    moments.save(tmp_path / "m.safetensors")
    back = Moments.load(tmp_path / "m.safetensors")
    assert torch.equal(back.scatter, moments.scatter)
    assert back.count == moments.count
    Subspace.random(4, 2).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="holds subspace, expected moments"):
        Moments.load(tmp_path / "s.safetensors")


def test_joint_moments_give_cka_and_its_local_form():
    x, y = draw(80, 5), draw(80, 4, seed=3)
    joint = JointMoments(5, 4).update(x[:30], y[:30]) + JointMoments(5, 4).update(x[30:], y[30:])
    kernel_x, kernel_y = ((v - v.mean(0)) @ (v - v.mean(0)).mT for v in (x, y))
    by_kernels = float((kernel_x * kernel_y).sum() / (kernel_x.norm() * kernel_y.norm()))
    assert abs(joint.cka() - by_kernels) < 1e-12
    assert abs(linear_cka(joint.cov_xx, joint.cov_xy, joint.cov_yy) - by_kernels) < 1e-12
    torch.testing.assert_close(joint.x.covariance(), torch.cov(x.mT))
    new_x, new_y = draw(3, 5, seed=7), draw(2, 4, seed=8)
    local = joint.local_cka(new_x, new_y)
    for i in range(3):
        for j in range(2):
            again = JointMoments(5, 4).update(torch.cat([x, new_x[i : i + 1]]), torch.cat([y, new_y[j : j + 1]]))
            assert abs(float(local[i, j]) - again.cka()) < 1e-12
    with pytest.raises(ValueError, match="y: expected 5 rows to pair"):
        joint.update(x[:5], y[:4])


def test_grouped_moments_split_the_variance():
    x = draw(300, 6)
    labels = torch.arange(300) % 3
    x = x + labels.unsqueeze(-1)
    grouped = GroupedMoments(6).update(x[:120], labels[:120]) + GroupedMoments(6).update(x[120:], labels[120:])
    assert grouped.groups == [0, 1, 2]
    assert grouped.counts.tolist() == [100, 100, 100]
    torch.testing.assert_close(grouped.means[1], x[labels == 1].mean(0))
    torch.testing.assert_close(grouped.pooled().covariance(), torch.cov(x.mT))
    total = grouped.within() * (300 - 3) / 300 + grouped.between()
    torch.testing.assert_close(total, torch.cov(x.mT, correction=0))
    spaces = grouped.subspaces(2)
    assert float(spaces[2].angles(Subspace.fit(x[labels == 2], rank=2)).max()) < 1e-6
    with pytest.raises(ValueError, match="group 'lonely'"):
        GroupedMoments(6).update(x[:1], ["lonely"]).subspaces(1)
    with pytest.raises(ValueError, match="labels: expected 300, got 2"):
        grouped.update(x, [1, 2])


def test_sketch_finds_the_planted_subspace_and_merges(planted):
    x, basis = planted(3000, 300, 6, noise=0.02, offset=5.0)
    truth = Subspace(basis)
    whole = CovarianceSketch(300, 24, dtype=torch.float64).update(x)
    parts = [CovarianceSketch(300, 24, dtype=torch.float64).update(p) for p in x.split(700)]
    merged = parts[2] + parts[0] + parts[4] + parts[1] + parts[3]
    exact = Moments(300).update(x)
    for sketch in (whole, merged):
        torch.testing.assert_close(sketch.mean, x.mean(0))
        assert abs(sketch.total_variance / exact.total_variance - 1) < 1e-9
        assert float(sketch.subspace(6).angles(truth).max()) < 0.02
        gap = exact.scatter - sketch.rows.mT @ sketch.rows
        values = torch.linalg.eigvalsh(gap)
        assert float(values.min()) > -1e-6 * exact.total_variance
        assert float(values.max()) <= sketch.error_bound * (1 + 1e-9)
    with pytest.raises(ValueError, match="use a larger size"):
        whole.subspace(0.9999)


def test_numpy_and_read_only_arrays():
    x = draw().numpy()
    x.flags.writeable = False
    np.testing.assert_allclose(Moments(12).update(x).covariance().numpy(), np.cov(x.T))
