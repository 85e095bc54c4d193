import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subspan.geometry import Subspace, linear_cka
from subspan.measures import kernel_cka
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


# ---------------------------------------------------------------------- fewer rows than columns


def thin_and_dense(x, **options):
    """The same rows in moments that keep them, and in moments that were made to form the scatter first."""
    thin, dense = Moments(x.shape[1], **options), Moments(x.shape[1], **options)
    assert dense.scatter.shape == (x.shape[1],) * 2
    return thin, dense


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("cuts", [(20,), (1, 2, 17), (7, 8, 30)])
def test_few_rows_are_kept_and_give_what_the_scatter_gives(cuts, dtype):
    x = draw(n=40, d=60).to(dtype) + 50
    if dtype.is_complex:
        x = x + 1j * draw(n=40, d=60, seed=3)
    thin, dense = thin_and_dense(x, dtype=dtype)
    for part in torch.tensor_split(x, cuts):
        assert thin.update(part.clone()).count == dense.update(part).count
    # The third way of cutting makes more factors than half the columns, and the scatter takes their place.
    assert (thin.factor is None) == (len(x) + len(cuts) > 30)
    torch.testing.assert_close(thin.copy().scatter, dense.scatter)
    torch.testing.assert_close(thin.mean, dense.mean)
    assert thin.total_variance == pytest.approx(dense.total_variance)
    assert dense.factor is None


