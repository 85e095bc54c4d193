"""Elastic nets by homotopy, compiled: many small problems, each from its own start (extra `fast`)."""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from .compiling import compiled

# An atom of which less than this share of its square is new to the support depends on it, up to rounding.
_DEPENDENT = 1e-6
# Optimality at the end, relative to the penalty.
_SETTLED = 1e-6
# What changes by less on the whole way, relative to the penalty, stays: a copy of an atom on the bound.
_STILL = 1e-9
# Rows of the inverse are filled up with zeros to whole vectors of the processor.
_VECTOR = 16


@compiled
@no_type_check
def elastic_net_homotopy(grams, linear, l1, l2, start, present, found, settled):
    """min c'Gc/2 - q'c + l1 |c|_1 + l2/2 |c|^2 for each row, exactly; `found` (b, s) and `settled` (b,) are written.

    grams (b, s, s): G, left in another order of atoms where the row is settled. linear (b, s): q. l1, l2 (b,):
    penalties, l1 > 0. start (b, s): where to begin. present (b, s): atoms that may be used. Every start is the answer
    for some other q; on the straight way from that q to the given one the answer is piecewise linear, and is followed
    from one change of the support to the next. From c = 0 this is LARS. settled: whether the conditions of optimality
    hold at the end; of equals, as rows that repeat, any may be chosen.
    Source: Efron et al., Least angle regression, 2004; Garrigues & El Ghaoui, A homotopy algorithm, 2008.
    """
    size = linear.shape[1]
    wide = (size // _VECTOR + 1) * _VECTOR
    # Of the Gram matrix of the support, with the ridge on its diagonal; zero beyond.
    inverse = np.zeros((wide, wide))
    inner, shares, step = np.zeros(wide), np.zeros(wide), np.zeros(wide)
    # Atoms in the order that they have here: the support is the first k.
    order = np.zeros(size, np.int64)
    c, slack, missing, change = np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size)
    # Of one type throughout, as every other is compiled for on its own.
    zero, none = np.int64(0), np.int64(-1)
    for row in range(len(linear)):
        gram, bound, ridge = grams[row], np.float64(l1[row]), np.float64(l2[row])
        n = zero  # atoms that may be used; the others come last
        for j in range(size):
            order[j] = j
        for j in range(size):
            if present[row, j]:
                _swap(gram, order, n, j)
                n += 1
        for j in range(n):
            c[j], slack[j], missing[j] = 0.0, linear[row, order[j]], 0.0
        k = zero
        for j in range(n):
            value = np.float64(start[row, order[j]])
            if value != 0:
                pivot = _pivot(inverse, gram, ridge, k, j, inner, shares)
                if pivot > 0:
                    _enter(inverse, k, shares, pivot)
                    _swap(gram, order, k, j)
                    slack[j], slack[k] = slack[k], slack[j]
                    c[k] = value
                    k += 1
        _subtract_products(slack, gram, c, k, zero, n)
        # The q that the start is the answer for: `slack` there, and what is `missing` of the q asked for.
        largest = bound
        for j in range(k, n):
            largest = max(largest, abs(slack[j]))
        for j in range(n):
            placed = slack[j]
            if j < k:
                slack[j] -= ridge * c[j]
                placed = np.copysign(bound, c[j])
            elif abs(slack[j]) > bound:
                placed = slack[j] * (bound / largest)
            missing[j], slack[j] = slack[j] - placed, placed
        inner[:k] = missing[:k]
        _multiply(inverse, inner, step, k)
        way, moved = 0.0, -1
        for _ in range(6 * size + 20):
            change[k:n] = missing[k:n]
            _subtract_products(change, gram, step, k, k, n)
            length, event = 1.0 - way, none
            for j in range(k):
                if c[j] * step[j] < 0 or (c[j] == 0 and order[j] != moved and slack[j] * step[j] < 0):
                    to = -c[j] / step[j]
                    if to < length:
                        length, event = to, j
            for j in range(k, n):
                # What has just left stands on the bound and goes inwards.
                if abs(change[j]) <= _STILL * bound or (order[j] == moved and change[j] * slack[j] > 0):
                    continue
                to = max(0.0, (np.copysign(bound, change[j]) - slack[j]) / change[j])
                if to < length:
                    length, event = to, j
            for j in range(k):
                c[j] += length * step[j]
            for j in range(k, n):
                slack[j] += length * change[j]
            way += length
            if event < 0:
                break
            moved = order[event]
            if event < k:
                k -= 1
                _leave(inverse, step, k, event, inner)
                c[event], c[k] = c[k], 0.0
                _exchange(gram, order, slack, missing, event, k)
                continue
            slack[event], value = np.copysign(bound, change[event]), 0.0
            pivot = _pivot(inverse, gram, ridge, k, event, inner, shares)
            if pivot == 0:
                # It takes over, at the same fit, from the atoms that it depends on, until one of those is at zero and
                # leaves for it.
                value, first = np.inf, none
                for j in range(k):
                    if c[j] * shares[j] * slack[event] > 0:
                        to = abs(c[j] / shares[j])
                        if to < value:
                            value, first = to, j
                if first >= 0:
                    value = np.copysign(value, slack[event])
                    for j in range(k):
                        c[j] -= value * shares[j]
                    moved = order[first]
                    k -= 1
                    _leave(inverse, step, k, first, inner)
                    c[first], c[k] = c[k], 0.0
                    _exchange(gram, order, slack, missing, first, k)
                    pivot = _pivot(inverse, gram, ridge, k, event, inner, shares)
                if pivot == 0:
                    # Left out from here on.
                    n -= 1
                    _exchange(gram, order, slack, missing, event, n)
                    continue
            fresh = missing[event]
            for j in range(k):
                fresh -= inner[j] * step[j]
            fresh /= pivot
            for j in range(k):
                step[j] -= fresh * shares[j]
            step[k] = fresh
            _enter(inverse, k, shares, pivot)
            _exchange(gram, order, slack, missing, event, k)
            c[k] = value
            k += 1
        # On the last support, from the problem itself and refined, free of what many steps left.
        n = zero
        for j in range(size):
            n += present[row, j]
        for j in range(k):
            inner[j], step[j] = linear[row, order[j]] - slack[j], 0.0
        for _ in range(2):
            _multiply(inverse, inner, shares, k)
            for j in range(k):
                step[j] += shares[j]
            for j in range(n):
                change[j] = linear[row, order[j]]
            _subtract_products(change, gram, step, k, zero, n)
            for j in range(k):
                change[j] -= ridge * step[j]
                inner[j] = change[j] - slack[j]
        settled[row] = True
        found[row] = 0
        for j in range(n):
            if j < k:
                found[row, order[j]] = step[j]
                at_fault = step[j] * slack[j] < 0 or abs(change[j] - slack[j]) > _SETTLED * bound
            else:
                at_fault = abs(change[j]) > (1 + _SETTLED) * bound
            if at_fault:
                settled[row] = False
        if not settled[row]:
            for j in range(size):
                while order[j] != j:
                    _swap(gram, order, j, order[j])
        for i in range(k):
            inverse[i, :k] = 0


