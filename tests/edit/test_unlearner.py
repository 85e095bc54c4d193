"""Starts, losses and training of unlearning on a small model; resuming; what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning", reason="training needs Lightning (extra: train)")

from subspan.edit import (
    Answers,
    PairedExamples,
    Unlearner,
    importance_factors,
    squared_gradients,
    zero_factors,
)
from subspan.edit.low_rank_starts import answer_logits
from subspan.edit.unlearner import FORGET_LOSSES
from subspan.edit.unlearning_data import padded_batch
from subspan.geometry import Subspace

FORGET, RETAIN = range(6), range(6, 20)


class Speaker(nn.Module):
    """Two blocks that see one token: what follows it is all that it knows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(72, 16), nn.Linear(16, 72)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)) for _ in range(2)])

    def forward(self, input_ids, attention_mask):
        states = self.embed(input_ids)
        for block in self.blocks:
            states = states + block(states)
        return self.head(states)


def texts(first):
    """A token, and two that follow from it and are in no other text."""
    return [{"input_ids": [i, 24 + i, 48 + i], "labels": [-100, 24 + i, 48 + i]} for i in first]


def likelihoods(model, examples):
    with torch.no_grad():
        rows, labels, _ = answer_logits(model, padded_batch(examples))
    return -F.cross_entropy(rows, labels, reduction="none")


@pytest.fixture(scope="module")
def taught():
    """The state of a speaker that knows all its texts."""
    model = Speaker()
    batch = padded_batch([*texts(FORGET), *texts(RETAIN)])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        rows, labels, _ = answer_logits(model, batch)
        optimizer.zero_grad()
        F.cross_entropy(rows, labels).backward()
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def model(taught):
    found = Speaker()
    found.load_state_dict(taught)
    return found


OPTIONS = {"rank": 4, "retain_rank": 2, "batch_size": 6, "accumulate": 1, "learning_rate": 0.01, "beta": 0.5}
pytestmark = pytest.mark.filterwarnings("ignore:.*directions with more energy")


@pytest.mark.parametrize("start", ["rila", "fila", "lora", "null-space"])
def test_every_start_keeps_the_function_and_no_weight_of_the_model_is_touched(model, start):
    batch = padded_batch(texts(range(24)))
    before = model(batch["input_ids"], batch["attention_mask"]).detach()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    job = Unlearner(start=start, null_energy=0.9, **{**OPTIONS, "learning_rate": 1e-12}, max_steps=1)
    job.fit(model, texts(FORGET), texts(RETAIN))
    after = model(batch["input_ids"], batch["attention_mask"]).detach()
    assert float((after - before).abs().max()) < 1e-4
    starts = [layer.start_up.any().item() for layer in job.edit_.layers.values()]
    assert starts == [start in ("rila", "fila")] * 4
    job.edit_.undo()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_answers_are_forgotten_and_the_others_kept_and_the_penalty_keeps_out(model):
    forget, retain = texts(FORGET), texts(RETAIN)
    known, others = (float(likelihoods(model, each).mean()) for each in (forget, retain))
    assert min(known, others) > -0.5
    state = {name: value.clone() for name, value in model.state_dict().items()}
    leaked = {}
    for weight in (0.0, 0.5):
        model.load_state_dict(state)
        job = Unlearner(orthogonality=weight, epochs=10, **OPTIONS).fit(model, forget, retain)
        assert float(likelihoods(model, forget).mean()) < known - 2
        assert float(likelihoods(model, retain).mean()) > others - 0.7
        leaked[weight] = [float((space.retain.basis.T.float() @ job.edit_.layers[name].up.detach()).norm())
                          for name, space in job.plan_.items()]  # fmt: skip
        assert [step.step for step in job.history_] == list(range(1, 11))
        merged = job.edit_.merge()
        assert float(likelihoods(merged, forget).mean()) < known - 2
    assert sum(leaked[0.5]) < 0.8 * sum(leaked[0.0])


