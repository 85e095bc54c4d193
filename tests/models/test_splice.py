from __future__ import annotations

import pytest
import torch
from torch import nn

from subspan.models.splice import IGNORED, PLACEHOLDER, splice_embeddings


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 3)

    def get_input_embeddings(self):
        return self.table


def by_hand(model, embeddings, ids, mask, labels):
    """Row by row, with lists."""
    vectors, masks, targets = [], [], []
    for row in range(len(ids)):
        place = ids[row].tolist().index(PLACEHOLDER)
        n = len(embeddings[row])
        before, after = slice(0, place), slice(place + 1, None)
        vectors.append(torch.cat([model.table(ids[row, before]), embeddings[row], model.table(ids[row, after])]))
        masks.append(torch.cat([mask[row, before], torch.ones(n, dtype=mask.dtype), mask[row, after]]))
        targets.append(torch.cat([labels[row, before], torch.full((n,), IGNORED), labels[row, after]]))
    return torch.stack(vectors), torch.stack(masks), torch.stack(targets)


@pytest.mark.parametrize("n", [1, 4])
def test_embeddings_stand_where_the_placeholder_was(n):
    model = Model()
    ids = torch.tensor([[PLACEHOLDER, 4, 5, 6, 0], [3, 4, PLACEHOLDER, 7, 8], [0, 0, 1, 2, PLACEHOLDER]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    labels = ids.masked_fill(ids == PLACEHOLDER, IGNORED)
    embeddings = torch.randn(3, n, 3, generator=torch.Generator().manual_seed(0))
    got = splice_embeddings(model, embeddings, ids, mask, labels)
    for ours, expected in zip(got, by_hand(model, embeddings, ids, mask, labels)):
        torch.testing.assert_close(ours, expected)
    bare = splice_embeddings(model, embeddings, ids)
    assert bare.labels is None
    assert bool((bare.attention_mask == 1).all())


def test_gradients_reach_the_embeddings():
    embeddings = torch.randn(1, 2, 3, requires_grad=True)
    splice_embeddings(Model(), embeddings, torch.tensor([[1, PLACEHOLDER]])).inputs_embeds.sum().backward()
    assert embeddings.grad is not None
    assert bool((embeddings.grad == 1).all())


@pytest.mark.parametrize(
    ("ids", "width", "message"),
    [
        ([[1, 2]], 3, "row 0 has 0"),
        ([[1, PLACEHOLDER], [PLACEHOLDER] * 2], 3, "row 1 has 2"),
        ([[PLACEHOLDER]], 4, "width 3"),
    ],
)
def test_bad_input_is_named(ids, width, message):
    with pytest.raises(ValueError, match=message):
        splice_embeddings(Model(), torch.zeros(len(ids), 1, width), torch.tensor(ids))


def test_spliced_positions_are_attended_to_whatever_is_behind_the_placeholder():
    ids = torch.tensor([[5, PLACEHOLDER, 0, 0]])
    spliced = splice_embeddings(Model(), torch.ones(1, 3, 3), ids, torch.tensor([[1, 1, 0, 0]]))
    assert spliced.attention_mask.tolist() == [[1, 1, 1, 1, 0, 0]]