@compiled
@no_type_check
def _swap(gram, order, i, j):
    """Let two atoms change places."""
    if i == j:
        return
    order[i], order[j] = order[j], order[i]
    for m in range(len(order)):
        gram[i, m], gram[j, m] = gram[j, m], gram[i, m]
    for m in range(len(order)):
        gram[m, i], gram[m, j] = gram[m, j], gram[m, i]


@compiled
@no_type_check
def _exchange(gram, order, slack, missing, i, j):
    _swap(gram, order, i, j)
    slack[i], slack[j] = slack[j], slack[i]
    missing[i], missing[j] = missing[j], missing[i]


@compiled
@no_type_check
def _subtract_products(values, gram, step, k, first, n):
    """values - G c from first to n, with c = step on the support; four atoms a pass."""
    part, whole = values[first:n], k // 4 * 4
    for i in range(0, whole, 4):
        g0, g1, g2, g3 = gram[i, first:n], gram[i + 1, first:n], gram[i + 2, first:n], gram[i + 3, first:n]
        s0, s1, s2, s3 = step[i], step[i + 1], step[i + 2], step[i + 3]
        for j in range(len(part)):
            part[j] -= s0 * g0[j] + s1 * g1[j] + s2 * g2[j] + s3 * g3[j]
    for i in range(whole, k):
        g0, s0 = gram[i, first:n], step[i]
        for j in range(len(part)):
            part[j] -= s0 * g0[j]


@compiled
@no_type_check
def _multiply(inverse, values, result, k):
    whole = (k + _VECTOR - 1) // _VECTOR * _VECTOR
    values[k:whole] = 0
    for i in range(k):
        line, total = inverse[i], 0.0
        for j in range(whole):
            total += line[j] * values[j]
        result[i] = total


@compiled
@no_type_check
def _add_outer(inverse, values, times, k):
    whole = (k + _VECTOR - 1) // _VECTOR * _VECTOR
    values[k:whole] = 0
    for i in range(k):
        line, share = inverse[i], times * values[i]
        for j in range(whole):
            line[j] += share * values[j]


@compiled
@no_type_check
def _pivot(inverse, gram, ridge, k, atom, inner, shares):
    """What of the atom's square the support leaves, 0 where that is rounding; its products with the support and the
    shares of the support in it are written to `inner` and `shares`.
    """
    for i in range(k):
        inner[i] = gram[atom, i]
    _multiply(inverse, inner, shares, k)
    square = gram[atom, atom] + ridge
    pivot = square
    for i in range(k):
        pivot -= inner[i] * shares[i]
    return pivot if pivot > _DEPENDENT * square else 0.0


@compiled
@no_type_check
def _enter(inverse, k, shares, pivot):
    """The inverse with one more row and column, for an atom with the shares and the pivot of `_pivot`."""
    _add_outer(inverse, shares, 1 / pivot, k)
    for i in range(k):
        inverse[k, i] = inverse[i, k] = -shares[i] / pivot
    inverse[k, k] = 1 / pivot


@compiled
@no_type_check
def _leave(inverse, step, last, place, column):
    """The inverse and the step without one atom, whose place the last one takes."""
    column[: last + 1] = inverse[place, : last + 1]
    times = step[place] / column[place]
    for i in range(last + 1):
        step[i] -= times * column[i]
    _add_outer(inverse, column, -1 / column[place], last + 1)
    step[place] = step[last]
    inverse[place, : last + 1] = inverse[last, : last + 1]
    for i in range(last + 1):
        inverse[i, place] = inverse[i, last]
    inverse[last, : last + 1] = 0
    for i in range(last + 1):
        inverse[i, last] = 0
