from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from subspan.nn import SAE, PublishedSAE, SAEAdapter, SparseAutoencoder, load_sae

D, C = 5, 12


def weights(architecture: str) -> dict[str, Tensor]:
    found = {"W_enc": torch.randn(D, C), "W_dec": torch.randn(C, D), "b_dec": torch.randn(D)}
    for name in {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}.get(
        architecture, ("b_enc",)
    ):
        found[name] = torch.rand(C) if name == "threshold" else 0.3 * torch.randn(C)
    return found


def folder(path: Path, architecture: str, stored: dict[str, Tensor] | None = None, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(stored or weights(architecture), path / "sae_weights.safetensors")
    facts = {"d_in": D, "d_sae": C, "architecture": architecture, "normalize_activations": "none", **config}
    (path / "cfg.json").write_text(json.dumps(facts))
    return path


def by_row(w: dict[str, Tensor], architecture: str, row: Tensor, k: int, centred: bool) -> Tensor:
    """Codes of one row, atom by atom."""
    row = row - w["b_dec"] if centred else row
    codes = torch.zeros(C)
    for j in range(C):
        product = float(row @ w["W_enc"][:, j])
        if architecture == "gated":
            size = product * float(w["r_mag"][j].exp()) + float(w["b_mag"][j])
            codes[j] = max(size, 0) if product + float(w["b_gate"][j]) > 0 else 0
            continue
        product += float(w["b_enc"][j])
        least = float(w["threshold"][j]) if architecture == "jumprelu" else 0
        codes[j] = product if product > max(least, 0) else 0
    if architecture == "topk":
        codes[codes.argsort()[: C - k]] = 0
    return codes


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_every_architecture_codes_as_atom_by_atom(tmp_path: Path, architecture: str, centred: bool) -> None:
    w = weights(architecture)
    sae = load_sae(folder(tmp_path / "sae", architecture, w, k=3, apply_b_dec_to_input=centred))
    x = torch.randn(20, D)
    wanted = torch.stack([by_row(w, architecture, row, 3, centred) for row in x])
    torch.testing.assert_close(sae.encode(x), wanted)
    torch.testing.assert_close(sae(x), wanted @ w["W_dec"] + w["b_dec"])
    assert 0 < int((wanted > 0).sum()) < wanted.numel()
    assert isinstance(sae, SAE)
    assert not list(sae.parameters())


def test_topk_by_decoder_norm_is_the_folded_autoencoder() -> None:
    w = weights("topk")
    lengths = w["W_dec"].norm(dim=1)
    folded = {**w, "W_enc": w["W_enc"] * lengths, "b_enc": w["b_enc"] * lengths, "W_dec": w["W_dec"] / lengths[:, None]}
    x, config = torch.randn(20, D), {"architecture": "topk", "k": 4}
    scaled = PublishedSAE(w, {**config, "rescale_acts_by_decoder_norm": True})
    plain = PublishedSAE(folded, config)
    torch.testing.assert_close(scaled.encode(x), plain.encode(x))
    torch.testing.assert_close(scaled(x), plain(x))
    assert not torch.equal(plain.encode(x) > 0, PublishedSAE(w, config).encode(x) > 0)


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_rows_that_are_normalised_get_their_size_back(normalization: str) -> None:
    # An autoencoder that rebuilds everything: what comes out is what went in.
    eye = torch.eye(D)
    w = {"W_enc": torch.cat([eye, -eye], 1), "W_dec": torch.cat([eye, -eye]), "b_dec": torch.zeros(D)}
    sae = PublishedSAE({**w, "b_enc": torch.zeros(2 * D)}, {"normalize_activations": normalization})
    x = torch.randn(9, D) * torch.logspace(-1, 2, 9).unsqueeze(1)
    torch.testing.assert_close(sae(x), x, rtol=1e-3, atol=1e-3)
    prepared = sae.prepare(x)
    torch.testing.assert_close(sae.decode(sae.encode(x)), prepared)
    sizes = prepared.norm(dim=1) if normalization != "layer_norm" else prepared.std(1) * D**0.5
    torch.testing.assert_close(sizes, torch.full((9,), D**0.5), rtol=1e-3, atol=0)


def test_configurations_of_older_versions_are_understood(tmp_path: Path) -> None:
    w = weights("topk")
    x = torch.randn(6, D)
    new = load_sae(folder(tmp_path / "new", "topk", w, k=2))
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "normalize_activations": False}
    torch.testing.assert_close(load_sae(folder(tmp_path / "old", "standard", w, **old)).encode(x), new.encode(x))
    scale = torch.rand(C) + 0.5
    scaled = load_sae(folder(tmp_path / "scaled", "topk", {**w, "scaling_factor": scale}, k=2))
    torch.testing.assert_close(scaled(x), (new.encode(x) * scale) @ w["W_dec"] + w["b_dec"])


