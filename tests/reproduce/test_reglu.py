"""The last blocks of a model as a model of their own."""

import pytest
import torch

pytest.importorskip("lightning", reason="protocols train with Lightning (extra: train)")

from subspan.edit.unlearning_data import padded_batch
from subspan.models import add_low_rank, linear_names
from subspan.reproduce.reglu import Setting, Tail, invented, material

transformers = pytest.importorskip("transformers")


def test_the_tail_is_the_model_and_what_is_changed_in_it_is_changed_there():
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2
    )
    torch.manual_seed(0)
    whole = transformers.LlamaForCausalLM(config).eval()
    tail = Tail(whole, 2).eval()
    texts = [list(range(3, 3 + length)) for length in (4, 9, 6)]
    batch = padded_batch([{"input_ids": text, "labels": text} for text in texts], length=11)

    def both():
        with torch.no_grad():
            found = tail(batch["input_ids"], batch["attention_mask"])
            expected = whole(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return found[batch["attention_mask"] != 0], expected[batch["attention_mask"] != 0]

    torch.testing.assert_close(*both(), atol=1e-5, rtol=1e-4)
    some = torch.tensor([2, 10])
    inputs = batch["input_ids"], batch["attention_mask"]
    torch.testing.assert_close(tail(*inputs, logits_to_keep=some), tail(*inputs)[:, some])
    assert linear_names(tail)[0] == "part.layers.0.self_attn.q_proj"
    before = both()[1]
    edit = add_low_rank(tail, dict.fromkeys(linear_names(tail), 2))
    for layer in edit.layers.values():
        layer.up.data += 0.1
    found, expected = both()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert float((found - before).abs().max()) > 1e-3


def test_invented_profiles_differ_and_have_perturbed_answers():
    first, second = invented(0, 20), invented(1, 20)
    assert {record["answer"] for record in first}.isdisjoint(record["answer"] for record in second)
    assert len({record["question"] for record in first}) == 20
    for record in first:
        assert len(set(record["perturbed_answer"]) | {record["paraphrased_answer"]}) == 4
    assert invented(0, 20) == first


def test_tofu_is_taken_by_author(shared_data):
    found = material(Setting(authors=2, questions=3, facts=5, seeds=2))
    assert [len(author) for author in found.forget] == [3, 3]
    assert "Basil" in found.forget[0][0]["answer"]
    assert "Abilov" in found.forget[1][0]["answer"]
    assert (len(found.retain), len(found.facts)) == (6, 5)