def test_the_terms_of_the_first_step_are_those_of_the_model_as_it_was(model):
    forget, retain = texts(FORGET), texts(RETAIN)
    likelihood = likelihoods(model, forget)
    rows, labels, owner = (part.detach() for part in answer_logits(model, padded_batch(forget)))
    hinge = [1 + p[y] - max(p[v] for v in range(72) if v != y) for p, y in zip(rows.softmax(-1), labels.tolist())]
    per_text = likelihood.reshape(6, 2)
    expected = {
        "ihl": sum(hinge) / len(hinge),
        "gd": likelihood.mean(),
        "npo": (2 / 0.1) * (1 + (0.1 * (per_text.sum(1) + 3)).exp()).log().mean(),
        "simnpo": (2 / 2.5) * (1 + (2.5 * per_text.mean(1)).exp()).log().mean(),
    }
    answers = Answers(rows, labels, owner, torch.full((6,), -3.0))
    for name, value in expected.items():
        assert FORGET_LOSSES[name](answers).item() == pytest.approx(value.item(), rel=1e-4)
    pairs = PairedExamples(forget, retain, epochs=5)
    drawn = torch.cat([likelihoods(model, [pairs[i][1]]) for i in range(6)])
    job = Unlearner(forget_loss="npo", start="lora", **OPTIONS, max_steps=1, orthogonality=0, retain_weight=3)
    step = job.fit(model, forget, retain).history_[0]
    # An answer is as likely as it was under the model before.
    assert step == (1, pytest.approx(2 / 0.1 * math.log(2)), pytest.approx(-3 * float(drawn.mean()), rel=1e-3), 0)
    job.edit_.undo()
    own = Unlearner(forget_loss=lambda answers: answers.log_likelihood().mean(), **OPTIONS, max_steps=1)
    assert own.fit(model, forget, retain).history_[0].forget == pytest.approx(2 * float(likelihood.mean()), rel=1e-4)


def test_an_update_outside_of_retained_inputs_changes_nothing_for_them(model):
    job = Unlearner(start="null-space", null_energy=1.0, layers=["blocks.0.0"], epochs=4, **{**OPTIONS, "rank": 2})
    job.fit(model, texts(FORGET), texts([6, 7, 8]))
    layer = job.edit_.layers["blocks.0.0"]
    down, up = layer.update()
    inputs = {kind: model.embed(torch.tensor([t["input_ids"] for t in texts(kind)])) for kind in ((6, 7, 8), (0, 1))}
    kept, moved = ((rows @ down.T @ up.T).abs().max().item() for rows in inputs.values())
    assert moved > 1e-3 > 1e2 * kept


def test_controls_and_options_change_what_they_say(model):
    forget, retain = [*texts(FORGET), {"input_ids": [1, 2], "labels": [1, 2]}], texts(RETAIN)
    plan = Unlearner(**OPTIONS).plan(model, forget, retain)
    padded = Unlearner(include_padding=True, **OPTIONS).plan(model, forget, retain)
    assert float(plan["blocks.0.0"].forget.distance(padded["blocks.0.0"].forget)) > 1e-3
    found = {}
    for name, options in {"random": {"basis": "random"}, "net": {"penalised": "net"}}.items():
        job = Unlearner(**OPTIONS, **options, max_steps=1).fit(model, forget, retain, plan=plan)
        found[name] = job.history_[0].orthogonality
        job.edit_.undo()
    overlaps = sum(float((layer.forget.basis.T @ layer.retain.basis).square().sum()) for layer in plan.values())
    assert found["net"] == pytest.approx(0, abs=1e-8)
    assert abs(found["random"] - 0.5 * overlaps) > 1e-3


def test_a_killed_run_goes_on_where_it_was(model, tmp_path):
    forget, retain = texts(FORGET), texts(RETAIN)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    options = {**OPTIONS, "batch_size": 2, "accumulate": 2, "epochs": 3}
    whole = Unlearner(**options).fit(model, forget, retain)
    expected = {name: layer.up.detach() for name, layer in whole.edit_.layers.items()}
    whole.edit_.undo()

    def kill(model, step):
        if step == 2:
            raise KeyboardInterrupt

    job = Unlearner(**options)
    with pytest.raises(KeyboardInterrupt):
        job.fit(model, forget, retain, keep=tmp_path, after_step=kill)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    taken = []
    job.fit(model, forget, retain, keep=tmp_path, after_step=lambda model, step: taken.append(step))
    assert taken == [3, 4, 5]
    assert [step.step for step in job.history_] == [1, 2, 3, 4, 5]
    for name, value in expected.items():
        torch.testing.assert_close(job.edit_.layers[name].up.detach(), value, atol=1e-6, rtol=1e-5)
    job.edit_.undo()
    job.fit(model, forget, retain, keep=tmp_path, after_step=lambda model, step: taken.append("again"))
    assert "again" not in taken


