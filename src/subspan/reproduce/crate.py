"""White-box transformers: CRATE beside ViTs, the rate and sparsity of its layers, and masked patches filled in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from subspan.geometry import Subspace, expected_overlap, principal_angles
from subspan.nn import CRATE, CRATEAutoencoder, CRATELayer
from subspan.nn.training import quiet_trainer
from subspan.probe import LayerRate, rate_profile

from .materials.image_features import labelled_images
from .materials.small_networks import accuracy, pixels
from .protocol import Check, Outcome, Progress, Table

WIDTH, HEADS, DEPTH, EPOCHS = 96, 6, 6, 4
BATCH, RATE, DECAY = 32, 1e-3, 0.05
N_TRAIN, N_TEST, N_PROFILE = 5000, 2000, 500
MASKED_DEPTH, MASKED_EPOCHS, MASKED_TRAIN = 4, 8, 6000
PCA_RANKS = (8, 16, 32, 64, 128)


class ViTLayer(nn.Module):
    """The black-box rival: pre-norm attention with maps of its own for query, key and value, and a GELU network."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """The next layer's tokens."""
        q, k, v = self.qkv(self.attention_norm(z)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        z = z + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return z + self.mlp(self.mlp_norm(z))


Maker = Callable[[int, int, int, int], CRATE]
ARMS: dict[str, Maker] = {
    "CRATE": lambda size, patch, classes, depth: CRATE(size, patch, classes, WIDTH, HEADS, depth, channels=1),
    "ViT, equal parameters": lambda size, patch, classes, depth: CRATE(
        size, patch, classes, WIDTH // 2, HEADS // 2, depth, channels=1, layer=lambda: ViTLayer(WIDTH // 2, HEADS // 2)
    ),
    "ViT, equal width": lambda size, patch, classes, depth: CRATE(
        size, patch, classes, WIDTH, HEADS, depth, channels=1, layer=lambda: ViTLayer(WIDTH, HEADS)
    ),
    "CRATE, strict (our experiment)": lambda size, patch, classes, depth: CRATE(
        size, patch, classes, WIDTH, HEADS, depth, channels=1, strict="gradient"
    ),
}


def train(network: nn.Module, loss: Callable[[Any], Tensor], data: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """AdamW under one cycle of the rate; batches follow the seed alone."""
    import lightning

    class Module(lightning.LightningModule):
        """The loss of a batch."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, index: int) -> Tensor:
            """The loss."""
            return loss(batch)

        def configure_optimizers(self) -> Any:
            """The rate rises over a fifth of the steps and falls to zero."""
            optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed + 1000)
    with quiet_trainer(max_epochs=epochs, gradient_clip_val=1.0) as trainer:
        trainer.fit(Module(), loader)
    return network.eval()


def profile(model: CRATE, images: Float[Tensor, "n c h w"]) -> list[LayerRate]:
    """The layers' rates: of W = LN(z) U for CRATE, of the heads' values for a ViT."""
    first: Any = model.layers[0]
    batches = images.split(250)
    if isinstance(first, CRATELayer):
        return rate_profile(model, batches)
    return rate_profile(model, batches, "layers.*.qkv", heads=first.heads, fused=True)


def thirds(values: list[float]) -> tuple[float, float]:
    """Means of the first and the last third."""
    n = max(1, len(values) // 3)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def head_angles(planes: list[Subspace]) -> tuple[float, float]:
    """Of pairs of heads of one layer: mean largest principal angle (degrees), and mean overlap over that of chance."""
    largest, overlap = [], []
    for each in planes:
        i, j = torch.triu_indices(len(each.basis), len(each.basis), 1)
        angles = principal_angles(each.basis[i], each.basis[j])
        largest.append(math.degrees(float(angles.amax(-1).mean())))
        overlap.append(float(angles.cos().square().mean()))
    expected = expected_overlap(planes[0].dim, planes[0].dim, planes[0].ambient_dim)
    return float(np.mean(largest)), float(np.mean(overlap)) / expected


def random_planes(seed: int) -> list[Subspace]:
    """As many random heads as CRATE's, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(DEPTH, HEADS, WIDTH, WIDTH // HEADS, generator=generator).double()).Q
    return [Subspace(each) for each in bases]


class PCACompletion:
    """Hidden entries of rows by probabilistic PCA: the conditional mean given the entries that are seen."""

    def __init__(self, rows: Float[Tensor, "n d"], rank: int) -> None:
        self.plane = Subspace.fit(rows.double(), rank=rank)

    def __call__(self, rows: Float[Tensor, "n d"], hidden: Bool[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The rows with their hidden entries filled in."""
        plane = self.plane
        assert plane.center is not None
        assert plane.variances is not None
        assert plane.residual_variance is not None
        noise = plane.residual_variance.clamp_min(1e-6)
        prior = (plane.variances - noise).clamp_min(1e-9)
        filled = []
        for part, mask in zip(rows.split(100), hidden.split(100)):
            centered = (part.double() - plane.center) * ~mask
            gram = torch.einsum("dk,nd,dl->nkl", plane.basis, (~mask).double(), plane.basis)
            inner = torch.linalg.solve(gram + torch.diag(noise / prior), (centered @ plane.basis).unsqueeze(-1))
            filled.append(torch.where(mask, inner.squeeze(-1) @ plane.basis.mT + plane.center, part.double()))
        return torch.cat(filled).to(rows.dtype)


def completion(
    images: dict[str, Float[Tensor, "n c h w"]], patch: int, epochs: int, depth: int, seed: int
) -> dict[str, float]:
    """Mean squared error on hidden patches of the test images, for CRATE-MAE, the mean patch and linear completion."""
    torch.manual_seed(seed)
    model = CRATEAutoencoder(images["train"].shape[-1], patch, WIDTH, HEADS, depth, channels=1)
    generator = torch.Generator().manual_seed(seed)
    train(model, lambda batch: model.loss(batch[0], generator), TensorDataset(images["train"]), epochs, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    hidden = model.draw_mask(len(images["test"]), generator)
    rows = {part: model.patches(x).flatten(1) for part, x in images.items()}
    pixel = patch**2
    wide = hidden.repeat_interleave(pixel, 1)

    def error(found: Tensor) -> float:
        return float((found - rows["test"])[wide].square().mean())

    with torch.no_grad():
        ours = torch.cat([model(x, m) for x, m in zip(images["test"].split(250), hidden.split(250))])
    # The rank is chosen on training images that the fit leaves out.
    left_out = min(500, len(rows["train"]) // 4)
    kept, tried = rows["train"][left_out:], rows["train"][:left_out]
    masks = model.draw_mask(len(tried), generator).repeat_interleave(pixel, 1)
    ranks = [rank for rank in PCA_RANKS if rank < min(kept.shape)]
    errors = [float((PCACompletion(kept, rank)(tried, masks) - tried)[masks].square().mean()) for rank in ranks]
    best = ranks[int(np.argmin(errors))]
    return {
        "CRATE-MAE": error(ours.flatten(1)),
        "mean patch of the place": error(rows["train"].mean(0).expand_as(rows["test"])),
        f"PCA completion, rank {best}": error(PCACompletion(rows["train"], best)(rows["test"], wide)),
    }


def pictures(quick: bool) -> tuple[str, int, dict[str, Any], dict[str, Int[np.ndarray, " n"]]]:
    """Name, patch size, images and labels: Fashion-MNIST, or scikit-learn's digits where the data folder lacks it."""
    data = labelled_images("fashion_mnist")
    x = pixels(np.asarray(data.images))
    small = x.shape[-1] < 28
    order = np.random.default_rng(0).permutation(data.train)
    n, m = (500, 300) if quick else (N_TRAIN, N_TEST)
    parts = {"train": order[:n], "test": data.test[:m], "masked": order[: 500 if quick else MASKED_TRAIN]}
    images = {part: x[torch.from_numpy(index)] for part, index in parts.items()}
    return data.name, 2 if small else 4, images, {part: data.labels[index] for part, index in parts.items()}


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Train every arm, profile its layers on held-out images, and fill in masked patches."""
    progress("data", 0.0)
    name, patch, images, labels = pictures(quick)
    seeds, epochs = (range(seed, seed + 1), 1) if quick else (range(seed, seed + 2), EPOCHS)
    size, classes = images["train"].shape[-1], int(labels["train"].max()) + 1
    data = TensorDataset(images["train"], torch.from_numpy(labels["train"].astype(np.int64)))
    held_out = images["test"][:N_PROFILE]
    # The experiment has no published number to meet, and gets one seed.
    arms = {arm: make for arm, make in ARMS.items() if not (quick and "strict" in arm)}
    plan = [(each, arm) for each in seeds for arm in arms if "strict" not in arm or each == seed]
    scores: dict[str, list[float]] = {arm: [] for arm in arms}
    before: dict[str, list[list[LayerRate]]] = {arm: [] for arm in arms}
    after: dict[str, list[list[LayerRate]]] = {arm: [] for arm in arms}
    sizes: dict[str, int] = {}
    angles: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for done, (each, arm) in enumerate(plan):
        progress(f"{arm}, seed {each}", 0.02 + 0.8 * done / len(plan))
        torch.manual_seed(each)
        model = arms[arm](size, patch, classes, DEPTH)
        sizes[arm] = sum(p.numel() for p in model.parameters())
        before[arm].append(profile(model, held_out))
        train(model, lambda batch, model=model: F.cross_entropy(model(batch[0]), batch[1]), data, epochs, each)
        after[arm].append(profile(model, held_out))
        scores[arm].append(100 * accuracy(model, images["test"], labels["test"]))
        if "CRATE" in arm:
            angles[arm].append(head_angles(model.subspaces()))
    progress("masked autoencoding", 0.84)
    parts = {"train": images["masked"], "test": images["test"]}
    depth, masked_epochs = (1, 1) if quick else (MASKED_DEPTH, MASKED_EPOCHS)
    errors = completion(parts, patch, masked_epochs, depth, seed)

    mean = {arm: float(np.mean(values)) for arm, values in scores.items()}
    rate = {
        arm: [np.mean([[r.compression for r in run] for run in runs], 0).tolist() for runs in (before[arm], after[arm])]
        for arm in arms
    }
    zero_rows = [
        np.mean([[r.zeros or 0.0 for r in run] for run in runs], 0) for runs in (before["CRATE"], after["CRATE"])
    ]
    zeros = [float(rows.mean()) for rows in zero_rows]
    first, last = thirds(rate["CRATE"][1])
    last_at_start = thirds(rate["CRATE"][0])[1]
    chance, _ = head_angles(random_planes(seed))
    largest = float(np.mean([angle for angle, _ in angles["CRATE"]]))
    gap = mean["CRATE"] - mean["ViT, equal parameters"]
    others = {key: value for key, value in errors.items() if key != "CRATE-MAE"}
    mean_patch, linear = others.values()
    layers = range(DEPTH)
    return Outcome(
        claim="Every layer is a step of compression onto subspaces and one of sparsification: through depth R^c falls "
        "and sparsity rises, on held-out data. ImageNet: 66.7 at 6.1 M parameters and 70.8 at 22.8 M, where ViTs have "
        "71.5 at 5.7 M and 72.4 at 22.1 M.",
        data=f"{name}: {len(labels['train'])} training and {len(labels['test'])} test pictures, patches of {patch} "
        f"pixels; profiles on {len(held_out)} test pictures; {len(images['masked'])} for masked autoencoding",
        model=f"CRATE {WIDTH}/{HEADS}/{DEPTH} (width, heads, layers), {epochs} epochs of AdamW in batches of {BATCH}; "
        f"{len(seeds)} seeds; autoencoder of {depth} + {depth} layers, 75 % masked, {masked_epochs} epochs",
        metric="test accuracy (percent), mean of seeds",
        ours=mean["CRATE"],
        baselines={arm: value for arm, value in mean.items() if arm != "CRATE"},
        bar="at least the ViT of equal parameters less 2 points",
        holds=gap >= -2,
        checks=[
            Check("R^c falls through depth", "last third less first third, nats", last - first, "< 0", last < first),
            Check(
                "R^c falls by training",
                "last third, trained less untrained, nats",
                last - last_at_start,
                "< 0",
                last < last_at_start,
            ),
            Check("sparser by training", "share of zeros, trained less untrained", zeros[1] - zeros[0], "> 0",
                  zeros[1] > zeros[0]),
            Check("heads are incoherent", "mean largest angle less that of random planes, degrees", largest - chance,
                  ">= -5", largest >= chance - 5),
            Check("masked patches beside the mean patch", "error over error", errors["CRATE-MAE"] / mean_patch, "< 1",
                  errors["CRATE-MAE"] < mean_patch),
            Check("masked patches beside PCA", "error over error", errors["CRATE-MAE"] / linear, "< 1",
                  errors["CRATE-MAE"] < linear),
        ],
        tables=[
            Table(
                "accuracy",
                ["arm", "parameters", "mean", "lowest", "highest", "largest angle of heads, degrees",
                 "overlap of heads over chance"],
                [
                    [
                        arm,
                        sizes[arm],
                        round(mean[arm], 2),
                        round(min(values), 2),
                        round(max(values), 2),
                        round(float(np.mean([a for a, _ in angles[arm]])), 2) if angles[arm] else None,
                        round(float(np.mean([o for _, o in angles[arm]])), 3) if angles[arm] else None,
                    ]
                    for arm, values in scores.items()
                ],
            ),
            Table(
                "CRATE, layer by layer on held-out pictures, before and after training",
                ["layer", "R^c before", "R^c after", "zeros before", "zeros after", "η σ² before", "η σ² after"],
                [
                    [
                        k + 1,
                        *(round(rate["CRATE"][t][k], 2) for t in range(2)),
                        *(round(float(zero_rows[t][k]), 4) for t in range(2)),
                        *(round(float(np.mean([run[k].stability or 0.0 for run in runs])), 3)
                          for runs in (before["CRATE"], after["CRATE"])),
                    ]
                    for k in layers
                ],
            ),
            Table(
                "R^c of the other arms (a ViT's heads: their values)",
                ["layer", *(f"{arm}, {when}" for arm in arms if arm != "CRATE" for when in ("before", "after"))],
                [
                    [k + 1, *(round(rate[arm][t][k], 2) for arm in arms if arm != "CRATE" for t in range(2))]
                    for k in layers
                ],
            ),
            Table(
                "hidden patches filled in, mean squared error (pixels of unit variance)",
                ["method", "error"],
                [[key, round(value, 4)] for key, value in errors.items()],
            ),
        ],
        notes=[
            "The strict arm (orthonormal tied U, exact gradient step) is an experiment of ours, one seed; no such "
            "model was published.",
            "The PCA's rank is chosen on training pictures that its fit leaves out.",
            "Nothing was tuned: step and threshold are those of the released code, 0.1 and 0.1, and 0.5 in the "
            "autoencoder.",
        ],
    )  # fmt: skip
