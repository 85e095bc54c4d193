"""What the protocols of layers are made of."""

import pytest
import torch

pytest.importorskip("lightning", reason="the protocols train with Lightning")

from subspan.datasets import is_installed, load_sentence_encoder, stdlib_docstrings
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.nn import CRATE
from subspan.reproduce import butterfly, causal_grassmann, crate, gcr, simvq, ulsam
from subspan.reproduce.materials import sentence_pairs
from subspan.reproduce.materials.image_features import labelled_images
from subspan.reproduce.materials.sentence_pairs import SentencePairs, TokenStates, docstring_pairs

pytestmark = pytest.mark.filterwarnings("ignore")


def test_superclasses_are_twenty_of_five_and_other_classes_have_a_parity():
    names = tuple(name for group in gcr.COARSE for name in group)
    assert len(set(names)) == 100
    coarse = gcr.coarse_labels(torch.arange(100).numpy(), names)
    assert coarse.bincount().tolist() == [5] * 20
    assert gcr.coarse_labels(torch.arange(4).numpy(), ("0", "1", "2", "3")).tolist() == [0, 1, 0, 1]


def test_spread_and_principal_planes_of_planted_classes():
    planes = random_basis(16, 2, batch=(3,), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    labels = torch.arange(3).repeat_interleave(40)
    x = (planes[labels] @ torch.randn(120, 2, 1, generator=torch.Generator().manual_seed(1))).squeeze(-1)
    parts = {"train": x[::2], "test": x[1::2]}
    coarse = {"train": labels[::2], "test": labels[1::2]}
    assert gcr.clafic(parts, coarse, (2,)) == [[2, 100.0]]
    # Directions of a plane are uniform on a circle: a right angle between two on average.
    assert gcr.within_class_angle(x, labels) == pytest.approx(90, abs=5)
    assert gcr.within_class_angle(x.abs() * 0 + 1, labels) == pytest.approx(0, abs=0.1)


def test_codes_out_of_use_are_restarted_and_patches_are_whole():
    torch.manual_seed(0)
    quantizer = simvq.RestartedVQ(2, 8)
    quantizer.codes += 100
    quantizer.total.copy_(quantizer.codes)
    z = torch.randn(64, 2)
    for _ in range(600):
        quantizer(z)
    assert len(quantizer.eval()(z).codes.unique()) == 8
    images = torch.arange(2 * 16 * 16 * 3, dtype=torch.uint8).reshape(2, 16, 16, 3).numpy()
    rows = simvq.patches(images)
    assert rows.shape == (8, 192)
    first = torch.from_numpy(images[0, :8, :8]).permute(2, 0, 1).flatten() / 127.5 - 1
    torch.testing.assert_close(rows[0], first)


def test_every_transform_but_the_gaussian_is_peeled():
    for name, matrix in butterfly.transforms(16, 0).items():
        error = butterfly.peel(name, matrix)
        assert (error > 0.3) if name == "Gaussian" else (error < 1e-12), name
        assert 0 <= butterfly.low_rank_error(matrix) <= 1
    errors = butterfly.learn(butterfly.transforms(4, 0)["DFT"], "bit-reversal", 60, 0)
    assert errors.shape == (butterfly.RESTARTS,)
    assert float(errors.min()) < float(errors.max())
    made = {name: sum(p.numel() for p in make().parameters()) for name, make in butterfly.layers(64).items()}
    assert made["low rank"] >= made["butterfly, complex BPBP"]


def test_no_way_of_mixing_sees_the_future():
    torch.manual_seed(0)
    for name, make in causal_grassmann.MIXINGS.items():
        layer = make()
        h = torch.randn(1, 20, causal_grassmann.D)
        changed = h.clone()
        changed[:, 11:] += 1
        torch.testing.assert_close(layer(changed)[:, :11], layer(h)[:, :11], msg=name)


def test_heads_of_pairs_are_as_large_and_blind_to_padding():
    torch.manual_seed(0)
    a, b = torch.randn(2, 7, 384), torch.randn(2, 5, 384)
    masks = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    shorter = masks[0].clone()
    shorter[:, 4:] = False
    sizes = {}
    for name, make in causal_grassmann.HEADS.items():
        head = make(384, 3).eval()
        sizes[name] = sum(p.numel() for p in head.parameters())
        torch.testing.assert_close(head(a, b, shorter, masks[1]), head(a[:, :4], b, shorter[:, :4], masks[1]), msg=name)
        # Means of tokens know nothing of their order; a Transformer without positions does not either.
        turned = head(a[:, [1, 0, 2, 3, 4, 5, 6]], b, *masks)
        assert torch.allclose(turned, head(a, b, *masks), atol=1e-5) == (name != "Grassmann"), name
        assert not torch.allclose(head(b, a, *masks[::-1]), head(a, b, *masks), atol=1e-4), name
    assert max(sizes.values()) < 1.02 * min(sizes.values())


@pytest.mark.long
def test_a_planted_pairing_is_learnt_by_every_head(monkeypatch):
    # The hypothesis is the premise again, or another: what a head reads from a pair, not from a sentence.
    monkeypatch.setattr(causal_grassmann, "HEAD_EPOCHS", 8)
    generator = torch.Generator().manual_seed(0)
    states = object.__new__(TokenStates)
    states.rows = torch.randn(400, 16, generator=generator).half()
    states.place = {str(i): (4 * i, 4 * i + 4) for i in range(100)}
    first = torch.randint(100, (600,), generator=generator)
    labels = torch.arange(600) % 2
    second = torch.where(labels == 1, first, (first + 37) % 100)
    names = [[str(i) for i in each.tolist()] for each in (first, second)]
    train = SentencePairs(names[0][:500], names[1][:500], labels[:500], ("another", "the same"))
    test = SentencePairs(names[0][500:], names[1][500:], labels[500:], train.classes)
    for name, make in causal_grassmann.HEADS.items():
        assert causal_grassmann.head_accuracy(make, states, train, test, 0)["accuracy"] > 80, name


def test_pairs_of_docstrings_share_no_text_between_parts(monkeypatch):
    entries = stdlib_docstrings(kinds=("function",))
    monkeypatch.setattr(sentence_pairs, "stdlib_docstrings", lambda **_: entries)
    train, test = docstring_pairs(200, 100)
    assert len(train) == 200
    assert len(test.premises) == len(test.hypotheses) == 100
    assert not {*train.premises, *train.hypotheses} & {*test.premises, *test.hypotheses}
    assert all(a != b for a, b in zip(train.premises, train.hypotheses))
    assert train.labels.float().mean() == 0.5
    again, _ = docstring_pairs(200, 100)
    assert again.premises == train.premises


def test_token_states_are_those_of_each_text_alone(monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    if not is_installed("minilm"):
        pytest.skip("the sentence encoder is not installed")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path))
    texts = ["A dog runs.", "Two women are embracing while holding packages.", "A dog sleeps.", "No."]
    states = TokenStates(texts)
    model, tokenizer = load_sentence_encoder()
    rows, mask = states.of(texts)
    assert mask.sum(1).tolist() == [states.length(text) for text in texts]
    for text, row, own in zip(texts, rows, mask):
        expected = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].detach()
        torch.testing.assert_close(row[own], expected, atol=2e-3, rtol=2e-3)
    pairs = SentencePairs(texts[:3], texts[1:], torch.tensor([0, 1, 0]), ("no", "yes"))
    batches = states.batches(pairs, 2, 0)
    assert sorted(int(row) for batch in batches for row in batch) == [0, 1, 2]
    (a, _, a_mask, _), labels = states.batch(pairs, batches[0])
    assert labels.tolist() == [pairs.labels[row] for row in batches[0]]
    torch.testing.assert_close(a[0][a_mask[0]], states.of([texts[batches[0][0]]])[0][0])


