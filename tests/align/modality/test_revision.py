from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("lightning", reason="ReVision trains with Lightning (extra: train)")
pytest.importorskip("transformers", reason="ReVision needs a language model (extra: llm)")

import transformers
from lightning import Trainer
from tokenizers import Tokenizer, models, pre_tokenizers

from subspan.align import ReAlign, ReVision, RevisionCollator
from subspan.base import normalize_rows
from subspan.models.splice import IGNORED, PLACEHOLDER

pytestmark = pytest.mark.filterwarnings("ignore:.*rows are few", "ignore::UserWarning:lightning")

D = 12
NOUNS = ("dog", "cat", "bird", "boat")


def small_llm() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>", "a", "on", "grass", "water", "what", "is", "it", *NOUNS]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def modalities(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Text and image embeddings of the same nouns, a gap apart, and captions that name the noun."""
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(5)
    meaning = torch.randn(4, D, generator=fixed)
    cone = torch.randn(2, D, generator=fixed) * 1.5
    noun = torch.randint(4, (n,), generator=generator)

    def side(which: int) -> torch.Tensor:
        return normalize_rows(meaning[noun] + cone[which] + 0.2 * torch.randn(n, D, generator=generator))

    captions = [f"a {NOUNS[index]} on {'water' if index > 2 else 'grass'}" for index in noun.tolist()]
    return side(0), side(1), captions


@pytest.fixture(scope="module")
def aligner() -> ReAlign:
    return ReAlign().fit(modalities(400, 1)[0], modalities(300, 2)[1])


def trained(
    model: ReVision, items: list[dict], collator: RevisionCollator, epochs: int = 12, rate: float = 1e-2, **options
) -> Trainer:
    loader = torch.utils.data.DataLoader(items, 32, shuffle=True, collate_fn=collator)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", **quiet, **options)
    trainer.fit(model.objective(learning_rate=rate), loader)
    return trainer


@pytest.fixture(scope="module")
def stage_one(aligner, tokenizer, tmp_path_factory):
    text, _, captions = modalities(256, 3)
    llm = small_llm()
    # A language model that can speak of what was named before; the adapter has only to name it.
    optimizer = torch.optim.Adam(llm.parameters(), 5e-3)
    told = [f"{caption.split()[1]} {caption.split()[1]} {caption}" for caption in captions]
    words = torch.tensor([[*tokenizer(text)["input_ids"], 1] for text in told])
    for _ in range(80):
        optimizer.zero_grad()
        llm(input_ids=words, labels=words.masked_fill(torch.arange(words.shape[1]) < 2, IGNORED)).loss.backward()
        optimizer.step()
    before = copy.deepcopy(llm.state_dict())
    torch.manual_seed(0)
    model = ReVision(llm, aligner, n_tokens=2)
    items = [{"embedding": vector, "text": caption} for vector, caption in zip(text, captions)]
    folder = tmp_path_factory.mktemp("checkpoints")
    trainer = trained(model, items, RevisionCollator(tokenizer), default_root_dir=folder)
    trainer.save_checkpoint(folder / "last.ckpt")
    return model, before, folder / "last.ckpt"


def likelihood_of_nouns(model: ReVision, images: torch.Tensor, tokenizer) -> torch.Tensor:
    collator = RevisionCollator(tokenizer)
    columns = []
    for index, noun in enumerate(NOUNS):
        caption = f"a {noun} on {'water' if index > 2 else 'grass'}"
        batch = collator([{"embedding": image, "text": caption} for image in images])
        columns.append(model.log_likelihood(images, batch))
    return torch.stack(columns, 1)


def accuracy(model: ReVision, tokenizer) -> float:
    _, images, captions = modalities(120, 4)
    truth = torch.tensor([next(i for i, noun in enumerate(NOUNS) if noun in caption) for caption in captions])
    model.eval()
    return float((likelihood_of_nouns(model, images, tokenizer).argmax(1) == truth).float().mean())


def test_stage_one_trains_the_adapter_on_texts_and_sees_images(stage_one, tokenizer):
    model, before, _ = stage_one
    after = model.llm.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    assert accuracy(model, tokenizer) > 0.85
    untrained = ReVision(copy.deepcopy(model.llm), None, d=D, n_tokens=2)
    assert accuracy(untrained, tokenizer) < 0.6


def test_images_are_generated_from_unmapped(stage_one, tokenizer, monkeypatch):
    model, _, _ = stage_one
    _, images, captions = modalities(40, 5)

    def refuse(*_):
        raise AssertionError("images must not be mapped")

    monkeypatch.setattr(model.aligner, "forward", refuse)
    model.eval()
    ids = model.generate(images, max_new_tokens=5, do_sample=False)
    words = tokenizer.batch_decode(ids, skip_special_tokens=True)
    said = [any(noun in text and noun in caption for noun in NOUNS) for text, caption in zip(words, captions)]
    assert sum(said) > 0.8 * len(said)
    # The same prompt, given explicitly and padded on the left.
    prompt = torch.tensor([[0, 0, PLACEHOLDER]]).expand(40, -1)
    mask = torch.tensor([[0, 0, 1]]).expand(40, -1)
    assert torch.equal(model.generate(images, prompt, mask, max_new_tokens=5, do_sample=False), ids)


