"""Hidden states: which layer, which tokens, the same numbers with and without the rest of the forward pass."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from subspan.models import capture, find_blocks, iterate_representations, layer_names, pool_states
from subspan.models.layout import samples_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)) for _ in range(3)
        )
        self.dropout = nn.Dropout(0.5)
        self.reached_the_end = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        self.reached_the_end += 1
        return self.dropout(x).mean((2, 3))


@pytest.fixture
def convolutional() -> Convolutional:
    torch.manual_seed(0)
    return Convolutional()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4
    )
    return transformers.BertModel(config).eval()


@pytest.fixture
def text_batch() -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    return {"input_ids": ids, "attention_mask": mask}


def n_hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_early_exit_gives_the_states_of_the_full_pass_bit_for_bit(
    llama: nn.Module, text_batch: dict[str, Tensor], layer: int
) -> None:
    name = layer_names(llama, layer)[0]
    with capture(llama, layer) as states:
        early = states.run(text_batch)[name]
        full = states.run(text_batch, early_exit=False)[name]
    assert torch.equal(early, full)
    if layer >= 0:
        hidden = llama(**text_batch, output_hidden_states=True).hidden_states
        assert torch.equal(early, hidden[layer + 1])


def test_early_exit_skips_what_comes_after(convolutional: Convolutional) -> None:
    with capture(convolutional, ["stem", "blocks.1"]) as states:
        states.run(torch.rand(2, 3, 8, 8))
        assert convolutional.reached_the_end == 0
        assert list(states) == ["stem", "blocks.1"]
        states.run(torch.rand(2, 3, 8, 8), early_exit=False)
    assert convolutional.reached_the_end == 1


def test_a_model_still_gives_its_own_hidden_states_after_an_early_exit(
    llama: nn.Module, text_batch: dict[str, Tensor]
) -> None:
    before = llama(**text_batch, output_hidden_states=True, output_attentions=True)
    with capture(llama, "model.layers.1") as states:
        states.run(text_batch)
    after = llama(**text_batch, output_hidden_states=True, output_attentions=True)
    assert len(after.hidden_states) == len(before.hidden_states) == 5
    assert torch.equal(after.logits, before.logits)


def test_input_site_is_the_previous_layers_output(bert: nn.Module, text_batch: dict[str, Tensor]) -> None:
    with capture(bert, "encoder.layer.0") as outputs, capture(bert, "encoder.layer.1", site="input") as inputs:
        bert(**text_batch)
    assert torch.equal(outputs["encoder.layer.0"], inputs["encoder.layer.1"])


def test_a_tuples_item_can_be_chosen(llama: nn.Module, text_batch: dict[str, Tensor]) -> None:
    with capture(llama, "model.layers.2.self_attn", item=1) as states:
        attention = states.run(text_batch)["model.layers.2.self_attn"]
    assert torch.equal(attention, llama(**text_batch, output_attentions=True).attentions[2])


def test_later_in_place_operations_do_not_change_what_was_captured(convolutional: Convolutional) -> None:
    images = torch.rand(2, 3, 8, 8)
    (both,) = iterate_representations(convolutional, [images], ["stem.1", "blocks.2"], pool="none")
    (alone,) = iterate_representations(convolutional, [images], "stem.1", pool="none")
    assert alone.min() < 0
    assert torch.equal(both["stem.1"], alone)


def test_gradients_flow_through_a_capture(convolutional: Convolutional) -> None:
    with capture(convolutional, "blocks.0") as states:
        convolutional(torch.rand(2, 3, 8, 8))
    states["blocks.0"].sum().backward()
    assert convolutional.stem[0].weight.grad.abs().sum() > 0
    assert convolutional.blocks[1][0].weight.grad is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_error(convolutional: Convolutional, error: type[BaseException]) -> None:
    def fails(*_: object) -> None:
        raise error

    with pytest.raises(error), capture(convolutional, "blocks.*", site="input"):
        raise error
    assert n_hooks(convolutional) == 0
    handle = convolutional.blocks[1].register_forward_hook(fails)
    with pytest.raises(error):
        next(iterate_representations(convolutional, [torch.rand(1, 3, 8, 8)], -1))
    assert n_hooks(convolutional) == 1
    assert convolutional.training
    handle.remove()


def test_an_abandoned_stream_leaves_no_hooks_and_the_models_own_mode(convolutional: Convolutional) -> None:
    convolutional.stem.eval()
    stream = iterate_representations(convolutional, (torch.rand(1, 3, 8, 8) for _ in range(9)), -1)
    next(stream)
    assert n_hooks(convolutional) == 0
    assert convolutional.training
    assert not convolutional.stem.training
    assert convolutional.stem[1].num_batches_tracked == 0


def test_batches_are_taken_one_at_a_time(convolutional: Convolutional) -> None:
    drawn = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(5):
            drawn.append(index)
            yield torch.rand(2, 3, 8, 8), torch.tensor([0, 1])

    for index, states in enumerate(iterate_representations(convolutional, batches(), -1)):
        assert states.shape == (2, 4)
        assert drawn == list(range(index + 1))


def test_pooling_against_loops(bert: nn.Module, text_batch: dict[str, Tensor]) -> None:
    layer = "encoder.layer.1"
    (tokens,) = iterate_representations(bert, [text_batch], layer, pool="none")
    mask = text_batch["attention_mask"].bool()
    for pool, reduce in {
        "mean": lambda rows: rows.mean(0),
        "sum": lambda rows: rows.sum(0),
        "first": lambda rows: rows[0],
        "last": lambda rows: rows[-1],
    }.items():
        for drop in (0, 2):
            (pooled,) = iterate_representations(bert, [text_batch], layer, pool=pool, drop_tokens=drop)
            expected = torch.stack([reduce(row[kept][drop:]) for row, kept in zip(tokens, mask)])
            torch.testing.assert_close(pooled, expected)
    (rows,) = iterate_representations(bert, [text_batch], layer, pool="rows", drop_tokens=1)
    assert torch.equal(rows, torch.cat([row[kept][1:] for row, kept in zip(tokens, mask)]))


def test_a_named_mask_selects_tokens_and_stays_out_of_the_model(bert: nn.Module, text_batch: dict[str, Tensor]) -> None:
    query = torch.zeros(3, 7, dtype=torch.bool)
    query[:, 3] = True
    (named,) = iterate_representations(bert, [{**text_batch, "query": query}], -1, mask="query")
    (called,) = iterate_representations(bert, [text_batch], -1, mask=lambda batch: query)
    (tokens,) = iterate_representations(bert, [text_batch], -1, pool="none")
    assert torch.equal(named, called)
    torch.testing.assert_close(named, tokens[:, 3])


@pytest.mark.parametrize(("pool", "places"), [("last", [0, 2]), ("first", [0, 1])])
def test_a_token_alone_at_the_start_is_the_first_and_the_last(
    pool: Literal["first", "last"], places: list[int]
) -> None:
    states = torch.randn(2, 3, 4)
    found = pool_states(states, torch.tensor([[1, 0, 0], [0, 1, 1]]), pool=pool)
    assert torch.equal(found, states[torch.arange(2), places])


def test_nan_at_a_masked_token_does_not_reach_the_mean() -> None:
    states = torch.ones(1, 3, 2)
    states[0, 2] = torch.nan
    assert torch.equal(pool_states(states, torch.tensor([[1, 1, 0]])), torch.ones(1, 2))


def test_half_precision_states_are_summed_in_float32() -> None:
    states = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    torch.testing.assert_close(pool_states(states), states[:, 0].float())


@pytest.mark.parametrize("pool", ["mean", "rows"])
def test_feature_maps_are_pooled_over_positions(convolutional: Convolutional, pool: str) -> None:
    images = torch.rand(2, 3, 8, 8)
    (maps,) = iterate_representations(convolutional, [images], "stem", pool="none")
    (pooled,) = iterate_representations(convolutional, [images], "stem", pool=pool)
    expected = maps.mean((2, 3)) if pool == "mean" else maps.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(pooled, expected)


def test_dtype_of_what_is_yielded(convolutional: Convolutional) -> None:
    model = convolutional.to(torch.bfloat16)
    images = torch.rand(1, 3, 8, 8).to(torch.bfloat16)
    assert next(iterate_representations(model, [images], -1)).dtype == torch.float32
    assert next(iterate_representations(model, [images], -1, pool="none", dtype=None)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (-1, ["encoder.layer.2"]),
        ("encoder.layer.-2", ["encoder.layer.1"]),
        ("encoder.layer.*", ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]),
        ("**.query", [f"encoder.layer.{i}.attention.self.query" for i in range(3)]),
        (re.compile(r"encoder\.layer\.[02]"), ["encoder.layer.0", "encoder.layer.2"]),
        ([-1, "encoder.layer.2", 0], ["encoder.layer.2", "encoder.layer.0"]),
    ],
)
def test_layers_by_name_index_and_pattern(bert: nn.Module, layers: object, names: list[str]) -> None:
    assert layer_names(bert, layers) == names


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("encoder.layers.1", "nearest: encoder.layer.1"),
        ("encoder.layer.7", "nearest: encoder.layer"),
        (9, "index 9 is out of range, encoder.layer has 3"),
        ("encoder.layer.-4", "index -4 is out of range"),
        ("encoder.layer.-1.nothing", "has no layer"),
        ([], "at least one layer"),
    ],
)
def test_a_wrong_layer_is_named_with_what_is_near(bert: nn.Module, layers: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_names(bert, layers)


def test_an_index_needs_one_list_of_blocks() -> None:
    two = nn.ModuleDict({side: nn.Sequential(*(nn.TransformerEncoderLayer(4, 2) for _ in range(2))) for side in "ab"})
    with pytest.raises(ValueError, match=r"several lists of blocks \(a, b\)"):
        find_blocks(two)
    with pytest.raises(ValueError, match="no list of like blocks"):
        find_blocks(nn.Bilinear(2, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool"),
        ({"drop_tokens": -1}, "drop_tokens"),
        ({"site": "middle"}, "site"),
        ({"mask": "query"}, "the batch has no 'query'"),
        ({"mask": lambda batch: torch.ones(3, 6)}, "mask: shape"),
        ({"mask": lambda batch: torch.tensor([[1] * 7, [0] * 7, [1] * 7])}, "in sample 1 "),
    ],
)
def test_wrong_options_are_named(bert: nn.Module, text_batch: dict[str, Tensor], options: dict, message: str) -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises((ValueError, TypeCheckError), match=message):
        next(iterate_representations(bert, [text_batch], -1, **options))
    assert n_hooks(bert) == 0


def test_a_layer_that_the_pass_does_not_reach_is_an_error(bert: nn.Module) -> None:
    unused = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    unused.forward = lambda x: unused["used"](x)
    with pytest.raises(ValueError, match="does not reach 'unused'"):
        next(iterate_representations(unused, [torch.ones(1, 2)], ["used", "unused"]))


@pytest.mark.slow
def test_early_exit_on_the_packaged_language_model_is_bit_equal() -> None:
    from subspan.datasets import is_installed, load_language_model

    if not is_installed("smollm2"):
        pytest.skip("the smollm2 weights are not installed: subspan models install smollm2")
    model, tokenizer = load_language_model(attn_implementation="eager")
    batch = dict(tokenizer(["Gravity is", "The capital of France is Paris."], return_tensors="pt", padding=True))
    with torch.no_grad():
        full = model(**batch, output_hidden_states=True)
    (early,) = iterate_representations(model, [batch], "model.layers.*", pool="none")
    for index, states in enumerate(list(early.values())[:-1]):
        assert torch.equal(states, full.hidden_states[index + 1])


def test_a_deep_copy_does_not_write_into_the_capture() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with capture(model, "0") as states:
        average = copy.deepcopy(model)
        model(torch.ones(4, 2))
        average(torch.ones(7, 2))
        assert len(states["0"]) == 4
        states.clear()
        assert not states


def test_a_layer_that_runs_several_times_gives_its_first_states() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.again(self.again(x)))

    model, x = Twice().eval(), torch.randn(3, 4)
    found = next(iterate_representations(model, [x], ["again", "last"]))
    torch.testing.assert_close(found["again"], model.again(x).detach())
    torch.testing.assert_close(found["last"], model(x).detach())


def test_samples_are_counted_by_the_tokens_where_a_batch_has_other_things() -> None:
    pixels, ids = torch.zeros(12, 8), torch.ones(3, 5)
    assert samples_of({"pixel_values": pixels, "input_ids": ids}) == 3
    assert samples_of([(), {"pixel_values": pixels, "attention_mask": ids[:2], "input_ids": ids}]) == 2
    assert samples_of([torch.tensor(1.0), pixels, ids]) == 12
    assert samples_of(["text", None]) is None


class TokensFirst(nn.Module):
    """Blocks that run (t, b, d): torch's own default, or one that only the sizes tell of."""

    def __init__(self, *, own: bool = False, attention: bool = True) -> None:
        super().__init__()
        self.own, self.attention = own, attention
        self.embed = nn.Conv2d(3, 8, 4, 4)
        if own:
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2))
        else:
            make = (lambda: nn.MultiheadAttention(8, 2)) if attention else (lambda: nn.Linear(8, 8))
            self.blocks = nn.ModuleList(nn.ModuleDict({"mix": make(), "mlp": nn.Linear(8, 8)}) for _ in range(2))
            self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states = self.embed(x).flatten(2).permute(2, 0, 1)
        for number, block in enumerate(self.blocks):
            if self.own:
                states = block(states)
            else:
                mixed = block["mix"](states, states, states)[0] if self.attention else block["mix"](states)
                states = self.norm[number](states + block["mlp"](mixed))
        return states.transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "layer", "n"),
    [
        (TokensFirst(own=True), "blocks.1", 3),
        # As many tokens as samples: torch's layer says what it does.
        (TokensFirst(own=True), "blocks.1", 4),
        (TokensFirst(), "norm.1", 3),
        (TokensFirst(), "norm.1", 1),
        (TokensFirst(attention=False), "norm.1", 6),
    ],
)
def test_layers_that_have_tokens_first_give_samples(model: TokensFirst, layer: str, n: int) -> None:
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x).detach()
    for layout in ("auto", "tokens_first"):
        found = next(iterate_representations(model, [x], layer, layout=layout))
        torch.testing.assert_close(found, expected.mean(1))
        found = next(iterate_representations(model, [[x, 0]], layer, pool="last", layout=layout))
        torch.testing.assert_close(found, expected[:, -1])
    with torch.no_grad(), capture(model, layer) as states:
        model(x=x)
        torch.testing.assert_close(states.by_sample(layer), expected)
        assert states[layer].shape == (4, n, 8)