def test_arms_of_the_thinned_network():
    block = torch.nn.Sequential(torch.nn.Conv2d(112, 112, 1), torch.nn.Conv2d(112, 112, 1))
    model = torch.nn.Sequential(block, torch.nn.Flatten())
    x = torch.randn(1, 112, 2, 2)
    assert ulsam.middle_blocks(model, x) == ["0"]
    sizes = {}
    for name, make in ulsam.ARMS.items():
        surgery = ulsam.operate(model, ["0"], make, x)
        sizes[name] = sum(p.numel() for p in model.parameters())
        if surgery is not None:
            surgery.undo()
    assert model[0] is block
    assert sizes["blocks deleted"] == 0
    assert sizes["ULSAM, 4 groups"] == 5 * 112 + 12
    assert sizes["the network as it is"] > sizes["squeeze and excite"] > sizes["ULSAM, 1 group"]


def test_hidden_entries_of_a_planted_plane_are_found():
    generator = torch.Generator().manual_seed(0)
    plane = random_basis(30, 3, generator=generator)
    rows = torch.randn(200, 3, generator=generator, dtype=torch.float64) @ plane.mT + 5
    noisy = rows + 1e-4 * torch.randn(200, 30, generator=generator, dtype=torch.float64)
    hidden = torch.rand(200, 30, generator=generator) < 0.7
    filled = crate.PCACompletion(noisy, 3)(noisy, hidden)
    assert torch.equal(filled[~hidden], noisy[~hidden])
    seen = (~hidden).sum(1) >= 6
    assert float((filled - rows)[seen].abs().median()) < 1e-3


def test_rivals_of_crate_are_as_large_and_heads_are_told_from_chance():
    sizes = {arm: sum(p.numel() for p in make(28, 4, 10).parameters()) for arm, make in crate.ARMS.items()}
    assert sizes["ViT, equal parameters"] == pytest.approx(sizes["CRATE"], rel=0.03)
    assert sizes["ViT, equal width"] > 3.5 * sizes["CRATE"]
    assert crate.thirds([6.0, 4.0, 3.0, 3.0, 2.0, 1.0]) == (5.0, 1.5)
    assert crate.head_angles(crate.random_planes(0))[1] == pytest.approx(1, abs=0.1)
    same = Subspace(random_basis(12, 4, generator=torch.Generator().manual_seed(0)).expand(3, 12, 4))
    assert crate.head_angles([same]) == pytest.approx((0, 3), abs=1e-4)
    images = torch.randn(2, 1, 8, 8)
    vit = CRATE(8, 2, 3, 12, 3, 2, channels=1, layer=lambda: crate.ViTLayer(12, 3))
    assert [each.layer for each in crate.profile(vit, images)] == ["layers.0.qkv", "layers.1.qkv"]


def test_the_first_pictures_of_each_part_are_a_set_of_their_own():
    whole = labelled_images("digits")
    few = whole.first(50, 20)
    assert len(few.images) == 70
    assert (few.images[few.train] == whole.images[whole.train[:50]]).all()
    assert (few.labels[few.test] == whole.labels[whole.test[:20]]).all()
