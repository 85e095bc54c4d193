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


def test_functions_get_samples_first_where_a_layer_has_tokens_first() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.Sequential(layer, nn.Identity()).eval()
    x = torch.randn(5, 3, 8)  # five tokens of three samples
    seen = []

    def first_token_alone(states: Tensor) -> Tensor:
        seen.append(states.shape)
        return torch.cat([states[:, :1] + 1, states[:, 1:]], 1)

    with torch.no_grad(), intervene(model, "0", first_token_alone, layout="tokens_first"):
        changed = model(x)
    with torch.no_grad():
        torch.testing.assert_close(changed[0], model(x)[0] + 1)
        torch.testing.assert_close(changed[1:], model(x)[1:])
    assert seen == [(3, 5, 8)]

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    with torch.no_grad(), intervene(Batched(), "inner.0", first_token_alone) as batched:
        torch.testing.assert_close(batched(x.transpose(0, 1)).transpose(0, 1), changed)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("site", ["output", "input"])
def test_nested_states_reach_the_function_padded(site: str) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3).eval()
    x, padding = torch.randn(3, 6, 8), torch.arange(6) >= torch.tensor([[4], [5], [2]])
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padding)
        with intervene(model, "layers.1", lambda states: states + 0, site=site):
            torch.testing.assert_close(model(x, src_key_padding_mask=padding), before, atol=1e-5, rtol=1e-5)
        with intervene(model, "layers.1", lambda states: states + torch.arange(8), site=site):
            changed = model(x, src_key_padding_mask=padding)
            one = model(x[:1, :4])
    torch.testing.assert_close(changed[:1, :4], one, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed[:1, :4], before[:1, :4], atol=0.1)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.inner, self.last = reentrant, nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self.inner(x))
        return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("layer", ["inner.0", "inner"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_changes_of_checkpointed_layers_are_in_the_gradients_or_refused(reentrant: bool, layer: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for model in (Checkpointed(None), Checkpointed(reentrant)):
        with intervene(model, layer, lambda states: 2 * states):
            model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    model = Checkpointed(reentrant)
    with pytest.raises(ValueError, match="run that within the block too"), intervene(model, layer, lambda s: 2 * s):
        model(x)
    changed = intervene(model, layer, lambda s: 2 * s)
    changed.__enter__().zero_grad()
    model(x).sum().backward()
    model(x)
    with pytest.raises(ValueError, match="run that within the block too"):
        changed.__exit__(None, None, None)
    with torch.no_grad(), intervene(model, layer, lambda s: 2 * s):
        model(x)
    with intervene(Checkpointed(None), layer, lambda s: 2 * s) as plain:
        plain(x)