def test_an_order_that_cannot_be_told_is_refused() -> None:
    model, x = TokensFirst().eval(), torch.randn(4, 3, 8, 8)
    with pytest.raises(ValueError, match=r"layer 'norm.1': cannot tell .* some layers of the model have tokens first"):
        next(iterate_representations(model, [x], "norm.1"))
    found = next(iterate_representations(model, [x], "norm.1", layout="tokens_first"))
    torch.testing.assert_close(found, model(x).detach().mean(1))
    as_it_is = next(iterate_representations(model, [x], "norm.1", layout="channels_last"))
    torch.testing.assert_close(as_it_is, model(x).detach().mean(0))
    # Samples where torch's layer has tokens: a model that takes ids (t, b), or one that means something else.
    with pytest.raises(ValueError, match="torch says that it has tokens first"):
        next(iterate_representations(nn.TransformerEncoderLayer(8, 2, 16).eval(), [torch.randn(5, 4, 8)], ""))


def test_a_model_that_has_samples_first_and_as_many_tokens_is_not_doubted(bert: nn.Module) -> None:
    ids = torch.randint(1, 50, (7, 7), generator=torch.Generator().manual_seed(1))
    found = next(iterate_representations(bert, [{"input_ids": ids}], 1))
    with torch.no_grad():
        torch.testing.assert_close(found, bert(ids, output_hidden_states=True).hidden_states[2].mean(1))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("longest", [7, 6])
