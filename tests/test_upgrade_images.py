"""From a FAISS index of real images by one network to a verified index for another network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from subspan import cli
from subspan.datasets import BUNDLED, is_installed

faiss = pytest.importorskip("faiss", reason="faiss comes with the extra index")
MODELS = ("efficientnet-lite0", "efficientnet-lite2")
CROPS, SIDE = 220, 96


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    for model in MODELS:
        if not is_installed(model):
            pytest.skip(f"the weights of {model} are not installed (subspan models install {model})")
    image_module = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra vision")
    from subspan.reproduce.materials.image_features import image_encoder

    photos = list(BUNDLED["photographs"]().values())
    rng = np.random.default_rng(0)
    crops = []
    for i in range(CROPS):
        photo = photos[i % len(photos)]
        top, left = (rng.integers(side - SIDE) for side in photo.shape[:2])
        crops.append(image_module.fromarray(photo[top : top + SIDE, left : left + SIDE]))
    found = {model: image_encoder(64, model).encode(crops) for model in MODELS}
    return {model: rows / np.linalg.norm(rows, axis=1, keepdims=True) for model, rows in found.items()}


def test_an_index_of_real_images_is_upgraded(
    features: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = (features[model] for model in MODELS)
    ids = np.random.default_rng(1).permutation(10_000)[:CROPS]
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(old.shape[1]))
    index.add_with_ids(old, ids)
    faiss.write_index(index, "old.faiss")
    np.save("new.npy", new[:160])
    np.save("ids.npy", ids[:160])
    command = "upgrade old.faiss new.npy --sample-ids ids.npy --method procrustes --migrate new.faiss --wrap both.faiss"
    code = cli.run([*command.split(), "--json"])
    captured = capsys.readouterr()
    assert code in (0, 1), captured.err
    facts = json.loads(captured.out)
    recall = {name: entry["value"] for name, entry in facts["retrieval"].items()}
    assert recall["new/new"] == 1
    assert recall["new/old mapped"] > recall["new/old unmapped"] + 0.1
    assert recall["new/migrated"] > recall["new/old unmapped"] + 0.1
    assert facts["written"]["migrated_index"]["verified"]["agreement"] > 0.99
    # Queries of images that were in no sample, by the new network alone.
    migrated, wrapped = faiss.read_index("new.faiss"), faiss.read_index("both.faiss")
    unseen = np.arange(160, CROPS)
    for answers in (migrated.search(new[unseen], 10)[1], wrapped.search(new[unseen], 10)[1]):
        found = np.mean([ids[i] in row for i, row in zip(unseen, answers)])
        assert found > 0.5
    assert (faiss.read_index("old.faiss").search(new[unseen], 10)[1] == ids[unseen][:, None]).any(1).mean() < 0.3
