"""Moments of sites: those of the rows themselves, shared where the tensor is shared, whatever the batches."""

import pytest
import torch
from torch import nn

from subspan.models.layers import linear_names
from subspan.models.moments import SiteMoments, collect_moments
from subspan.statistics import GroupedMoments, Moments

D = 6


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads its copy, and one behind them that reads all tokens as rows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.copy = (nn.Linear(D, D) for _ in range(4))
        self.out = nn.Linear(D, D)
        self.head = nn.Linear(D, 2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, attention_mask=None):
        mixed = self.q(x) * self.k(hidden := self.dropout(x)) + self.v(x) + self.copy(x.clone()) + hidden
        return self.head(self.out(mixed.flatten(0, 1)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention().train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (3, 2):
        mask = torch.arange(4) < torch.randint(1, 5, (size, 1), generator=generator)
        made.append({"x": torch.randn(size, 4, D, generator=generator), "attention_mask": mask.long()})
    return made


def selected(batches):
    return torch.cat([batch["x"][batch["attention_mask"] != 0] for batch in batches])


def same(found, expected):
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean.to(found.mean))
    torch.testing.assert_close(found.scatter, expected.scatter.to(found.scatter), rtol=1e-5, atol=1e-6)


def test_they_are_the_moments_of_the_selected_rows_and_one_tensor_has_one_object(model, batches):
    found = collect_moments(model, iter(batches), ["k", "q", "v", "copy", "out"])
    assert list(found) == ["k", "q", "v", "copy", "out"]
    same(found["q"], Moments(D).update(selected(batches)))
    assert found["q"] is found["v"]
    assert found["copy"] is not found["q"]
    same(found["copy"], found["q"])
    # In evaluation mode dropout gives its input on.
    assert found["k"] is found["q"]
    assert set(found.distinct) == {"q", "copy", "out"}
    assert model.training
    assert model.dropout.training
    assert found.nbytes == sum(8 * (1 + D + D * D) for _ in range(3))


def test_tokens_that_the_model_has_put_into_one_axis_are_masked_too(model, batches):
    found = collect_moments(model, batches, "out")
    inputs = []
    hook = model.out.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.eval()
    for batch in batches:
        model(**batch)
    hook.remove()
    kept = torch.cat([batch["attention_mask"].flatten() for batch in batches]) != 0
    same(found["out"], Moments(D).update(torch.cat(inputs)[kept]))


def test_outputs_pools_and_types(model, batches):
    states = [batch["x"].masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, 0) for batch in batches]
    found = collect_moments(model, batches, "q", pool="sum", dtype=torch.float32)
    same(found["q"], Moments(D).update(torch.cat([each.sum(1) for each in states])))
    assert found["q"].mean.dtype == torch.float32
    outputs = collect_moments(model, batches, ["q", "v"], site="output")
    same(outputs["q"], Moments(D).update(model.q(selected(batches)).detach()))
    assert outputs["v"] is not outputs["q"]
    without = collect_moments(model, batches, "q", mask=None, drop_tokens=1)
    same(without["q"], Moments(D).update(torch.cat([batch["x"][:, 1:].flatten(0, 1) for batch in batches])))


def test_positions_of_feature_maps_are_rows():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    images = torch.randn(4, 3, 5, 2)
    found = collect_moments(network, images.split(2), ["0"], labels=lambda batch: ["a", "b"])
    same(found["0"].by_group["b"], Moments(3).update(images[1::2].movedim(1, -1).flatten(0, -2)))


def test_labels_of_samples_or_tokens_make_groups(model, batches):
    by_sample = collect_moments(
        model, batches, ["q", "v"], labels=lambda batch: ["even", "odd", "even"][: len(batch["x"])]
    )
    assert isinstance(by_sample["q"], GroupedMoments)
    assert by_sample["v"] is by_sample["q"]
    rows = [each["x"][i][each["attention_mask"][i] != 0] for each in batches for i in range(len(each["x"])) if i != 1]
    same(by_sample["q"].by_group["even"], Moments(D).update(torch.cat(rows)))
    by_token = collect_moments(model, batches, "q", labels=lambda batch: batch["x"][..., 0] > 0)
    same(by_token["q"].by_group[True], Moments(D).update(selected(batches)[selected(batches)[:, 0] > 0]))
    pooled = collect_moments(model, batches, "q", pool="mean", labels=lambda batch: range(len(batch["x"])))
    assert pooled["q"].counts.tolist() == [2, 2, 1]
    with pytest.raises(ValueError, match="labels"):
        collect_moments(model, batches, "q", labels=lambda batch: ["a"])


