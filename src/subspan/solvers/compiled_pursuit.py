"""Orthogonal matching pursuit from Gram matrices, compiled: one row after the other, in a cache (extra `fast`)."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from .compiling import compiled


@compiled
@no_type_check
def gram_pursuit_rows(products, squares, gram, tolerance, least, chosen, values):
    """Orthogonal matching pursuit of each row; `chosen` and `values` (n, s), zeros before, are written.

    products (n, k): with the atoms. squares (n,): of the rows. gram (k, k): of the atoms. A row stops at a squared
    residual of `tolerance`, and at an atom of which no more than `least` of the square is new to those it has.
    After each choice only the products of one new direction with all atoms are worked out, from those of the
    directions before: s² k / 2 multiplications a row, on s k numbers that stay in the processor's second cache.
    """
    n_atoms, n_nonzero = products.shape[1], chosen.shape[1]
    # Products of the orthonormal directions with all atoms; with the chosen ones they are the Cholesky factor.
    along = np.empty((n_nonzero, n_atoms), gram.dtype)
    triangle = np.empty((n_nonzero, n_nonzero), gram.dtype)
    weights, left = np.empty(n_nonzero, gram.dtype), np.empty(n_atoms, gram.dtype)
    for row in range(len(products)):
        left[:] = products[row]
        rest, step = squares[row], 0
        while step < n_nonzero and rest > tolerance:
            atom = _largest(left)
            square, inner = gram[atom, atom], triangle[step]
            for i in range(step):
                inner[i] = along[i, atom]
                square -= inner[i] * inner[i]
            # Not so where all that is left is a duplicate of what was chosen.
            if not (square > least and left[atom] != 0):
                break
            length = np.sqrt(square)
            fresh = along[step]
            fresh[:] = gram[atom]
            _subtract(fresh, along, inner, step)
            weight = left[atom] / length
            for a in range(n_atoms):
                fresh[a] /= length
                left[a] -= weight * fresh[a]
            left[atom] = 0
            inner[step], weights[step] = length, weight
            chosen[row, step] = atom
            rest -= weight * weight
            step += 1
        for i in range(step - 1, -1, -1):
            value = weights[i] / triangle[i, i]
            values[row, i] = value
            for j in range(i):
                weights[j] -= value * triangle[i, j]


@compiled
@no_type_check
def _largest(values):
    """Place of the largest by magnitude, the first of equals."""
    most = abs(values[0])
    for value in values:
        most = max(most, abs(value))
    for place in range(len(values)):
        if abs(values[place]) == most:
            return place
    return 0


@compiled
@no_type_check
def _subtract(values, lines, factors, n):
    """values - factors[:n] lines[:n], eight lines a pass."""
    whole = n // 8 * 8
    for i in range(0, whole, 8):
        a0, a1, a2, a3 = lines[i], lines[i + 1], lines[i + 2], lines[i + 3]
        a4, a5, a6, a7 = lines[i + 4], lines[i + 5], lines[i + 6], lines[i + 7]
        f0, f1, f2, f3 = factors[i], factors[i + 1], factors[i + 2], factors[i + 3]
        f4, f5, f6, f7 = factors[i + 4], factors[i + 5], factors[i + 6], factors[i + 7]
        for j in range(len(values)):
            first = f0 * a0[j] + f1 * a1[j] + f2 * a2[j] + f3 * a3[j]
            values[j] -= first + (f4 * a4[j] + f5 * a5[j] + f6 * a6[j] + f7 * a7[j])
    for i in range(whole, n):
        line, factor = lines[i], factors[i]
        for j in range(len(values)):
            values[j] -= factor * line[j]