def test_a_head_that_can_be_asked_for_some_positions_gives_the_same(model):
    batch = padded_batch([*texts([1]), {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]}])
    whole = answer_logits(model, batch)
    asked = []

    class Asked(nn.Module):
        def forward(self, input_ids, attention_mask, logits_to_keep):
            asked.append(logits_to_keep.tolist())
            return model(input_ids, attention_mask)[:, logits_to_keep]

    for found, expected in zip(answer_logits(Asked(), batch), whole, strict=True):
        torch.testing.assert_close(found, expected)
    assert asked == [[0, 1, 3]]
    assert whole[1].tolist() == [25, 49, 7, 9]
    assert whole[2].tolist() == [0, 0, 1, 1]


def test_pairs_have_every_forget_example_once_an_epoch():
    pairs = PairedExamples(list("abc"), list(range(50)), epochs=3, random_state=1)
    assert [sorted(pairs[i][0] for i in range(s, s + 3)) for s in (0, 3, 6)] == [list("abc")] * 3
    assert len({pairs[i][1] for i in range(9)}) > 5
    assert [pairs[i] for i in range(9)] == [PairedExamples(list("abc"), list(range(50)), epochs=3, random_state=1)[i]
                                            for i in range(9)]  # fmt: skip


def test_importance_is_the_weighed_low_rank_part(model):
    batches = [padded_batch(texts([0])), padded_batch(texts([1, 2]))]
    found = squared_gradients(model, batches, ["blocks.1.0"])["blocks.1.0"]
    expected = 0
    for batch in batches:
        model.zero_grad()
        rows, labels, _ = answer_logits(model, batch)
        F.cross_entropy(rows, labels).backward()
        expected = expected + len(labels) * model.blocks[1][0].weight.grad.square() / 6
    torch.testing.assert_close(found, expected)
    assert all(parameter.requires_grad for parameter in model.parameters())
    weight, other = model.blocks[1][0].weight.detach(), torch.rand(20, 16)
    down, up = importance_factors(weight, found, other, 3, scale=2.0)
    rows = (found / (1e-5 + other)).sum(1).sqrt()[:, None]
    u, s, vh = torch.linalg.svd(rows * weight)
    nearest = (u[:, :3] * s[:3]) @ vh[:3] / (rows + 1e-5)
    torch.testing.assert_close(2 * up @ down, nearest, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(down.norm(dim=1), (s[:3] / 2).sqrt(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": []}, "forget: at least one example"),
        ({"retain": [{"input_ids": [1, 2]}, *texts([1])]}, "retain: example 0 needs input_ids and labels"),
        ({"forget": [*texts([1]), {"input_ids": [1, 2], "labels": [1, -100]}]}, "no label of example 1 counts"),
        ({"forget": texts([1])}, "forget: at least 2 texts"),
        ({"rank": 17}, "rank: 17 is above the width of blocks.0.0"),
        ({"beta": 1.5}, "beta: expected a number in"),
        ({"start": "pissa"}, "start: expected"),
        ({"layers": ["embed"]}, "a linear one is needed"),
        ({"start": "null-space", "rank": 16}, "blocks.0.0: rank: 16 is more than"),
        ({"learning_rate": 1e30, "epochs": 9}, "the loss is "),
    ],
)
def test_what_cannot_be_fitted_leaves_the_model_as_it_was(model, change, message):
    forget, retain = change.pop("forget", texts(FORGET)), change.pop("retain", texts(RETAIN))
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match=message):
        Unlearner(**{**OPTIONS, **change}).fit(model, forget, retain)
    assert list(before) == [name for name, _ in model.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_texts_in_both_sets_are_said(model):
    with pytest.warns(UserWarning, match="2 of 6 forget examples are retain examples too"):
        Unlearner(**OPTIONS, max_steps=1).fit(model, texts(FORGET), texts([*RETAIN, 1, 2]))


def test_zero_factors_need_room():
    space = Subspace.span(torch.eye(6)[:, :4])
    with pytest.raises(ValueError, match="3 is more than the 2 input directions"):
        zero_factors(torch.ones(5, 6), 3, outside=space)
