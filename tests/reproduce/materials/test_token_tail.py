"""The last blocks on states that the others gave once say what the whole model says, and move the same weights."""

import pytest
import torch

from subspan.reproduce.materials.token_tail import TokenTail

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")


@pytest.mark.parametrize("blocks", [1, 2])
def test_likelihoods_and_gradients_are_those_of_the_whole_model(blocks):
    split = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(97 + i): i for i in range(26)} | {" ": 26}))
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=split, pad_token=" ")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=27, tie_word_embeddings=True, **sizes))
    pieces = [[("ask ", "asked"), ("tell", "answer")], [("b ", "asked"), ("what is it", "answer")]]
    expected, gradients = [], []
    weight = model.model.layers[2].mlp.up_proj.weight
    for (asked, _), (answer, _) in pieces:
        ids = torch.tensor([tokenizer(asked + answer)["input_ids"]])
        chances = model(ids).logits[0, :-1].log_softmax(-1)
        said = chances[len(asked) - 1 :].gather(-1, ids[0, len(asked) :, None])[:, 0]
        gradients.append(torch.autograd.grad(said.sum(), weight, retain_graph=True)[0])
        expected.append(said.detach())
    tail = TokenTail(model, tokenizer, blocks)
    (texts,) = tail.texts([pieces], "answer", lambda said, done: None)
    parameters = tail.cut()
    found = tail.log_likelihood(texts)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), weight)[0], sum(gradients), atol=1e-5, rtol=1e-3)
    assert len(parameters) == 9 * blocks + 2  # the norm and the output layer, which is tied no longer
    assert not model.get_input_embeddings().weight.requires_grad
    assert parameters[-1] is model.lm_head.weight
