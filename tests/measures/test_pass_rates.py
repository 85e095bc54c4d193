"""Chances of solving a task in k tries, against all subsets of the tries."""

from itertools import combinations

import numpy as np
import pytest

from subspan.measures import pass_at_k


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_chances_are_those_of_all_subsets(k):
    solved = np.array([[i < count for i in range(6)] for count in range(7)])
    expected = [np.mean([row[list(some)].any() for some in combinations(range(6), k)]) for row in solved]
    assert pass_at_k(solved, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 7])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match="k: an integer from 1 to the number of tries 6"):
        pass_at_k(np.ones((2, 6), bool), k)
