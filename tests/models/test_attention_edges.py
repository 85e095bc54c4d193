"""Rows of attention are those of the whole, and a cut edge is zero where it was cut and nowhere else."""

import pytest
import torch

from subspan.models.attention_edges import attention_rows, cut_attention, edges_between

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
KINDS = ("llama", "gpt2", "bert", "gemma")


def made(kind, attention):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    if kind == "llama":
        config = transformers.LlamaConfig(**sizes, intermediate_size=24, num_key_value_heads=2)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=4)
    elif kind == "bert":
        config = transformers.BertConfig(**sizes, intermediate_size=24)
    else:
        # A sliding window in some of the layers.
        config = transformers.Gemma3TextConfig(
            **sizes, intermediate_size=24, num_key_value_heads=1, head_dim=8, sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )  # fmt: skip
    return transformers.AutoModel.from_config(config, attn_implementation=attention).eval()


def batches():
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    return {"padded": {"input_ids": ids, "attention_mask": mask}, "full": {"input_ids": ids}}


def whole(model, batch):
    with torch.no_grad():
        return model(**batch, output_attentions=True).attentions


@pytest.mark.parametrize("batch", ["padded", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_whole_attention_however_it_is_computed(kind, batch):
    inputs, queries = batches()[batch], torch.tensor([[3, 7], [6, 5]])
    expected = whole(made(kind, "eager"), inputs)
    for attention in ("sdpa", "eager"):
        model = made(kind, attention)
        rows = attention_rows(model, inputs, queries)
        assert len(rows) == 3
        for found, weights in zip(rows.values(), expected):
            wanted = torch.stack([weights[i, :, queries[i]] for i in range(2)])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert list(attention_rows(model, inputs, queries, [-1])) == [list(rows)[-1]]
    with pytest.raises(ValueError, match="queries"):
        attention_rows(model, inputs, queries + 1)


@pytest.mark.parametrize("batch", ["padded", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_edges_are_zero_there_and_nowhere_else(kind, batch):
    inputs = batches()[batch]
    queries, keys = torch.zeros(2, 2, 8, dtype=torch.bool)
    queries[:, 6:], keys[:, 4:7] = True, True
    edges = edges_between(queries, keys)
    assert edges.nonzero().tolist() == [[b, q, k] for b in (0, 1) for q in (6, 7) for k in (4, 5, 6) if k <= q]
    model = made(kind, "eager")
    before = whole(model, inputs)
    with cut_attention(model, edges, [1], heads=[0, 2]):
        found = whole(model, inputs)
    torch.testing.assert_close(found[0], before[0])
    assert float(found[1][:, [0, 2]][:, :, 7, 4:7].abs().max()) == 0
    torch.testing.assert_close(found[1][:, [1, 3]], before[1][:, [1, 3]])
    torch.testing.assert_close(found[1][:, :, 3:6], before[1][:, :, 3:6])
    rest = before[1][0, 0, 7].clone()
    rest[4:7] = 0
    torch.testing.assert_close(found[1][0, 0, 7], rest / rest.sum(), atol=1e-5, rtol=1e-4)
    # A token sees itself, and later layers see what came of it.
    assert float(found[1][0, 0, 6, 6]) > 0
    assert not torch.equal(found[2], before[2])
    for again, once in zip(whole(model, inputs), before):
        assert torch.equal(again, once)
    with torch.no_grad(), cut_attention(model, edges, [1], heads=[0, 2]):
        eager = model(**inputs).last_hidden_state
    fast = made(kind, "sdpa")
    with torch.no_grad(), cut_attention(fast, edges, [1], heads=[0, 2]):
        present = inputs.get("attention_mask", torch.ones(2, 8)) != 0
        torch.testing.assert_close(fast(**inputs).last_hidden_state[present], eager[present], atol=1e-5, rtol=1e-4)


def test_nothing_cut_changes_nothing_and_self_may_be_cut_too():
    model, inputs = made("llama", "sdpa"), batches()["padded"]
    with torch.no_grad():
        before = model(**inputs).last_hidden_state
        none = torch.zeros(2, 8, 8, dtype=torch.bool)
        with cut_attention(model, none), cut_attention(model, ~none, []):
            torch.testing.assert_close(model(**inputs).last_hidden_state[0], before[0], atol=1e-6, rtol=1e-5)
        itself = torch.eye(8, dtype=torch.bool).expand(2, 8, 8)
        with cut_attention(model, itself):
            torch.testing.assert_close(model(**inputs).last_hidden_state[0], before[0], atol=1e-6, rtol=1e-5)
        with cut_attention(model, itself, keep_self=False):
            rows = attention_rows(model, inputs, torch.full((2, 1), 5))
        assert all(float(row[:, :, 0, 5].max()) == 0 for row in rows.values())
    for wrong, options, named in (
        (none[:1], {}, "edges"),
        (none, {"heads": [4]}, "heads"),
        (none, {"blocks": 7}, "layers"),
    ):
        with pytest.raises(ValueError, match=named), cut_attention(model, wrong, **options):
            model(**inputs)
