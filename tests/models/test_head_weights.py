"""Maps of one head are those that its attention uses, in every layout that joins them."""

import pytest
import torch

from subspan.models import attention_modules, attention_rows, head_weights, output_rows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
ALL_ATTENTION_FUNCTIONS = pytest.importorskip("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
MODELS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4),
    "phi3": lambda: transformers.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=8),
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "bert": lambda: transformers.BertConfig(**SIZES),
}


def made(kind):
    torch.manual_seed(0)
    config = MODELS[kind]()
    config.initializer_range = 0.3
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_maps_give_the_queries_and_keys_that_attention_gets(kind):
    # At place 0 rotary positions turn nothing, and biases are 0 before training.
    model = made(kind)
    inputs: list[torch.Tensor] = []
    (part,) = attention_modules(model, 1).values()
    hook = part.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    queries: dict[str, torch.Tensor] = {}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, *args, **options):
        if module is part:
            queries["q"], queries["k"] = query, key
        return sdpa(module, query, key, value, *args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watched
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 7, 9]]))
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
        hook.remove()
    state, groups = inputs[0][0, 0], 4 // queries["k"].shape[1]
    for head in range(4):
        maps = head_weights(model, 1, head)
        torch.testing.assert_close(maps.query @ state, queries["q"][0, head, 0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps.key @ state, queries["k"][0, head // groups, 0], atol=1e-5, rtol=1e-4)


def test_what_has_no_maps_is_refused():
    model = made("llama")
    for layer, head, match in ((1, 4, "head"), (5, 0, "layers"), ("model.layers.*", 0, "layer")):
        with pytest.raises(ValueError, match=match):
            head_weights(model, layer, head)
    part = model.model.layers[1].self_attn
    part.other = part.q_proj
    del part.q_proj
    with pytest.raises(ValueError, match="q_proj"):
        head_weights(model, 1, 0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_logits_at_some_positions_are_those_of_all(kind):
    model, ids = made(kind), torch.randint(0, 50, (3, 6))
    at = torch.tensor([[0, 5], [2, 2], [4, 1]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        with output_rows(model, at):
            found = model(input_ids=ids).logits
            rows = attention_rows(model, {"input_ids": ids}, at)
        again = model(input_ids=ids).logits
    torch.testing.assert_close(found, whole[torch.arange(3)[:, None], at])
    assert torch.equal(again, whole)
    assert len(rows) == 2
    for wrong in (at[:2], at + 1):
        with pytest.raises(ValueError, match="positions"), output_rows(model, wrong):
            model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, whole)
    with pytest.raises(ValueError, match="output layer"), output_rows(model.base_model, at):
        pass
