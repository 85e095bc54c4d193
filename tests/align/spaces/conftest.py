from __future__ import annotations

import pytest

from paired_spaces import planted


@pytest.fixture(scope="module")
def data():
    x, y, basis = planted(4200)
    return x[:4000], y[:4000], x[4000:], y[4000:], basis
