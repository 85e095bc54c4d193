"""Structured layers put into networks of torch, transformers and timm: same calls, same types, and a way back."""

import copy

import pytest
import torch
from torch import nn

from subspan.models import replace
from subspan.models.surgery import multiply_adds
from subspan.nn import Butterfly, GrassmannMixing, HouseholderProjector

pytestmark = pytest.mark.filterwarnings("ignore:matrix:UserWarning")


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def mixing(old):
    return GrassmannMixing(32, rank=4, offsets=(1, 2))


@pytest.mark.parametrize(
    ("site", "maker", "measured"),
    [
        ("layers.*.linear1", Butterfly.from_linear, True),
        ("layers.*.linear1", Butterfly.from_linear, False),
        # That an attention gives a tuple is seen in a run alone.
        ("layers.*.self_attn", mixing, True),
        ("layers.1.linear2", lambda old: HouseholderProjector.from_linear(old, 5), True),
        ("layers.1.linear2", lambda old: HouseholderProjector.from_linear(old, 5), False),
    ],
)
def test_an_encoder_of_torch_works_in_both_modes(site, maker, measured):
    model, x = encoder(), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before, masked = model(x), model(x, src_key_padding_mask=padding)
    surgery = replace(model, {site: maker}, x if measured else None)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.eval()(x.clone().requires_grad_()).detach())
        changed = model(x)
        assert changed.shape == before.shape
        assert not torch.allclose(changed, before)
        # The mask reaches attention alone, and its values need not be those of the slow path where rows are padding.
        assert torch.isfinite(model(x, src_key_padding_mask=padding)).all()
    for parameter in copy.deepcopy(model).train().parameters():
        assert parameter.requires_grad
    model.train()(x).sum().backward()
    model.eval()
    surgery.undo()
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding), masked, rtol=0, atol=0)


def test_one_module_in_several_places_and_inputs_by_keyword():
    class Caller(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.second(input=self.first(input=x))

    class Double(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, input):
            assert input.dtype == torch.float32
            return self.scale * input

    model, x = Caller().bfloat16(), torch.randn(3, 4).bfloat16()
    replace(model, {"first": Double(), "second": Double()}, x)
    assert torch.equal(model(x), 4 * x)

    model, x, layer = encoder(), torch.randn(2, 5, 32), mixing(None)
    replace(model, {"layers.*.self_attn": layer}, x)
    assert model.layers[0].self_attn is model.layers[1].self_attn is layer
    assert model(x).shape == x.shape


def test_a_new_module_takes_the_mode_and_keeps_its_frozen_parts():
    frozen = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    frozen[1].eval()
    model = nn.Sequential(nn.Linear(4, 4))
    replace(model, {"0": frozen}, torch.randn(3, 4))
    assert model[0].training
    assert not model[0][1].training
    still = nn.Sequential(nn.Linear(4, 4)).eval()
    replace(still, {"0": nn.Sequential(nn.BatchNorm1d(4))})
    assert not still[0][0].training


def test_attention_counts_its_maps():
    attention = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    assert multiply_adds(attention, x, x, x) == 2 * 5 * 4 * 32 * 32


def test_a_failure_leaves_no_hooks_behind():
    model, x = encoder(), torch.randn(2, 5, 32)
    layer = mixing(None)
    with pytest.raises(ValueError, match="nothing was replaced"):
        replace(model, {"layers.0.self_attn": layer, "layers.1.linear1": nn.Linear(32, 8)}, x)
    assert isinstance(model.layers[0].self_attn, nn.MultiheadAttention)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert not hasattr(layer, "batch_first")


def test_errors_are_those_of_the_first_run_though_it_fills_a_cache():
    transformers = pytest.importorskip("transformers", reason="language models come with transformers (extra: llm)")
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    config = transformers.LlamaConfig(num_attention_heads=4, attn_implementation="eager", **options)
    model = transformers.LlamaForCausalLM(config).eval()
    layer, ids = mixing(None), torch.randint(50, (2, 12))
    errors = []
    for cached in (False, True):
        surgery = replace(model, {"model.layers.0.self_attn": layer}, {"input_ids": ids, "use_cache": cached})
        errors.append(surgery.sites[0].error)
        surgery.undo()
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cached", [True, False])
def test_a_language_model_of_transformers_still_generates_and_trains(dtype, cached):
    transformers = pytest.importorskip("transformers", reason="language models come with transformers (extra: llm)")
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **options)
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    ids = torch.randint(50, (2, 12))
    before = model(ids).logits.detach()
    example = {"input_ids": ids, "use_cache": cached}
    full = {"model.layers.*.mlp.up_proj": lambda old: ExactLinear(old)}
    surgery = replace(model, full, example)
    assert max(site.error or 0 for site in surgery.sites) < (1e-6 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    surgery.undo()

    sites = {
        "model.layers.*.self_attn": mixing,
        "model.layers.*.mlp.down_proj": lambda old: HouseholderProjector.from_linear(old, 8),
        "model.layers.*.mlp.up_proj": Butterfly.from_linear,
    }
    surgery = replace(model, sites, example)
    assert [site.name.split(".")[-1] for site in surgery.sites] == ["self_attn"] * 2 + ["down_proj"] * 2 + [
        "up_proj"
    ] * 2
    assert all(site.error is not None and site.multiply_adds for site in surgery.sites)
    logits = model(ids).logits
    assert logits.dtype == dtype
    # What comes later is not seen, through layers that take the place of attention too.
    later = ids.clone()
    later[:, 8:] = 7
    assert torch.equal(model(later, use_cache=False).logits[:, :8], logits[:, :8])
    assert model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False).shape == (2, 15)
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].self_attn.parameters())
    surgery.undo()
    torch.testing.assert_close(model.eval()(ids).logits, before, rtol=0, atol=0)


class ExactLinear(nn.Module):
    """The same map, in float32."""

    def __init__(self, old):
        super().__init__()
        self.weight = nn.Parameter(old.weight.detach().float())

    def forward(self, x):
        assert x.dtype == torch.float32
        return x @ self.weight.mT


def test_a_vision_transformer_of_timm_by_name():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    surgery = replace(model, {"blocks.*.mlp.fc1": Butterfly.from_linear, "head": nn.Linear(192, 1000)}, x)
    assert len(surgery.sites) == 3
    assert model(x).shape == before.shape
    assert torch.equal(surgery.undo()(x), before)
