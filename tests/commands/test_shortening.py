"""Ways to shorten stored vectors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from subspan.commands import shortening
from subspan.datasets import Rows


@pytest.mark.parametrize(("columns", "sizes"), [(5, [5]), (8, [8]), (32, [8, 16, 32]), (40, [8, 16, 32, 40])])
def test_a_rotation_is_trained_for_the_powers_of_two_from_eight_and_for_all_columns(
    columns: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def model(prefixes: list[int], *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(
            fit=lambda rows: asked.append((prefixes, rows.shape)), transform=lambda rows: rows, subspace_=None
        )

    monkeypatch.setattr(shortening, "Matryoshka", model)
    head = shortening.matryoshka_head(Rows(np.eye(50, dtype=np.float32), "x"), columns, seed=0)
    assert asked == [(sizes, (50, 50))]
    assert head.columns == columns
