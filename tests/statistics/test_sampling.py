"""Rows drawn from a stream."""

import torch

from subspan.statistics import UniformSample


def drawn(keep, seed, sizes):
    generator, start = torch.Generator().manual_seed(seed), 0
    sample = UniformSample(keep, generator)
    for size in sizes:
        places = torch.arange(start, start + size)
        sample.update(places, 10.0 * places.unsqueeze(1))
        start += size
    return sample.rows()


def test_every_row_has_the_same_chance_whatever_the_batches():
    counts = torch.zeros(60)
    for seed in range(600):
        places, rows = drawn(12, seed, (5, 30, 1, 24))
        assert len(places) == 12
        assert bool((places.diff() > 0).all())
        assert torch.equal(rows[:, 0], 10.0 * places)
        counts[places] += 1
    # 600 draws of one row in five: 120 each, standard deviation 10.
    assert float((counts - 120).abs().max()) < 45
    assert abs(float(counts[:30].mean()) - 120) < 8


def test_few_rows_are_all_kept():
    assert drawn(12, 0, (3, 4))[0].tolist() == list(range(7))