def test_two_halves_make_the_whole_whether_they_share_or_not(model, batches):
    whole = collect_moments(model, batches, ["q", "v", "copy"])
    apart = collect_moments(model, batches[1:], ["q", "v", "copy"], share=False)
    assert apart["v"] is not apart["q"]
    first = collect_moments(model, batches[:1], ["q", "v"])
    for merged in (first + collect_moments(model, batches[1:], ["q", "v", "copy"]), first + apart, apart + first):
        same(merged["v"], whole["v"])
        same(merged["q"], whole["q"])
        same(merged["copy"], apart["copy"])
        assert (merged["v"] is merged["q"]) == (len(merged.distinct) == 2)
    assert len((first + apart).distinct) == 3
    assert first["q"].count + apart["q"].count == whole["q"].count
    with pytest.raises(ValueError, match="other"):
        first + collect_moments(model, batches, "q", site="output")


def test_a_tensor_that_is_changed_in_place_or_reused_is_another():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Identity() for _ in range(4))

        def forward(self, x):
            self.a(x)
            self.b(x.add_(1))
            # A new tensor in the memory of one that is gone, as allocators give it.
            memory = torch.zeros(3, 2)
            self.d(memory.view(3, 2))
            memory.data.fill_(7)
            return self.c(memory.view(3, 2))

    found = collect_moments(Changing(), [torch.zeros(3, 2)], list("abcd"))
    assert [float(found[name].mean[0]) for name in "abcd"] == [0.0, 1.0, 7.0, 0.0]


def test_sharing_that_ends_is_said():
    class Parting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x):
            return self.a(x) + self.b(x if x[0, 0] > 0 else x.clone())

    batches = [torch.ones(3, 2), -torch.ones(3, 2)]
    with pytest.raises(ValueError, match="share=False"):
        collect_moments(Parting(), batches, ["a", "b"])
    assert collect_moments(Parting(), batches, ["a", "b"], share=False)["b"].count == 6


def test_rows_that_are_not_finite_are_refused_or_counted(model, batches):
    batches[0]["x"][0, 0, 2] = torch.inf
    with pytest.raises(ValueError, match=r"sites: 'q'.*NaN or infinity"):
        collect_moments(model, batches, "q")
    found = collect_moments(model, batches, ["q", "v"], not_finite="skip")
    assert found.skipped == {"q": 1}
    same(found["v"], Moments(D).update(selected(batches)[1:]))
    grouped = collect_moments(model, batches, "q", not_finite="skip", labels=lambda batch: range(len(batch["x"])))
    assert grouped["q"].pooled().count == found["q"].count
    assert (found + found).skipped == {"q": 2}
    turned = collect_moments(model, batches, "v", not_finite="skip") + found
    assert (list(turned), turned.skipped) == (["v", "q"], {"v": 2, "q": 1})


def test_a_file_keeps_everything(model, batches, tmp_path):
    found = collect_moments(model, batches, ["v", "q", "copy"], not_finite="skip")
    found.save(tmp_path / "moments.safetensors")
    again = SiteMoments.load(tmp_path / "moments.safetensors")
    assert again["v"] is again["q"]
    assert (again.leaders, again.site, again.skipped) == (found.leaders, found.site, found.skipped)
    for name in found:
        assert torch.equal(again[name].scatter, found[name].scatter)
    grouped = collect_moments(model, batches, "q", labels=lambda batch: range(len(batch["x"])))
    with pytest.raises(ValueError, match="group"):
        grouped.save(tmp_path / "grouped.safetensors")


def test_linear_layers_are_those_of_the_blocks_where_nothing_else_is_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 2)
            self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(2, 2), "act": nn.ReLU()}) for _ in range(2))
            self.head = nn.Linear(2, 2)

    assert linear_names(Model()) == ["blocks.0.fc", "blocks.1.fc"]
    assert linear_names(Model(), "blocks.1") == ["blocks.1.fc"]
    assert linear_names(Model(), ["", "head"]) == ["embed", "blocks.0.fc", "blocks.1.fc", "head"]
    with pytest.raises(ValueError, match="no linear layer"):
        linear_names(Model(), "blocks.0.act")


def test_queries_keys_and_values_of_a_transformer_share():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    llama = transformers.LlamaForCausalLM(config)
    batch = {"input_ids": torch.arange(10).reshape(2, 5), "attention_mask": torch.tensor([[1] * 5, [0] * 2 + [1] * 3])}
    found = collect_moments(llama, [batch], linear_names(llama))
    assert len(found) == 14
    assert len(found.distinct) == 8
    assert {each.count for each in found.values()} == {8.0}
    own = collect_moments(llama, [batch], linear_names(llama), share=False)
    for name in found:
        same(found[name], own[name])
    gpt = transformers.GPT2Model(transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=2))
    assert len(linear_names(gpt)) == 8
