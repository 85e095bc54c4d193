"""Low-rank changes: the same function at the start, the same after merging, and the same through an adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from subspan.geometry import Subspace
from subspan.models.low_rank import LowRankChange, add_low_rank


def made(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5, bias=False)).to(dtype)


def trained(edit, model, x, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    return model(x).detach()


def starts():
    generator = torch.Generator().manual_seed(1)
    outputs = Subspace.random(8, 2, generator=generator, dtype=torch.float32)
    inputs = Subspace.random(6, 2, generator=generator, dtype=torch.float32)
    return {"outputs": (outputs, "output"), "inputs": (inputs, "input"), "own": (3, "output")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["outputs", "inputs", "own"])
def test_the_function_is_the_same_at_the_start_and_the_base_is_not_touched(kind, dtype):
    model, x = made(dtype), torch.randn(4, 3, 6).to(dtype)
    before, kept = model(x), model[0].weight.clone()
    start, side = starts()[kind]
    edit = add_low_rank(model, {"0": start}, side=side, alpha=4, dropout=0.5)
    assert torch.equal(model.train()(x), before)
    after = trained(edit, model, x)
    assert not torch.equal(after, before)
    assert torch.equal(model[0].base.weight, kept)
    assert torch.equal(edit.undo()(x), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_it_starts_in_the_subspace_that_is_given():
    model = made()
    (outputs, _), (inputs, _) = starts()["outputs"], starts()["inputs"]
    weight = model[0].weight.detach()
    for subspace, side, expected in (
        (outputs, "output", outputs.projector @ weight),
        (inputs, "input", weight @ inputs.projector),
    ):
        layer = LowRankChange.from_subspace(model[0], subspace, side=side)
        torch.testing.assert_close((layer.up @ layer.down).detach(), expected)
    own = LowRankChange.from_subspace(model[0], 6)
    torch.testing.assert_close((own.up @ own.down).detach(), weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(own.up.detach().norm(dim=0), own.down.detach().norm(dim=1))


def test_the_gradient_is_that_of_the_factored_weight():
    model, x = made(), torch.randn(7, 6)
    layer = LowRankChange.from_subspace(model[0], starts()["outputs"][0], scale=2.0)
    down, up = layer.down.detach().requires_grad_(), layer.up.detach().requires_grad_()
    # As written in the literature: the start is taken out of the weight.
    rest = model[0].weight.detach() - 2 * (layer.up @ layer.down).detach()
    nn.functional.linear(x, rest + 2 * up @ down, model[0].bias).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.down.grad, down.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.up.grad, up.grad, rtol=1e-4, atol=1e-4)


def test_merged_layers_compute_what_was_trained_and_shared_weights_stay():
    model, x = made(), torch.randn(7, 6)
    shared = model[0].weight
    edit = add_low_rank(model, {"0": starts()["outputs"][0], "2": 1}, alpha=4)
    assert (edit.layers["0"].scale, edit.layers["2"].scale) == (2, 4)
    after = trained(edit, model, x)
    merged = edit.merge()
    assert merged is model
    assert [type(part) for part in model] == [nn.Linear, nn.GELU, nn.Linear]
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-5)
    assert model[0].weight is not shared
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_on_the_unchanged_base_is_the_trained_model(tmp_path):
    model, x = made(), torch.randn(7, 6)
    edit = add_low_rank(model, {"0": starts()["outputs"][0], "2": 1}, alpha=4)
    after = trained(edit, model, x)
    edit.export(tmp_path / "adapter", base_model="somebody/model", task_type="CAUSAL_LM")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (config["r"], config["rank_pattern"], config["target_modules"]) == (4, {"2": 2}, ["0", "2"])
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = made()
    for name in config["target_modules"]:
        rank, alpha = config["rank_pattern"].get(name, 4), config["alpha_pattern"].get(name, config["lora_alpha"])
        down, up = (stored[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert down.shape[0] == up.shape[1] == rank
        base.get_submodule(name).weight.data += alpha / rank * up @ down
    torch.testing.assert_close(base(x), after, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exists"):
        edit.export(tmp_path / "adapter")


def test_a_start_of_zero_is_plain_lora():
    layer = LowRankChange(made()[0], torch.randn(2, 6), torch.zeros(8, 2), scale=3.0)
    layer.up.data.normal_()
    down, up = layer.update()
    assert down.shape == (2, 6)
    torch.testing.assert_close(up @ down, 3 * (layer.up @ layer.down).detach())


def test_peft_loads_the_adapter(tmp_path):
    peft, transformers = (pytest.importorskip(name) for name in ("peft", "transformers"))
    llama = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    gpt = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2)
    ids = torch.arange(10).reshape(2, 5)
    for config, names in ((llama, ("q_proj", "down_proj")), (gpt, ("c_attn", "c_fc"))):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        pristine = transformers.AutoModelForCausalLM.from_config(config).eval()
        pristine.load_state_dict(model.state_dict())
        sites = {name: 1 + ("1." in name) for name, _ in model.named_modules() if name.endswith(names)}
        edit = add_low_rank(model, sites, alpha=4)
        for layer in edit.layers.values():
            layer.up.data.add_(0.3 * torch.randn(layer.up.shape))
        edit.export(tmp_path / names[0])
        loaded = peft.PeftModel.from_pretrained(pristine, tmp_path / names[0])
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
            merged = loaded.merge_and_unload()(input_ids=ids).logits
            torch.testing.assert_close(edit.merge()(input_ids=ids).logits, merged, rtol=1e-4, atol=1e-5)


def test_bad_input_is_named():
    model = made()
    for sites, named in (({}, "sites"), ({"3": 1}, "sites"), ({"1": 1}, "layer"), ({"0": 7}, "subspace"),
                         ({"0": Subspace.random(6, 2)}, "subspace")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            add_low_rank(model, sites)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="down, up"):
        LowRankChange(model[0], torch.ones(2, 8), torch.ones(6, 2))