def test_rows_times_a_number_need_that_number(tmp_path: Path) -> None:
    w, x = weights("standard"), torch.randn(6, D)
    path = folder(tmp_path / "sae", "standard", w, normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="input_scale"):
        load_sae(path)
    plain = load_sae(folder(tmp_path / "plain", "standard", w))
    torch.testing.assert_close(load_sae(path, input_scale=3.0)(x), plain(3 * x) / 3)
    with pytest.raises(ValueError, match="need none"):
        load_sae(tmp_path / "plain", input_scale=3.0)


@pytest.mark.parametrize("variant", ["topk", "batchtopk"])
def test_our_own_are_written_for_others(tmp_path: Path, variant: Any) -> None:
    sae, x = SparseAutoencoder(D, C, 3, variant=variant), 4 * torch.randn(50, D) + 2
    sae.set_statistics(x)
    sae.training_loss(x)
    sae.threshold *= 0.99  # no product is as large as the threshold to the last bit
    sae.save(tmp_path / "sae")
    again = load_sae(tmp_path / "sae")
    torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again(x), sae.eval()(x), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "sae/cfg.json").read_text())
    assert (config["architecture"], config["d_in"], config["d_sae"]) == (
        {"topk": "topk", "batchtopk": "jumprelu"}[variant],
        D,
        C,
    )


def test_an_adapter_takes_any_three_callables() -> None:
    sae = SAEAdapter(torch.relu, lambda z: z, torch.eye(3))
    assert isinstance(sae, SAE)
    assert sae.encode(torch.tensor([[-1.0, 2.0, 0.0]])).tolist() == [[0.0, 2.0, 0.0]]
    with pytest.raises(ValueError, match="decoder"):
        SAEAdapter(torch.relu, torch.relu, torch.full((3, 3), torch.nan))


def test_what_is_no_autoencoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/sae.pt").write_bytes(b"")
    for path in (tmp_path / "nowhere", tmp_path / "pickled"):
        with pytest.raises(ValueError, match=r"cfg\.json and sae_weights\.safetensors are needed"):
            load_sae(path)
    with pytest.raises(ValueError, match=r"sae\.pt could run code"):
        load_sae(tmp_path / "pickled")
    w = weights("standard")
    broken = {**w, "W_enc": w["W_enc"].T.contiguous()}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (w, {"architecture": "transcoder"}, "architecture: 'transcoder'"),
        (w, {"architecture": "gated"}, "b_gate, b_mag, r_mag missing"),
        (w, {"architecture": "topk"}, "k: a topk autoencoder"),
        (w, {"normalize_activations": "other"}, "normalize_activations: expected one of"),
        (w, {"d_in": D + 1}, f"d_in: cfg.json says {D + 1}, the weights have {D}"),
        (broken, {}, r"W_enc: expected shape \(5, 12\)"),
        ({**w, "b_enc": torch.full((C,), torch.inf)}, {}, "b_enc: contains NaN"),
    ]
    for number, (stored, config, said) in enumerate(cases):
        path = folder(tmp_path / str(number), config.pop("architecture", "standard"), stored, **config)
        with pytest.raises(ValueError, match=said):
            load_sae(path)
    with pytest.raises(ValueError, match="expected 5 columns"):
        PublishedSAE(w, {}).encode(torch.zeros(2, D + 1))
