from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subspan.models import capture, intervene, iterate_representations

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, attn_implementation="eager")
    return transformers.GPT2Model(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 40, (2, 5), generator=torch.Generator().manual_seed(0))


def state(model: nn.Module, ids: Tensor, layer: str) -> Tensor:
    return next(iterate_representations(model, [ids], layer, pool="none"))


def test_the_change_is_seen_downstream_and_gone_after_the_block(gpt2: nn.Module, ids: Tensor) -> None:
    before, states = gpt2(ids).last_hidden_state, state(gpt2, ids, "h.1")
    with intervene(gpt2, "h.1", lambda states: states * 2):
        assert torch.equal(state(gpt2, ids, "h.1"), 2 * states)
        assert not torch.allclose(gpt2(ids).last_hidden_state, before)
    assert torch.equal(gpt2(ids).last_hidden_state, before)
    assert not any(module._forward_hooks for module in gpt2.modules())


def test_a_tuples_other_entries_are_kept(gpt2: nn.Module, ids: Tensor) -> None:
    with capture(gpt2, "h.0.attn", item=1) as weights:
        gpt2(ids)
    replaced = intervene(gpt2, "h.0.attn", torch.zeros_like)
    with replaced, capture(gpt2, "h.0.attn", item=1) as kept, capture(gpt2, "h.0.attn") as states:
        gpt2(ids)
    assert torch.equal(kept["h.0.attn"], weights["h.0.attn"])
    assert states["h.0.attn"].abs().max() == 0


def test_inputs_can_be_changed(gpt2: nn.Module, ids: Tensor) -> None:
    with intervene(gpt2, 1, lambda states: states + 1):
        through_output = gpt2(ids).last_hidden_state
    with intervene(gpt2, 2, lambda states: states + 1, site="input"):
        through_input = gpt2(ids).last_hidden_state
    assert torch.equal(through_output, through_input)


def test_a_mapping_gives_each_layer_its_own_change_and_the_identity_changes_nothing(
    gpt2: nn.Module, ids: Tensor
) -> None:
    plain = gpt2(ids).last_hidden_state
    with intervene(gpt2, {"h.0": lambda states: states, "h.2": lambda states: states.clone()}):
        assert torch.equal(gpt2(ids).last_hidden_state, plain)
    with intervene(gpt2, {"h.*": torch.zeros_like}):
        assert torch.equal(state(gpt2, ids, "h.1"), torch.zeros(2, 5, 16))


def test_dtype_is_put_back_and_the_function_may_compute_in_another() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).to(torch.bfloat16)
    with intervene(model, 0, lambda states: states.double()):
        assert model(torch.ones(2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_feature_maps_reach_the_function_with_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    images, only_first = torch.rand(2, 3, 4, 4), torch.tensor([1.0, 0, 0, 0])
    with intervene(model, 0, lambda rows: rows * only_first), capture(model, "0") as states:
        model(images)
    assert states["0"].shape == (2, 4, 4, 4)
    assert states["0"][:, 0].abs().min() > 0
    assert states["0"][:, 1:].abs().max() == 0


def test_a_changed_shape_is_an_error_and_leaves_no_hook(gpt2: nn.Module, ids: Tensor) -> None:
    with (
        pytest.raises(ValueError, match=r"at layer 'h\.1' it must return the shape"),
        intervene(gpt2, 1, lambda s: s[:, 1:]),
    ):
        gpt2(ids)
    assert not any(module._forward_hooks for module in gpt2.modules())


def test_wrong_arguments_are_named(gpt2: nn.Module) -> None:
    with pytest.raises(ValueError, match="function: needed"), intervene(gpt2, 0):
        pass
    with pytest.raises(ValueError, match=r"has no layer 'h\.9'"), intervene(gpt2, {"h.9": torch.zeros_like}):
        pass