def test_closed_forms_of_few_pairs_are_those_of_the_whole_spaces():
    x = draw(20, 50) + 3
    y = x[:, :40] @ draw(40, 40, seed=1) + draw(20, 40, seed=2)
    few, whole = JointMoments(50, 40).update(x, y), JointMoments(50, 40).update(x, y)
    assert whole.joint.scatter.shape == (90, 90)  # from here on the rows are not kept
    assert few.row_spaces() is not None
    assert whole.row_spaces() is None

    def same(ours, theirs):
        torch.testing.assert_close(ours.matrix, theirs.matrix, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(ours.bias, theirs.bias, atol=1e-8, rtol=1e-8)

    for alpha in (0.0, 1e-3, 10.0):
        same(few.ridge(alpha), whole.ridge(alpha))
    for scale in (False, True):
        # The whole spaces' own rotation turns what lies outside the 19 directions of the rows by chance.
        same(few.procrustes(scale=scale), whole.procrustes(scale=scale, rank=19))
    for shrinkage in ("oas", 0.3):
        ours, theirs = few.cca(5, shrinkage=shrinkage), whole.cca(5, shrinkage=shrinkage)
        assert ours.shrinkage == pytest.approx(theirs.shrinkage)
        torch.testing.assert_close(ours.correlations, theirs.correlations)
        same(few.through_canonical(ours), whole.through_canonical(theirs))
    rows = draw(7, 50, seed=3)
    torch.testing.assert_close(few.row_spaces().ridge().map(rows), whole.ridge().map(rows))
    assert few.joint.factor is not None


def test_few_pairs_of_which_one_side_is_constant_have_no_row_spaces():
    assert JointMoments(50, 40).update(draw(20, 50), torch.ones(20, 40).double()).row_spaces() is None


@pytest.mark.parametrize("center", [True, False])
def test_the_subspace_of_few_rows_needs_no_square(center, tmp_path):
    x = draw(n=24, d=60) * torch.linspace(5, 1, 60) + 3
    thin, dense = thin_and_dense(x)
    for part in x.split(9):
        thin.update(part)
        dense.update(part)
    found, expected = thin.subspace(4, center=center), dense.subspace(4, center=center)
    assert thin.factor is not None
    assert float(found.distance(expected)) < 1e-6
    torch.testing.assert_close(found.variances, expected.variances)
    torch.testing.assert_close(found.residual_variance, expected.residual_variance)
    assert len(found.spectrum) == 24
    torch.testing.assert_close(found.spectrum, Subspace.fit(x, rank=4, center=center).spectrum, atol=1e-10, rtol=1e-8)
    assert thin.captured_energy(found) == pytest.approx(dense.captured_energy(found))
    assert thin.factor is not None
    thin.save(tmp_path / "moments.safetensors")
    assert (tmp_path / "moments.safetensors").stat().st_size < 60 * 60 * 8
    torch.testing.assert_close(Moments.load(tmp_path / "moments.safetensors").scatter, dense.scatter)


def test_merging_thin_and_dense_moments():
    x = draw(n=90, d=60)
    whole = Moments(60).update(x)
    thin, more, dense = Moments(60).update(x[:10]), Moments(60).update(x[10:25]), Moments(60).update(x[25:])
    assert thin.factor is not None
    assert dense.factor is None
    for total in (thin + more + dense, dense + thin + more, thin + (more + dense), sum([more, dense], thin)):
        assert total.count == 90
        torch.testing.assert_close(total.scatter, whole.scatter)
        torch.testing.assert_close(total.mean, whole.mean)
    assert (thin + more).factor is not None
    assert len(thin.factor) == 10
    with pytest.raises(ValueError, match="NaN"):
        thin.update(torch.full((2, 60), torch.nan))
    assert thin.count == 10


def test_weighted_rows_are_summed_as_they_were():
    x, w = draw(n=10, d=60), torch.rand(10, generator=torch.Generator().manual_seed(0)).double()
    found = Moments(60).update(x[:5]).update(x, w)
    count = 5 + w.sum()
    mean = (x[:5].sum(0) + (w[:, None] * x).sum(0)) / count
    centred = torch.cat([x[:5], x]) - mean
    weights = torch.cat([torch.ones(5, dtype=w.dtype), w])
    torch.testing.assert_close(found.scatter, centred.T @ (centred * weights[:, None]))


# ---------------------------------------------------------------------- alignment beside its chance


def permutation_mean(x, y):
    """CKA averaged over random pairings, by its definition."""
    generator = torch.Generator().manual_seed(0)
    return sum(kernel_cka(x, y[torch.randperm(len(y), generator=generator)]) for _ in range(400)) / 400


@pytest.mark.parametrize("d", [8, 90])
def test_chance_of_alignment_is_the_mean_over_pairings(d):
    x, y = draw(n=40, d=d) * torch.linspace(3, 1, d), draw(n=40, d=d + 3, seed=1)
    joint = JointMoments(d, d + 3).update(x, y)
    assert (joint.joint.factor is not None) == (d == 90)
    assert joint.cka() == pytest.approx(kernel_cka(x, y), rel=1e-9)
    assert joint.chance_cka() == pytest.approx(permutation_mean(x, y), rel=0.02)


@pytest.mark.parametrize("n", [30, 300])
def test_debiased_alignment_of_unrelated_rows_is_zero_and_of_equal_ones_is_one(n):
    biased, debiased, exact, truth = [], [], [], JointMoments(60, 60)
    generator = torch.Generator().manual_seed(0)

    def rows(m):
        scale = torch.linspace(4, 1, 60, dtype=torch.float64)
        return torch.randn(m, 60, generator=generator, dtype=torch.float64) * scale

    for _ in range(20):
        x, y = rows(n), rows(n)
        joint = JointMoments(60, 60).update(x, y)
        biased.append(joint.cka())
        debiased.append(joint.cka(debiased=True))
        exact.append(kernel_cka(x, y, debiased=True))
        assert JointMoments(60, 60).update(x, x).cka(debiased=True) == pytest.approx(1)
        assert kernel_cka(x, x, debiased=True) == pytest.approx(1)
    assert min(biased) > 0.1
    for values in (debiased, exact):
        assert abs(sum(values) / 20) < 4 * torch.tensor(values).std() / 20**0.5
    assert max(abs(a - b) for a, b in zip(debiased, exact)) < 3 / n
    # The same number whatever the number of rows, where there is something to find.
    x = rows(20_000)
    truth.update(x, x + rows(20_000))
    found = []
    for _ in range(20):
        x = rows(n)
        found.append(JointMoments(60, 60).update(x, x + rows(n)).cka(debiased=True))
    assert sum(found) / 20 == pytest.approx(truth.cka(), abs=0.03)


def test_alignment_that_is_not_defined_is_refused():
    x = draw(n=40, d=5)
    with pytest.raises(ValueError, match="constant"):
        JointMoments(5, 5).update(x, torch.ones(40, 5, dtype=torch.float64)).cka()
    with pytest.raises(ValueError, match="constant"):
        kernel_cka(x, torch.ones(40, 5), debiased=True)
    two = JointMoments(5, 5).update(x[:2], x[2:4])
    with pytest.raises(ValueError, match="2 rows are too few"):
        two.cka(debiased=True)
    with pytest.raises(ValueError, match="at least 4 rows"):
        kernel_cka(x[:3], x[:3], debiased=True)
