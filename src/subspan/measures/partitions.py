"""How good a clustering is: against true labels, and against a graph or an affinity without them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix

from subspan.solvers import assign, symmetric_normalized


def clustering_accuracy(truth: Any, labels: Any) -> float:
    """Share of items whose cluster is matched to their class, in the best one-to-one matching (Hungarian method).

    Parameters
    ----------
    truth, labels
        (n,) classes and clusters, numbered or named in any way.

    Returns
    -------
    Share in (0, 1].

    Examples
    --------
    >>> from subspan.measures import clustering_accuracy
    >>> clustering_accuracy(["a", "a", "b", "b"], [1, 1, 0, 1])
    0.75
    """
    counted: Any = contingency_matrix(*_two(truth, labels))
    table = counted.astype(np.float64)
    chosen = assign(table, random_state=None).numpy()
    rows = np.flatnonzero(chosen >= 0)
    return float(table[rows, chosen[rows]].sum() / table.sum())


def pairwise_f1(truth: Any, labels: Any) -> float:
    """F1 of the pairs of items put together, against those that belong together.

    Parameters
    ----------
    truth, labels
        (n,) classes and clusters, numbered or named in any way.

    Returns
    -------
    Score in [0, 1]; 0 where there are no pairs of either kind.

    Examples
    --------
    >>> from subspan.measures import pairwise_f1
    >>> pairwise_f1([0, 0, 1, 1], [5, 5, 3, 3]), pairwise_f1([0, 0, 1, 1], [0, 1, 0, 1])
    (1.0, 0.0)
    """
    (_, wrong), (missed, right) = pair_confusion_matrix(*_two(truth, labels)).astype(np.float64)
    whole = 2 * right + wrong + missed
    return float(2 * right / whole) if whole else 0.0


def partition_scores(truth: Any, labels: Any) -> dict[str, float]:
    """The usual scores of a clustering against true labels: accuracy, NMI, ARI and pairwise F1.

    Parameters
    ----------
    truth, labels
        (n,) classes and clusters, numbered or named in any way.

    Returns
    -------
    Scores by name, each best at 1.

    Examples
    --------
    >>> from subspan.measures import partition_scores
    >>> partition_scores([0, 0, 1, 1], [1, 1, 0, 0])
    {'accuracy': 1.0, 'NMI': 1.0, 'ARI': 1.0, 'pairwise F1': 1.0}
    """
    return {
        "accuracy": clustering_accuracy(truth, labels),
        "NMI": float(normalized_mutual_info_score(truth, labels)),
        "ARI": float(adjusted_rand_score(truth, labels)),
        "pairwise F1": pairwise_f1(truth, labels),
    }


def feature_detection_error(representation: Any, truth: Any) -> float:
    """Mean over items of the share of |coefficients| on items of other classes.

    Also called subspace-preserving error: 0 when every item is expressed by its own class alone.

    Parameters
    ----------
    representation
        (n, n) coefficients, a row an item, dense or sparse; rows of zeros count as 1.
    truth
        (n,) classes.

    Returns
    -------
    Error in [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import feature_detection_error
    >>> codes = np.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> round(feature_detection_error(codes, [0, 0, 1]), 4)  # the mean of 1/4, 0 and 1
    0.4167
    """
    matrix = abs(sparse.coo_matrix(representation))
    classes = np.asarray(truth)
    n = matrix.shape[0]
    if len(classes) != n:
        raise ValueError(f"truth: expected {n} labels, got {len(classes)}")
    total = np.bincount(matrix.row, weights=matrix.data, minlength=n)
    own = classes[matrix.row] == classes[matrix.col]
    inside = np.bincount(matrix.row[own], weights=matrix.data[own], minlength=n)
    return float(1 - np.where(total > 0, inside / np.where(total > 0, total, 1), 0.0).mean())


def connectivity(affinity: Any, truth: Any) -> tuple[float, float]:
    """Least and mean over classes of the second smallest eigenvalue of the class's normalised Laplacian.

    0 where a class falls apart into components: then a clustering may split it whatever the rounding does.

    Parameters
    ----------
    affinity
        (n, n) symmetric, dense or sparse.
    truth
        (n,) classes.

    Returns
    -------
    Least and mean eigenvalue, in [0, 2].

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import connectivity
    >>> affinity = np.zeros((4, 4))
    >>> affinity[0, 1] = affinity[1, 0] = 1.0  # items 2 and 3 of the other class are not joined
    >>> least, mean = connectivity(affinity, [0, 0, 1, 1])
    >>> round(least, 6), round(mean, 6)
    (0.0, 1.0)
    """
    matrix, classes = sparse.csr_matrix(affinity), np.asarray(truth)
    values = []
    for name in np.unique(classes):
        members = np.flatnonzero(classes == name)
        block = sparse.csr_matrix(matrix[members][:, members])
        if len(members) < 2 or connected_components(block, directed=False)[0] > 1:
            values.append(0.0)
            continue
        eigenvalues = np.linalg.eigvalsh(np.eye(len(members)) - symmetric_normalized(block).toarray())
        values.append(float(max(eigenvalues[1], 0.0)))
    return min(values), float(np.mean(values))


def modularity(adjacency: Any, labels: Any, *, gamma: float = 1.0) -> float:
    """Newman's modularity of a partition of an undirected weighted graph.

    Parameters
    ----------
    adjacency
        (n, n) symmetric, dense or sparse.
    labels
        (n,) clusters.
    gamma
        Resolution: a larger one favours smaller clusters.

    Returns
    -------
    Modularity; at most 1, and 0 for one cluster at `gamma` 1.

    Raises
    ------
    ValueError
        For another number of labels, and a graph without edges.

    References
    ----------
    Newman & Girvan (2004), arXiv cond-mat/0308217.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import modularity
    >>> pairs = np.kron(np.eye(2), np.ones((2, 2)))  # two separate pairs
    >>> modularity(pairs, [0, 0, 1, 1]), modularity(pairs, [0, 0, 0, 0])
    (0.5, 0.0)
    """
    inside, degree = _cluster_weights(adjacency, labels)
    total = degree.sum()
    if total == 0:
        raise ValueError("adjacency: has no edges, so a partition of it has no modularity")
    return float((inside / total - gamma * (degree / total) ** 2).sum())


def attribute_modularity(attributes: Any, labels: Any) -> float:
    """Newman's modularity of a partition of n items in the graph XX' of their attributes X, which is not formed.

    Beside `modularity` in a graph of the items it sees what walks in the graph wash out: the product of the two ranked
    settings of `cluster.S2CAG` by their accuracy, either alone did not.

    Parameters
    ----------
    attributes
        X (n, d) >= 0, dense or sparse.
    labels
        (n,) clusters.

    Returns
    -------
    Modularity, at most 1.

    Raises
    ------
    ValueError
        For negative attributes or all zero, and another number of labels.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import attribute_modularity
    >>> attribute_modularity(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), [0, 0, 1, 1])
    0.5
    """
    x: Any = sparse.csr_matrix(attributes)
    if x.nnz and x.data.min() < 0:
        raise ValueError("attributes: must be >= 0, so that XX' is a graph")
    numbers = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
    if len(numbers) != x.shape[0]:
        raise ValueError(f"labels: expected {x.shape[0]}, got {len(numbers)}")
    member: Any = sparse.csr_matrix((np.ones(len(numbers)), (numbers, np.arange(len(numbers)))))
    sums = (member @ x).toarray()
    inside, volume = (sums**2).sum(1), sums @ sums.sum(0)
    if not volume.sum() > 0:
        raise ValueError("attributes: are all zero, so a partition of them has no modularity")
    return float((inside / volume.sum() - (volume / volume.sum()) ** 2).sum())


def conductance(adjacency: Any, labels: Any) -> float:
    """Mean over clusters of the weight of their edges to others over their volume.

    Parameters
    ----------
    adjacency
        (n, n) symmetric, dense or sparse.
    labels
        (n,) clusters.

    Returns
    -------
    Share in [0, 1]; 0 is best, empty volumes count 0.

    Examples
    --------
    >>> import numpy as np
    >>> from subspan.measures import conductance
    >>> pairs = np.kron(np.eye(2), np.ones((2, 2)))  # two separate pairs
    >>> conductance(pairs, [0, 0, 1, 1]), conductance(pairs, [0, 1, 0, 1])
    (0.0, 0.5)
    """
    inside, degree = _cluster_weights(adjacency, labels)
    return float(np.where(degree > 0, 1 - inside / np.where(degree > 0, degree, 1), 0.0).mean())


def _cluster_weights(adjacency: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weight inside each cluster (both directions of an edge) and volume of each."""
    matrix: Any = sparse.coo_matrix(adjacency)
    numbers: Int[np.ndarray, " n"] = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
    if len(numbers) != matrix.shape[0]:
        raise ValueError(f"labels: expected {matrix.shape[0]}, got {len(numbers)}")
    k = int(numbers.max()) + 1
    same = numbers[matrix.row] == numbers[matrix.col]
    inside = np.bincount(numbers[matrix.row[same]], weights=matrix.data[same], minlength=k)
    return inside, np.bincount(numbers[matrix.row], weights=matrix.data, minlength=k)


def _two(truth: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x.tolist() if hasattr(x, "tolist") else list(x)) for x in (truth, labels))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"labels: expected as many as true labels ({len(a)}), got shape {b.shape}")
    return a, b