def test_inner_layers_of_an_encoder_that_nests_its_padding(longest: int) -> None:
    torch.manual_seed(0)
    model = Padded().eval()
    mask = (torch.arange(7) < torch.tensor([[4], [longest], [2]])).long()
    batch = {"input_ids": torch.randint(1, 50, (3, 7)), "attention_mask": mask}
    # Sample by sample there is no padding and nothing nested.
    alone = []
    for ids, length in zip(batch["input_ids"], mask.sum(1).tolist()):
        with torch.no_grad(), capture(model, "encoder.layers.1") as states:
            model(ids[None, :length], torch.ones(1, length))
            alone.append(states["encoder.layers.1"][0])
    for site, layer in (("output", "encoder.layers.1"), ("input", "encoder.layers.2")):
        mean = next(iterate_representations(model, [batch], layer, site=site))
        torch.testing.assert_close(mean, torch.stack([each.mean(0) for each in alone]), atol=1e-5, rtol=1e-5)
        rows = next(iterate_representations(model, [batch], layer, site=site, pool="rows", mask=None))
        torch.testing.assert_close(rows, torch.cat(alone), atol=1e-5, rtol=1e-5)
    with torch.no_grad(), capture(model, "encoder.layers.1") as states:
        model(**batch)
    assert states["encoder.layers.1"].shape == (3, longest, 16)
    assert not bool(states["encoder.layers.1"][0, 4:].any())
    with pytest.raises(ValueError, match="takes for padding"):
        next(iterate_representations(model, [batch], "encoder.layers.1", mask=lambda _: torch.ones(3, 7)))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.inner, self.last = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.last(self.inner(x))
        return self.last(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant))


def test_gradients_of_checkpointed_states_are_whole_or_refused() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for reentrant in (None, False):
        model = Checkpointed(reentrant)
        with capture(model, "inner.0") as states:
            out = model(x)
            kept = states["inner.0"]
            (out.square().sum() + kept.square().sum()).backward()
            # What runs again in the backward pass is no pass of its own.
            assert states["inner.0"] is kept
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    model = Checkpointed(True)
    with capture(model, "inner.0") as states:
        with pytest.raises(ValueError, match=r"layer 'inner.0': runs under re-entrant checkpointing"):
            model(x)
        with torch.no_grad():
            model(x)
        assert states["inner.0"].shape == (3, 4)
    with capture(model, "last") as states:
        model(x).sum().backward()
        assert states["last"].requires_grad