def test_a_stage_one_checkpoint_holds_no_language_model(stage_one, aligner):
    model, _, checkpoint = stage_one
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not {name.removeprefix("model.llm.") for name in state} & dict(model.llm.named_parameters()).keys()
    fresh = ReVision(model.llm, aligner, n_tokens=2)
    fresh.objective().load_state_dict(state, strict=False)
    assert torch.equal(fresh.projector[0].weight, model.projector[0].weight)


def test_the_adapter_survives_a_file_and_refuses_another(stage_one, aligner, tmp_path):
    model, _, _ = stage_one
    model.save_projector(tmp_path / "adapter.safetensors")
    fresh = ReVision(model.llm, aligner, n_tokens=2)
    fresh.load_projector(tmp_path / "adapter.safetensors")
    assert torch.equal(fresh.projector[2].weight, model.projector[2].weight)
    with pytest.raises(ValueError, match="n_tokens"):
        ReVision(model.llm, aligner, n_tokens=3).load_projector(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        ReVision(model.llm, None, d=D + 1, n_tokens=2).load_projector(tmp_path / "adapter.safetensors")


def test_stage_two_trains_everything_on_answers_about_real_images(stage_one, tokenizer, monkeypatch):
    model = copy.deepcopy(stage_one[0])
    model.set_stage(2)
    monkeypatch.setattr(model.aligner, "forward", lambda *_: pytest.fail("images must not be mapped"))
    _, images, captions = modalities(64, 6)
    items = [
        {"embedding": image, "prompt": "what is it", "answer": next(noun for noun in NOUNS if noun in caption)}
        for image, caption in zip(images, captions)
    ]
    before = copy.deepcopy(model.llm.state_dict())
    trained(model, items, RevisionCollator(tokenizer), 10, 2e-3, enable_checkpointing=False)
    assert any(not torch.equal(before[name], value) for name, value in model.llm.state_dict().items())
    model.eval()
    prompt = RevisionCollator(tokenizer)([{**item, "answer": ""} for item in items])["input_ids"][:, :-1]
    assert bool((prompt == PLACEHOLDER).any(1).all())
    ids = model.generate(images, prompt, torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
    said = tokenizer.batch_decode(ids[:, :1])
    assert sum(word == item["answer"] for word, item in zip(said, items)) > 0.8 * len(items)


def test_stages_leave_frozen_parts_frozen(aligner):
    llm = small_llm()
    llm.get_input_embeddings().requires_grad_(False)
    before = [parameter.requires_grad for parameter in llm.parameters()]
    model = ReVision(llm, aligner)
    model.set_stage(1)
    assert not any(parameter.requires_grad for parameter in llm.parameters())
    assert not llm.training
    model.set_stage(2)
    assert [parameter.requires_grad for parameter in llm.parameters()] == before
    assert llm.training
    frozen = small_llm().requires_grad_(False)
    ReVision(frozen, aligner, stage=2)
    assert all(parameter.requires_grad for parameter in frozen.parameters())


def test_labels_are_on_captions_and_on_answers_alone(tokenizer):
    collator = RevisionCollator(tokenizer)
    vector = torch.zeros(D)
    batch = collator([{"embedding": vector, "text": "a dog"}, {"embedding": vector, "text": "a dog on grass"}])
    assert batch["input_ids"].tolist() == [[PLACEHOLDER, 3, 10, 1, 0, 0], [PLACEHOLDER, 3, 10, 4, 5, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 3, 10, 1, IGNORED, IGNORED], [IGNORED, 3, 10, 4, 5, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    asked = collator([{"embedding": vector, "prompt": "what is it", "answer": "a dog"}])
    assert asked["labels"].tolist() == [[IGNORED] * 4 + [3, 10, 1]]
    assert RevisionCollator(tokenizer, max_length=3)([{"embedding": vector, "text": "a dog on grass"}])[
        "input_ids"
    ].tolist() == [[PLACEHOLDER, 3, 10]]


def test_the_loss_is_the_likelihood_of_the_labels(aligner, tokenizer):
    model = ReVision(small_llm(), aligner, n_tokens=3).eval()
    text, images, captions = modalities(4, 7)
    batch = RevisionCollator(tokenizer)([{"embedding": x, "text": c} for x, c in zip(text, captions)])
    loss = float(model.training_loss(batch).detach())
    score = model.log_likelihood(model.aligner(text), batch)
    count = int((batch["labels"] != IGNORED).sum())
    assert loss == pytest.approx(-float(score.sum()) / count, rel=1e-5)
    assert not torch.allclose(model.log_likelihood(images, batch), score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aligner": None}, "d: the dimension"),
        ({"aligner": None, "d": D, "n_tokens": 0}, "n_tokens"),
        ({"aligner": None, "d": D, "projector": "conv"}, "projector"),
        ({"aligner": None, "d": D, "stage": 3}, "stage"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ReVision(small_llm(), **options)


def test_bad_items_are_named(tokenizer):
    vector = torch.zeros(D)
    with pytest.raises(ValueError, match="prompt"):
        RevisionCollator(tokenizer)([{"embedding": vector, "prompt": "<image> what", "answer": "dog"}])
    with pytest.raises(ValueError, match="max_length"):
        RevisionCollator(tokenizer, max_length=3)([{"embedding": vector, "prompt": "what is it", "answer": "dog"}])
