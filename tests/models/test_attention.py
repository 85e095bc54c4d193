from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subspan.models import attended_representation, attended_tokens, block_attention

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def llama(attention: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return llama("eager")


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def masks() -> tuple[Tensor, Tensor]:
    query, context = torch.zeros(2, 8, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    query[:, 5:], context[:, :5] = True, True
    return query, context


@pytest.mark.parametrize(
    ("weights", "mass", "kept"),
    [
        ([0.3, 0.05, 0.5, 0.15], 0.9, [0, 2, 3]),
        ([0.5, 0.25, 0.25], 0.75, [0, 1, 2]),  # exactly reached is not exceeded
        ([0.5, 0.25, 0.25], 0.74, [0, 1]),
        ([0.25, 0.5, 0.25], 0.6, [0, 1]),  # of equal ones the first
        ([0.0, 0.0, 0.0, 0.0], 0.5, [0, 1, 2]),
        ([2.0, 1.0], 1.0, [0, 1]),
        ([7.0], 0.1, [0]),
    ],
)
def test_the_fewest_tokens_whose_mass_exceeds_the_threshold(weights: list[float], mass: float, kept: list[int]) -> None:
    assert attended_tokens(torch.tensor(weights), mass).tolist() == kept


@pytest.mark.parametrize("block", [0, 1])
def test_the_early_exit_gives_what_the_full_pass_gives_bit_for_bit(
    model: nn.Module, batch: dict[str, Tensor], block: int
) -> None:
    full = model(**batch, output_attentions=True, output_hidden_states=True)
    attention, states = block_attention(model, batch, block)
    assert torch.equal(attention, full.attentions[block])
    assert torch.equal(states, full.hidden_states[block + 1])


def test_against_a_loop_over_the_full_pass(model: nn.Module, batch: dict[str, Tensor]) -> None:
    query, context = masks()
    full = model(**batch, output_attentions=True, output_hidden_states=True)
    vectors = attended_representation(model, batch, query, context, mass=0.6)
    for index in range(2):
        present = batch["attention_mask"][index].bool()
        attention = full.attentions[0][index].mean(0)
        asked = torch.nonzero(query[index] & present).flatten()
        candidates = torch.nonzero(context[index] & present).flatten().tolist()
        share = {j: sum(attention[q, j].item() for q in asked) for j in candidates}
        total, kept, reached = sum(share.values()), [], 0.0
        for j in sorted(candidates, key=lambda j: -share[j]):
            kept.append(j)
            reached += share[j] / total
            if reached > 0.6:
                break
        assert len(kept) < len(candidates) or index == 1
        torch.testing.assert_close(vectors[index], full.hidden_states[1][index, kept].mean(0))


def test_padding_in_the_masks_changes_nothing(model: nn.Module, batch: dict[str, Tensor]) -> None:
    query, context = masks()
    vectors = attended_representation(model, batch, query, context)
    alone = {key: value[1:, 3:] for key, value in batch.items()}
    without = attended_representation(model, alone, query[1:, 3:], context[1:, 3:])
    torch.testing.assert_close(vectors[1:], without)


def test_a_model_without_attention_weights_is_refused(batch: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        attended_representation(llama("sdpa"), batch, *masks())


def test_a_bert_encoder_is_read_as_well() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attn_implementation="eager",
    )  # fmt: skip
    bert = transformers.BertModel(config).eval()
    batch = {"input_ids": torch.randint(1, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    attention, states = block_attention(bert, batch)
    full = bert(**batch, output_attentions=True, output_hidden_states=True)
    assert torch.equal(attention, full.attentions[0])
    assert torch.equal(states, full.hidden_states[1])


def test_samples_without_query_or_context(model: nn.Module, batch: dict[str, Tensor]) -> None:
    query, context = masks()
    context[1, 3:] = False  # only padding is left
    with pytest.raises(ValueError, match="sample 1 "):
        attended_representation(model, batch, query, context)
    vectors = attended_representation(model, batch, query, context, on_empty="nan")
    assert vectors[1].isnan().all()
    assert vectors[0].isfinite().all()


@pytest.mark.parametrize(("mass", "message"), [(0.0, "mass"), (1.5, "mass"), (float("nan"), "mass")])
def test_wrong_mass(model: nn.Module, batch: dict[str, Tensor], mass: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attended_representation(model, batch, *masks(), mass=mass)


def test_wrong_mask_shape(model: nn.Module, batch: dict[str, Tensor]) -> None:
    query, context = masks()
    with pytest.raises(ValueError, match="query_mask: shape"):
        attended_representation(model, batch, query[:, 1:], context)


def test_attention_is_averaged_over_heads_and_over_the_query(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    weights = torch.zeros(1, 2, 5, 5)
    weights[0, :, 3, :3] = torch.tensor([0.6, 0.3, 0.1])
    weights[0, :, 4, :3] = torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.3, 0.7]])
    states = torch.tensor([0.0, 1, 4, 0, 0]).view(1, 5, 1).expand(1, 5, 2)
    monkeypatch.setattr("subspan.models.attention.block_attention", lambda *_: (weights, states))
    query, context = torch.arange(5)[None] > 2, torch.arange(5)[None] < 3
    # Shares of 0.35, 0.3 and 0.35: two tokens exceed 0.69 and not 0.75, which the largest entries' 0.4, 0.2, 0.4 would.
    for mass, expected in ((0.69, 4 / 2), (0.75, 5 / 3)):
        found = attended_representation(model, {"input_ids": torch.zeros(1, 5)}, query, context, mass)
        torch.testing.assert_close(found, torch.full((1, 2), expected))
