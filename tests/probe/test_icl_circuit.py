"""A model whose circuit is written into its weights: each step is found where it was planted, and each cut kills it."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch

from subspan.edit import leace, random_subspaces
from subspan.geometry import Subspace
from subspan.measures import knn_overlap
from subspan.models import capture, head_weights, intervene
from subspan.probe import (
    CUTS,
    ClassCentroids,
    FewShotExample,
    FewShotPrompt,
    ICLCircuit,
    correct,
    draw_examples,
    encode_report,
    label_assignment,
    merge_report,
    position_bias,
    retrieval_report,
    retrieval_subspace,
    task_subspace,
)
from subspan.statistics import GroupedMoments

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [*"abcdefghij", ":", ";", "X", "Y", "?"]
V, P = len(WORDS) + 2, 48
D = 2 * (2 * V + P // 2 + V // 2 + 1)
TOKEN, PLACE, ENCODED, COPIED, OUT = (
    slice(a, b) for a, b in itertools.pairwise([0, V, V + P, 2 * V + P, 3 * V + P, 4 * V + P])
)


def words_tokenizer() -> Any:
    own = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["<pad>", *WORDS, "<u>"])}, "<u>")
    )
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", unk_token="<u>")


def planted() -> Any:
    """Three blocks, two heads each, of which the second does nothing.

    Block 0 puts the token before into "encoded", block 1 what the token before has encoded into "copied", block 2 looks
    for the token whose "copied" is its "encoded", and puts that token out.
    """
    width = D // 2
    config = transformers.GPT2Config(
        vocab_size=V,
        n_positions=P,
        n_embd=D,
        n_layer=3,
        n_head=2,
        tie_word_embeddings=False,
        attn_pdrop=0,
        resid_pdrop=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.weight.data.fill_(1)
    body = model.transformer
    body.wte.weight.data[:, TOKEN] = torch.eye(V)
    body.wpe.weight.data[:, PLACE] = torch.eye(P)
    model.lm_head.weight.data[:, OUT] = torch.eye(V)
    previous = torch.eye(P).roll(-1, 1)  # a query at place i asks for place i - 1
    previous[0] = 0
    plan = [
        (PLACE, previous, PLACE, TOKEN, ENCODED),
        (PLACE, previous, PLACE, ENCODED, COPIED),
        (ENCODED, torch.eye(V), COPIED, TOKEN, OUT),
    ]
    for block, (asks, turn, asked, takes, puts) in zip(body.h, plan):
        weight, size = block.attn.c_attn.weight.data, len(turn)
        weight[asks, :size] = 8 * turn
        weight[asked, D : D + size] = 8 * torch.eye(size)
        weight[takes, 2 * D : 2 * D + V] = torch.eye(V)
        block.attn.c_proj.weight.data[:V, puts] = torch.eye(V)
    assert size <= width
    return model


def examples(n: int, k: int = 4, seed: int = 0) -> list[FewShotExample]:
    """The query repeats a demonstration; labels are drawn for each prompt anew."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(n):
        words = rng.choice(list("abcdefghij"), k, replace=False).tolist()
        labels = rng.permutation(["X", "Y"] * (k // 2)).tolist()
        at = int(rng.integers(1, k))  # the first token sees itself alone
        found.append(FewShotExample(tuple(zip(words, labels)), words[at], labels[at]))
    return found


SIDES: tuple[Literal["key", "query"], ...] = ("key", "query")
PADDED: tuple[tuple[int, Literal["left", "right"]], ...] = ((4, "left"), (9, "right"))
PROMPT = FewShotPrompt(["X", "Y"], "{text} : {label} ; ")


@pytest.fixture(scope="module")
def circuit() -> ICLCircuit:
    return ICLCircuit(planted(), words_tokenizer(), PROMPT, batch_size=7)


def test_heads_are_found_where_they_were_planted(circuit: ICLCircuit) -> None:
    given = examples(40)
    reading = circuit.read(given)
    assert float(correct(reading.logits, reading.targets).mean()) == 1
    merged = merge_report(reading, circuit.read(given, append="wrong"), neighbours=5, threshold=3)
    assert sorted(merged.heads()) == [(0, 0), (1, 0)]
    assert torch.equal(merged.counts, merged.wrong_counts)
    assert merged.neighbour_counts[:, 0].tolist() == [1, 1, 0]
    assert float(merged.magnitude[1]) > 0.9 > 0.3 > float(merged.magnitude[2])
    assert merged.records()[2]["count_right"] == 1
    found = retrieval_report(reading, threshold=3)
    assert found.heads() == [(2, 0)] == found.best()
    assert float(found.assignment[:, 2, 0].min()) > 0.95
    # The second head is even, so the mean over two heads keeps part of the first one's.
    assert found.gain(2, 0)[1] > 0.05
    assert found.chance == 0.5
    assert float(found.assignment[:, 2, 1].mean()) == pytest.approx(0.5, abs=0.01)
    assert found.records()[-1]["layer"] == 2


def test_every_step_is_needed_and_random_edges_are_not(circuit: ICLCircuit) -> None:
    found = circuit.ablate(examples(60), controls=3)
    assert found.accuracy() == 1 == found.accuracy(calibrated=False)
    assert found.zero_shot_accuracy() < 0.75
    effects = {effect.name: effect for effect in found.effects}
    assert list(effects) == list(CUTS)
    for name, effect in effects.items():
        if name == "forerunner_to_forerunner":
            assert effect.cost() == (0, 0, 0)
        else:
            assert effect.cost()[1] > 0.2, name
    for name in ("forerunner_to_label", "label_to_query"):
        assert effects[name].size == 4
        assert effects[name].control_cost()[0] < 0.15 < effects[name].cost()[1]
    assert 0 < effects["label_to_query"].control_accuracy()[1] < 0.1
    assert torch.equal(effects["label_to_query"].controls, effects["forerunner_to_label"].controls)
    record = found.records()[3]
    assert (record["cut"], record["n"], record["last_layer"]) == ("label_to_query", 60, 3)
    assert record["cost_low"] <= record["cost"] <= record["cost_high"]


def test_a_cut_acts_in_its_window_alone(circuit: ICLCircuit) -> None:
    windows = ((0, 0), (0, 0.67), (0.67, 1))
    found = circuit.ablate(examples(40), ["label_to_query"], windows, controls=0, zero_shot=False)
    none, early, late = found.effects
    assert [effect.layers for effect in found.effects] == [(0, 0), (0, 2), (2, 3)]
    assert torch.equal(none.logits, found.uncut)
    assert early.cost()[0] == 0
    assert late.cost()[1] > 0.2
    assert np.isnan(late.control_accuracy()[0])
    assert np.isnan(found.zero_shot_accuracy())
    with pytest.raises(ValueError, match="controls"):
        late.control_cost()
    copied = circuit.ablate(examples(40), ["forerunner_to_label"], windows[1:], controls=0, zero_shot=False)
    assert copied.effects[0].cost()[1] > 0.2
    assert copied.effects[1].cost()[0] == 0


def test_a_head_that_sees_itself_alone_breaks_the_circuit(circuit: ICLCircuit) -> None:
    given = examples(40)
    found = circuit.ablate_heads(given, [(2, 0)], controls=1)
    assert found.cost()[1] > 0.2
    assert found.control_cost()[0] == 0
    assert found.size == 1
    idle = circuit.ablate_heads(given, [(1, 1), (2, 1)], controls=0)
    assert idle.cost() == (0, 0, 0)
    assert idle.layers == (1, 3)
    for heads, match in (([(3, 0)], "heads"), ([], "heads"), ([(2, 0), (2, 1)], "controls")):
        with pytest.raises(ValueError, match=match):
            circuit.ablate_heads(given, heads)


def test_a_head_retrieves_in_its_subspace_and_nowhere_else(circuit: ICLCircuit) -> None:
    given, model = examples(30), circuit.model
    key, query = (retrieval_subspace(model, 2, 0, side=side) for side in SIDES)
    assert key.dim == V == query.dim
    for space, at in ((key, COPIED), (query, ENCODED)):
        planes = Subspace.span(torch.eye(D)[:, at])
        assert float(space.angles(planes).max()) < 1e-3
    kept, gone = (circuit.retained_assignment(given, 2, 0, [key, None], complement=c) for c in (False, True))
    plain = retrieval_report(circuit.read(given, append=None)).assignment[:, 2, 0]
    torch.testing.assert_close(kept[0], plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept[1], plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gone[0], torch.full((30,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_numbers_do_not_depend_on_padding_or_batches(kind: str) -> None:
    model, own = made(kind), words_tokenizer()
    given = [*(e._replace(query=e.query + " a b c") for e in examples(4, seed=1)), *examples(5)]
    left, right = (ICLCircuit(model, own, PROMPT, batch_size=size, padding_side=side) for size, side in PADDED)
    for one, two in zip(vars(left.read(given)).values(), vars(right.read(given)).values()):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
    cuts = [each.ablate(given, controls=0) for each in (left, right)]
    for one, two in zip(*(each.effects for each in cuts)):
        torch.testing.assert_close(one.logits, two.logits, atol=2e-5, rtol=1e-4)
        if one.size and one.name != "forerunner_to_forerunner":
            assert not torch.allclose(one.logits, one.uncut, atol=1e-6)
    # The same prompt alone, by the model's own forward pass.
    single = model(own(PROMPT.text(given[7]), return_tensors="pt")["input_ids"], output_hidden_states=True)
    reading = right.read(given)
    torch.testing.assert_close(
        reading.role("forerunner")[:-1, 7],
        torch.stack([h[0, -1] for h in single.hidden_states[:-1]]),
        atol=2e-5,
        rtol=1e-4,
    )
    torch.testing.assert_close(cuts[0].uncut[7], single.logits[0, -1, right.label_ids], atol=2e-5, rtol=1e-4)
    alone = PROMPT.build(given[7:8], own)
    hidden = torch.stack([h[0] for h in single.hidden_states[:-1]])
    cosines = torch.nn.functional.cosine_similarity(hidden[:, alone.forerunners[0]], hidden[:, alone.query], dim=-1)
    torch.testing.assert_close(reading.similarity[7, :-1], cosines, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(reading.logits[7], cuts[1].uncut[7], atol=2e-5, rtol=1e-4)


def made(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
    }
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    elif kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    else:
        config = transformers.Gemma3TextConfig(
            **sizes, num_key_value_heads=1, head_dim=8, sliding_window=6,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    config.initializer_range = 0.5
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma"])
def test_retrieval_subspaces_are_those_of_the_dense_product(kind: str) -> None:
    model = made(kind)
    for head in range(4):
        query, key = (weight.double() for weight in head_weights(model, 1, head))
        if kind != "gpt2":
            part = (model.model.layers[1]).self_attn
            repeated = (
                part.k_proj.weight.double().unflatten(0, (-1, len(key))).repeat_interleave(part.num_key_value_groups, 0)
            )
            torch.testing.assert_close(key, repeated[head])
        u, s, vh = torch.linalg.svd(query.mT @ key)
        for side, vectors in zip(SIDES, (vh.mT, u), strict=True):
            found = retrieval_subspace(model, 1, head, side=side)
            assert found.dim == len(key)
            assert float(found.angles(Subspace.span(vectors[:, : found.dim].float())).max()) < 1e-3
            assert found.variances is not None
            torch.testing.assert_close(
                found.variances.double() * len(key), s[: found.dim].square(), rtol=1e-4, atol=1e-5
            )
    assert retrieval_subspace(model, 1, 0, rank=2).dim == 2
    with pytest.raises(ValueError, match="head"):
        retrieval_subspace(model, 1, 4)


def test_encoding_is_measured_against_a_reference_and_controls() -> None:
    circuit = ICLCircuit(made("llama"), words_tokenizer(), PROMPT)
    reading, calibration = circuit.read(examples(24)), circuit.read(examples(24, seed=5))
    own = reading.role("text")[1]
    turned = 3 * own @ torch.linalg.qr(torch.randn(16, 16))[0]
    found = encode_report(reading, turned, calibration, unrelated=torch.randn(24, 9), neighbours=6)
    assert found.roles == ("text", "forerunner", "label")
    torch.testing.assert_close(found.alignment[0, 1], torch.ones(24, dtype=torch.float64))
    assert found.chance == 6 / 23
    assert abs(float(found.unrelated[0, 1]) - found.chance) < 0.15 < float(found.within_class[0, 1])
    from sklearn.neighbors import NearestCentroid

    for row, role in enumerate(found.roles):
        for layer in (1, 2):
            nearest = NearestCentroid().fit(calibration.role(role)[layer].double(), calibration.targets)
            score = nearest.score(reading.role(role)[layer].double(), reading.targets)
            assert float(found.centroid_accuracy[row, layer]) == pytest.approx(score)
    assert float(found.within_class[0, 1]) < 0.9
    assert len(found.records()) == 9
    assert found.records()[1]["ka"] == pytest.approx(1)
    with pytest.raises(ValueError, match="neighbours"):
        encode_report(reading, turned, calibration, neighbours=24)
    words = circuit.label_word_states()
    assert words.shape == (3, 2, 16)
    assert ClassCentroids.fit(reading.role("label"), reading.targets).accuracy(words, torch.tensor([0, 1])).shape == (
        3,
    )


def test_merging_aligns_a_label_with_the_forerunner_one_block_earlier(circuit: ICLCircuit) -> None:
    reading = circuit.read(examples(30))
    found = merge_report(reading, neighbours=5)
    assert found.alignment.shape == (3, 30)
    expected = knn_overlap(reading.role("forerunner")[1], reading.role("label")[2], 5)
    assert torch.equal(found.alignment[1], expected)
    assert bool(found.wrong_counts.isnan().all())
    with pytest.raises(ValueError, match="append"):
        merge_report(circuit.read(examples(3), append=None), neighbours=1)
    with pytest.raises(ValueError, match="neighbours"):
        merge_report(reading, neighbours=30)
    with pytest.raises(ValueError, match="role"):
        circuit.read(examples(3), append=None).role("label")


def test_class_means_classify_and_span_the_task(circuit: ICLCircuit) -> None:
    states, labels = torch.randn(2, 30, 5) + 1e4, torch.arange(30) % 3
    states[1, :, 0] += 9 * labels
    found = ClassCentroids.fit(states, labels)
    assert float(found.accuracy(states, labels)[1]) == 1
    space = found.subspace(1)
    assert space.dim == 2
    assert float(space.residual_energy(found.means[1]).max()) < 1e-9
    assert (
        float(task_subspace(found.means[1, :2]).angles(Subspace.span(torch.eye(5, dtype=torch.float64)[:, :1]))[0])
        < 0.2
    )
    with pytest.warns(UserWarning, match="class 7"):
        ClassCentroids.fit(states, labels, [0, 1, 2, 7])
    for bad, names, match in (
        (states[:, :3], labels, "labels"),
        (states * torch.nan, labels, "NaN"),
        (states, labels * 0, "two"),
    ):
        with pytest.raises(ValueError, match=match):
            ClassCentroids.fit(bad, names)
    with pytest.raises(ValueError, match="two"):
        task_subspace(found.means[1, :1])


def test_position_bias_compares_the_same_query_with_others() -> None:
    few, many = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    same, different = position_bias({0: few, 4: many})[0, 4]
    cosines = torch.nn.functional.cosine_similarity(few.unsqueeze(2), many.unsqueeze(1), dim=-1).double()
    torch.testing.assert_close(same, cosines.diagonal(dim1=1, dim2=2).mean(1), atol=1e-6, rtol=1e-5)
    off = ~torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(different, cosines[:, off].mean(1), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="states"):
        position_bias({0: few, 4: many[:, :3]})


def test_attention_to_labels_is_shared_out() -> None:
    weights, right = torch.tensor([[[0.3, 0.1]], [[0.0, 0.0]]]), torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(
        label_assignment(weights, right), torch.tensor([[0.75], [0.0]]).double(), atol=1e-4, rtol=0
    )


def test_what_cannot_be_read_is_refused(circuit: ICLCircuit) -> None:
    own = words_tokenizer()
    long = examples(1)[0]
    long = long._replace(query=" ".join(["a"] * P))
    with pytest.raises(ValueError, match="tokens, the model takes 48"):
        circuit.read([long])
    with pytest.raises(ValueError, match="windows"):
        circuit.ablate(examples(2), ["label_to_query"], [(0.5, 0.2)])
    with pytest.raises(ValueError, match="demonstrations"):
        circuit.ablate([e._replace(demonstrations=()) for e in examples(2)], ["label_to_query"])
    with pytest.raises(ValueError, match="demonstrations"):
        retrieval_report(circuit.read([e._replace(demonstrations=()) for e in examples(2)]))
    with pytest.raises(ValueError, match="at least one"):
        circuit.read([])
    with pytest.raises(ValueError, match="batch_size"):
        ICLCircuit(circuit.model, own, PROMPT, batch_size=0)
    encoder = transformers.T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        ICLCircuit(transformers.T5ForConditionalGeneration(encoder), own, PROMPT)
    with pytest.raises(ValueError, match="pool"):
        draw_examples(["a"], ["X"], ["a"], ["X"], k=1)


def test_other_rooms_erase_and_compare_what_is_found_here(circuit: ICLCircuit) -> None:
    given, model = examples(40), circuit.model
    batch = PROMPT.build(given, circuit.tokenizer)
    at = torch.arange(40).unsqueeze(1), batch.labels
    words = [word for example in given for word, _ in example.demonstrations]
    with torch.no_grad(), capture(model, "transformer.h.1") as states:
        states.run(batch.tokens.batch)
    rows = states["transformer.h.1"][at].flatten(0, 1).double()
    # What edit's LEACE takes out, so that words cannot be told apart, lies in the subspace through their means here.
    groups = GroupedMoments(D).update(rows, words)
    eraser, space = leace(groups), task_subspace(groups.means)
    assert space.dim == 9
    taken = rows - torch.as_tensor(eraser.map(rows))
    assert float(taken.norm()) > 1
    assert float((taken - taken @ space.projector).norm()) < 1e-6 * float(taken.norm())

    def accuracy(change: Any) -> float:
        def at_labels(x: torch.Tensor) -> torch.Tensor:
            found = x.clone()
            found[at] = change(x[at].flatten(0, 1)).to(x.dtype).view(*at[1].shape, D)
            return found

        with torch.no_grad(), intervene(model, "transformer.h.1", at_labels):
            logits = model(**batch.tokens.batch).logits[torch.arange(40), batch.query][:, circuit.label_ids]
        return float(correct(logits, batch.targets, calibrated=False).mean())

    key = {"head": retrieval_subspace(model, 2, 0).to(torch.float64)}
    drawn = random_subspaces(key)["head"]
    assert accuracy(lambda x: x) == 1
    assert accuracy(lambda x: eraser.map(x.double())) < 0.8
    assert accuracy(lambda x: key["head"].residual(x.double())) < 0.8
    assert accuracy(lambda x: drawn.residual(x.double())) > 0.95
