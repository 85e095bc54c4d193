"""Diffusion as subspace clustering: planted mixtures, faces under changing light, a trained network, edits."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from sklearn.metrics import normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn

from subspan.cluster import LowRankMixtureDiffusion
from subspan.datasets import is_available, load
from subspan.geometry.grassmann import random_basis
from subspan.measures import clustering_accuracy
from subspan.nn.denoising import DenoisingLoss, DenoisingMLP, PreconditionedDenoiser, denoising_loss, flow
from subspan.nn.low_rank_mixture import LowRankMixtureDenoiser, hard_assignment_energy, hard_denoising_loss
from subspan.solvers import assign, jacobian_rank, jacobian_subspace

from .materials import labelled_images
from .protocol import Check, Outcome, Progress, Table
from .training import shuffled, train
from .trials import Column, Trials

NOISE = (0.05, 0.1, 0.2, 0.4)
RATIOS = (0.75, 1.0, 1.25, 1.5, 2.0, 5.0)
_AMBIENT = 48
_EDIT_NOISE = 0.2


class Setting(NamedTuple):
    """Sizes of a run: draws of planted data, people, directions a person, epochs and pixels of the denoisers."""

    draws: int = 10
    people: int = 38
    dim: int = 9
    epochs: int = 60
    fashion: int = 5000
    fashion_epochs: int = 30
    edits: int = 12


QUICK = Setting(4, 10, 9, 20, 1500, 5, 4)


def planted(
    rows: int, d: int, k: int, generator: torch.Generator, noise: float = 0.01
) -> tuple[Float[Tensor, "m n"], np.ndarray, Float[Tensor, "k n d"]]:
    """`rows` of each of k orthogonal d-dimensional subspaces of R^48, standard coefficients, and small noise."""
    bases = random_basis(_AMBIENT, k * d, generator=generator).reshape(_AMBIENT, k, d).movedim(1, 0)
    z = torch.randn(k, rows, d, dtype=torch.float64, generator=generator)
    x = (z @ bases.mT).flatten(0, 1)
    x = x + noise * torch.randn(x.shape, dtype=torch.float64, generator=generator)
    return x, torch.arange(k).repeat_interleave(rows).numpy(), bases


def projector_error(found: Float[Tensor, "k n d"], truth: Float[Tensor, "k n d"]) -> float:
    """Largest distance |P - P'|_F of the subspaces under their best pairing."""
    gaps = torch.cdist((found @ found.mT).flatten(1), (truth @ truth.mT).flatten(1))
    return float(gaps.detach().gather(1, assign(gaps, maximize=False).unsqueeze(1)).max())


def theory(k: int, d: int, seed: int, **options: Any) -> LowRankMixtureDiffusion:
    """The model of the theorems: unit covariance, no mean, exactly low rank, hard assignment."""
    fixed: Any = {"method": "hard", "covariance": "identity", "center": False, "floor": 0.0, "random_state": seed}
    return LowRankMixtureDiffusion(k, d, **{**fixed, **options})


def quietly(model: LowRankMixtureDiffusion, rows: Any) -> LowRankMixtureDiffusion:
    """A fit that says nothing of components with fewer rows than directions: that is what is measured."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="dim: ")
        return model.fit(rows)


def transition(draws: int, seed: int) -> tuple[Table, Trials[tuple[int, int, float]]]:
    """Errors of the subspaces found against rows a subspace over its dimension; found: an error below 0.5."""
    planned = [(k, d, ratio) for k, d in ((1, 8), (2, 4), (2, 8)) for ratio in RATIOS]

    def run(arm: tuple[int, int, float], draw: int) -> dict[str, float]:
        k, d, ratio = arm
        x, _, bases = planted(round(ratio * d), d, k, torch.Generator().manual_seed(1000 * seed + draw))
        errors = {
            init: projector_error(quietly(theory(k, d, draw, init=init, n_init=1), x).subspaces_.basis, bases)
            for init in (("shape-interaction", "random") if k > 1 else ("shape-interaction",))
        }
        return errors | {f"{init} found": float(value < 0.5) for init, value in errors.items()}

    trials = Trials(planned, range(draws), run)
    bounds = {}
    for k, d, ratio in planned:
        rows = round(ratio * d)
        bounds[k, d, ratio] = round(math.sqrt(2 * max(0, min(d - rows, _AMBIENT - d))), 3)
    columns = {
        "mean error": Column("shape-interaction", digits=3),
        "bound of too few rows": bounds,
        "found": Column("shape-interaction found", digits=12),
        "found, random start": Column("random found", digits=12),
    }
    title = f"planted subspaces of R^{_AMBIENT}, {draws} draws"
    return trials.table(title, ["subspaces", "d", "rows a subspace / d"], columns), trials


def identity_gap(seed: int) -> float:
    """Largest relative difference of the hard denoising loss from what the objective of K-subspaces says it is.

    Over noise levels and bases; the loss is integrated over noise exactly (it is quadratic in it).
    """
    generator = torch.Generator().manual_seed(seed)
    x, _, truth = planted(30, 4, 2, generator)
    points = math.sqrt(_AMBIENT) * torch.cat([torch.eye(_AMBIENT), -torch.eye(_AMBIENT)]).double()
    worst = 0.0
    for bases in (truth, random_basis(_AMBIENT, 4, batch=(2,), generator=generator)):
        chosen = bases[torch.einsum("bn,knd->bkd", x, bases).square().sum(-1).argmax(1)]
        for sigma in (0.05, 0.5, 5.0):
            a = 1 / (1 + sigma**2)
            noisy = x.unsqueeze(1) + sigma * points
            inside = torch.einsum("bpn,bnd->bpd", noisy, chosen)
            denoised = a * torch.einsum("bpd,bnd->bpn", inside, chosen)
            integrated = float((denoised - x.unsqueeze(1)).square().sum(-1).mean())
            objective = float(hard_assignment_energy(x, bases).mean())
            stated = float(x.square().sum(1).mean()) - (2 * a - a**2) * objective + a**2 * sigma**2 * 4
            closed = float(hard_denoising_loss(x, bases, sigma))
            worst = max(worst, abs(integrated - stated) / stated, abs(closed - stated) / stated)
    return worst


def descent(seed: int, epochs: int) -> tuple[float, float, float]:
    """(loss of the trained low-rank denoiser over that of the planted mixture, projector error, error at the start).

    The start is made from labels of which a third are wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    x, labels, bases = planted(200, 4, 2, generator)
    wrong = torch.rand(len(labels), generator=generator).numpy() < 1 / 3
    start = np.where(wrong, 1 - labels, labels)
    begun = theory(2, 4, seed, init=start, max_iter=1).fit(x)
    first = projector_error(LowRankMixtureDenoiser(begun.denoiser_.bases).bases, bases)
    model = theory(2, 4, seed, method="diffusion", init=start, epochs=epochs).fit(x)
    held, _, _ = planted(500, 4, 2, torch.Generator().manual_seed(seed))
    sigma = 0.3 * (0.8 * torch.randn(len(held), dtype=torch.float64, generator=generator)).exp()
    noise = torch.randn(held.shape, dtype=torch.float64, generator=generator)
    exact = LowRankMixtureDenoiser(bases).requires_grad_(False)
    ratio = float(denoising_loss(model.denoiser_, held, sigma, noise) / denoising_loss(exact, held, sigma, noise))
    return ratio, projector_error(model.subspaces_.basis, bases), first


class Faces(NamedTuple):
    """Faces as rows of pixels in [0, 1] and the person of each, half of each person's pictures in each part."""

    name: str
    fit: Float[Tensor, "n p"]
    fit_labels: np.ndarray
    held: Float[Tensor, "m p"]
    held_labels: np.ndarray


def faces(people: int, seed: int) -> Faces:
    """Extended Yale B; where the data folder lacks it, scikit-learn's handwritten digits."""
    name = "yaleb" if is_available("yaleb") else "digits"
    data = load(name)
    x, y = np.asarray(data["x"]).reshape(len(data["y"]), -1) / (255 if name == "yaleb" else 16), np.asarray(data["y"])
    x, y = x[y < y.min() + people], y[y < y.min() + people]
    order = np.random.default_rng(seed).permutation(len(x))
    first = np.zeros(len(x), bool)
    for label in np.unique(y):
        own = order[y[order] == label]
        first[own[: len(own) // 2]] = True
    rows = torch.from_numpy(x).double()
    return Faces(name, rows[first], y[first], rows[~first], y[~first])


def psnr(denoised: Float[Tensor, "n p"], clean: Float[Tensor, "n p"]) -> float:
    """Peak signal to noise ratio (dB) of pixels in [0, 1]."""
    return -10 * math.log10(float((denoised - clean).square().mean()))


def trained_mlp(rows: Float[Tensor, "n p"], *, width: int, epochs: int, seed: int) -> nn.Module:
    """A denoising network trained on rows by the EDM loss, with the rows' mean taken out."""
    spread = float((rows - rows.mean(0)).square().mean().sqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = _Centred(PreconditionedDenoiser(DenoisingMLP(rows.shape[1], width), spread), rows.mean(0).float())
        batches = shuffled(rows.float(), batch_size=128, seed=seed)
        options: Any = {"epochs": epochs, "learning_rate": 1e-3, "schedule": "cosine"}
        return train(denoiser, DenoisingLoss(spread), batches, **options).requires_grad_(False)


class _Centred(nn.Module):
    """A denoiser of rows about a mean."""

    mean: Tensor

    def __init__(self, denoiser: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.mean.to(x) + self.denoiser(x - self.mean.to(x), sigma)


def face_models(data: Faces, people: int, dim: int, seed: int) -> dict[str, LowRankMixtureDiffusion]:
    """The mixture fitted without labels, the same from true labels, and one Gaussian with as many directions."""
    truth = np.unique(data.fit_labels, return_inverse=True)[1]
    most = min(people * dim, len(data.fit) - 2, data.fit.shape[1] - 1)
    hard: Any = {"method": "hard", "random_state": seed}
    mixture = quietly(LowRankMixtureDiffusion(people, dim, init="lsr", **hard), data.fit)
    found, model = mixture.labels_, LowRankMixtureDiffusion
    others = {
        "mixture from true labels": model(people, dim, method="hard", max_iter=1, init=truth.tolist()),
        "one Gaussian": model(1, most, random_state=seed),
        "mixture, likelihood": model(people, dim, init=found, random_state=seed),
        "exactly low-rank mixture": model(people, dim, floor=0.0, init=found, **hard),
    }
    return {"mixture": mixture, **{name: quietly(each, data.fit) for name, each in others.items()}}


class _Diagonal:
    """scikit-learn's mixture with diagonal covariances as a denoiser: each component shrinks pixel by pixel."""

    def __init__(self, rows: Tensor, components: int, seed: int) -> None:
        self.model = GaussianMixture(components, covariance_type="diag", reg_covar=1e-4, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.fit(rows.numpy())

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        means, spread, share = (
            torch.from_numpy(np.asarray(value))
            for value in (self.model.means_, self.model.covariances_, self.model.weights_)
        )
        total = spread + sigma**2
        logits = (
            share.log()
            - total.log().sum(1) / 2
            - ((x.square() @ (1 / total).mT) - 2 * x @ (means / total).mT + (means.square() / total).sum(1)) / 2
        )
        weight = logits.softmax(1)
        gain = spread / total
        return x * (weight @ gain) + weight @ ((1 - gain) * means)


def face_denoising(
    data: Faces, models: dict[str, LowRankMixtureDiffusion], network: nn.Module, components: int, seed: int
) -> dict[str, dict[float, float]]:
    """PSNR on held-out faces of each model at each noise level."""
    denoisers: dict[str, Any] = {
        "nothing done": lambda x, sigma: x,
        **{name: model.denoiser_ for name, model in models.items()},
        "scikit-learn's mixture (diagonal)": _Diagonal(data.fit, components, seed),
        "network": lambda x, sigma: network(x.float(), sigma).double(),
    }
    noise = torch.randn(data.held.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def quality(denoise: Any, sigma: float) -> float:
        parts = (data.held + sigma * noise).split(100)
        return psnr(torch.cat([denoise(part, sigma) for part in parts]), data.held)

    return {name: {sigma: quality(denoise, sigma) for sigma in NOISE} for name, denoise in denoisers.items()}


def face_clusters(
    data: Faces, models: dict[str, LowRankMixtureDiffusion], dim: int, starts: range
) -> tuple[Table, float]:
    """Clustering of the faces by the mixtures, and how much better it is than from random starts (median accuracy)."""
    people = len(np.unique(data.fit_labels))
    options: Any = {"method": "hard", "init": "random", "n_init": 1}
    random = [
        clustering_accuracy(
            data.fit_labels,
            quietly(LowRankMixtureDiffusion(people, dim, random_state=draw, **options), data.fit).labels_,
        )
        for draw in starts
    ]
    rows, accuracies = [], []
    for name in ("mixture", "mixture, likelihood"):
        fitted, held = models[name].labels_, models[name].predict(data.held).numpy()
        for part, truth, labels in (("fitted", data.fit_labels, fitted), ("held out", data.held_labels, held)):
            accuracies.append(clustering_accuracy(truth, labels))
            information = float(normalized_mutual_info_score(truth, labels))
            rows.append([name, part, accuracies[-1], information])
    chance = float(np.median(random))
    rows.append([f"K-subspaces, random starts, median of {len(random)}", "fitted", chance, None])
    title, columns = "clustering of the faces", ["model", "pictures", "accuracy", "mutual information"]
    return Table.rounded(title, columns, rows), accuracies[0] - chance


def fashion_ranks(setting: Setting, seed: int) -> tuple[dict[float, float], int]:
    """Noise → numerical rank of a trained network's Jacobian, on Fashion-MNIST of 14 × 14 pixels; number of pixels."""
    data = labelled_images("fashion_mnist")
    pictures = torch.from_numpy(np.asarray(data.images, np.float32))
    side = 14 if pictures.shape[-1] == 28 else pictures.shape[-1]
    small = nn.functional.adaptive_avg_pool2d(pictures.unsqueeze(1), side).flatten(1) / 255
    rows, held = small[data.train[: setting.fashion]], small[data.test[:4]]
    denoiser = trained_mlp(rows, width=512, epochs=setting.fashion_epochs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ranks = {}
    for sigma in (0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 2.0, 6.0, 20.0):
        noisy = held + sigma * torch.randn(held.shape, generator=generator)
        found = [jacobian_rank(lambda row, s=sigma: denoiser(row.unsqueeze(0), s)[0], row) for row in noisy]
        ranks[sigma] = float(np.mean(found))
    return ranks, rows.shape[1]


def edited(
    denoiser: Any, picture: Float[Tensor, " p"], direction: Float[Tensor, " p"], scales: list[float], sigma: float
) -> Float[Tensor, "s p"]:
    """A real picture carried up to noise `sigma`, moved along a direction by each scale, and carried down again."""
    up = torch.linspace(0.02, sigma, 12)
    with torch.no_grad():
        lifted = flow(denoiser, picture.unsqueeze(0), up)
        moved = lifted + torch.tensor(scales, dtype=lifted.dtype).unsqueeze(1) * direction
        return flow(denoiser, moved, torch.cat([up.flip(0), torch.zeros(1)]))


def edits(data: Faces, models: dict[str, LowRankMixtureDiffusion], count: int, seed: int) -> dict[str, float]:
    """Edits of held-out faces along the leading direction of the denoiser's Jacobian, beside random directions.

    The denoiser is the mixture fitted without labels; who is on a picture is told by the mixture with true labels.
    """
    denoiser, judge = models["mixture"].denoiser_, models["mixture from true labels"]
    generator = torch.Generator().manual_seed(seed)
    half = math.isqrt(data.held.shape[1])
    scale = 0.125 * half

    def kept(pictures: Tensor) -> float:
        who = judge.predict(pictures)
        return float((who[1:] == who[0]).double().mean())

    def change(pictures: Tensor) -> float:
        return float(torch.linalg.vector_norm(pictures[1:] - pictures[0], dim=1).mean())

    def light(pictures: Tensor) -> float:
        columns = pictures.reshape(-1, half, half)
        side = columns[:, :, : half // 2].mean((1, 2)) - columns[:, :, half // 2 :].mean((1, 2))
        mean = columns.mean((1, 2))
        return float(torch.maximum((side[1:] - side[0]).abs(), (mean[1:] - mean[0]).abs()).mean())

    found = []
    for picture in data.held[torch.randperm(len(data.held), generator=generator)[:count]]:
        with torch.no_grad():
            at = flow(denoiser, picture.unsqueeze(0), torch.linspace(0.02, _EDIT_NOISE, 12))[0]
        local = jacobian_subspace(lambda row: denoiser(row.unsqueeze(0), _EDIT_NOISE)[0], at, 1, generator=generator)
        top = local.input.basis[:, 0]
        random = torch.randn(len(top), dtype=top.dtype, generator=generator)
        random = random / torch.linalg.vector_norm(random)
        along, beside = (edited(denoiser, picture, v, [0.0, scale, -scale], _EDIT_NOISE) for v in (top, random))
        turned = torch.cat([along[:1], along[:1] + (along[1:] - along[0]).flip(1)])
        found.append([change(along), change(beside), kept(along), kept(turned), light(along)])
    along, beside, same, same_turned, lit = np.mean(found, 0).tolist()
    return {
        "change along the Jacobian direction": along,
        "change along a random direction": beside,
        "ratio": along / beside,
        "same person": same,
        "same person, the change with its pixels reversed": same_turned,
        "change of light": lit,
    }


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Theory on planted data, then real faces: denoising, clustering, the rank of a trained network, edits."""
    setting = QUICK if quick else Setting()
    progress("planted subspaces", 0.0)
    planted_table, success = transition(setting.draws, seed)
    gap = identity_gap(seed)
    progress("descent", 0.15)
    ratio, error, start = descent(seed, 20 if quick else 40)
    progress("faces", 0.25)
    data = faces(setting.people, seed)
    people, dim = len(np.unique(data.fit_labels)), min(setting.dim, data.fit.shape[1] // 4)
    models = face_models(data, people, dim, seed)
    progress("network", 0.5)
    network = trained_mlp(data.fit, width=512, epochs=setting.epochs, seed=seed)
    quality = face_denoising(data, models, network, people, seed)
    progress("clustering", 0.65)
    clusters, more = face_clusters(data, models, dim, range(seed, seed + (2 if quick else 5)))
    progress("rank of a trained network", 0.75)
    ranks, pixels = fashion_ranks(setting, seed)
    progress("edits", 0.9)
    moved = edits(data, models, setting.edits, seed)
    tables = [
        planted_table,
        Table.rounded(
            f"PSNR (dB) on {len(data.held)} held-out pictures by noise",
            ["denoiser", *(f"sigma {sigma:g}" for sigma in NOISE)],
            [[name, *row.values()] for name, row in quality.items()],
            2,
        ),
        clusters,
        Table(
            f"numerical rank (99 % of the norm) of the Jacobian of a trained network, {pixels} pixels, mean of 4",
            ["noise", "rank"],
            [list(row) for row in ranks.items()],
        ),
        Table.rounded("edits of held-out faces", ["quantity", "value"], moved.items()),
    ]
    ours, single, labelled = (quality[name] for name in ("mixture", "one Gaussian", "mixture from true labels"))
    gain = {name: row[0.4] - single[0.4] for name, row in quality.items()}
    low, *inside, high = ranks.values()
    found = "shape-interaction found"
    enough, too_few = ([value for arm, value in success.means(found).items() if arm[2] == rows] for rows in (1.5, 0.75))
    checks = [
        Check.at_least("subspaces are found from 1.5 d rows", "least share of draws", min(enough), 0.9, quick=True),
        Check.at_most("and not from 0.75 d rows", "largest share of draws", max(too_few), 0.1, quick=True),
        Check.at_most("denoising loss = objective of K-subspaces", "relative difference", gap, 1e-12, quick=True),
        Check.at_most("descent reaches the closed form", "loss over the true mixture's", ratio, 1.02, quick=True),
        Check.below("descent finds the subspaces", f"projector error (from {start:.2f})", error, 0.5, quick=True),
        Check.at_least("beside one Gaussian, noise 0.2", "PSNR difference (dB)", ours[0.2] - single[0.2], 0.5),
        Check.at_most("beside true labels, noise 0.2 and 0.4", "PSNR lost (dB)",
                      max(labelled[sigma] - ours[sigma] for sigma in NOISE[2:]), 0.4),
        Check.at_least("clusters of faces", "accuracy - that of random starts", more, 0.1),
        Check.at_most("rank of the network", "least rank over pixels", min(inside) / pixels, 0.25),
        Check.below("the rank is least inside", "over the smaller end", min(inside) / min(low, high), 1),
        Check.at_least("edits along the Jacobian", "change over random", moved["ratio"], 5),
        Check.at_least("edits keep the person", "share", moved["same person"], 0.8),
    ]  # fmt: skip
    metric = "PSNR (dB) on held-out faces at noise 0.4, mixture minus one Gaussian of as many directions"
    return Outcome(
        claim="training a low-rank diffusion model is subspace clustering: it works from about d rows a subspace on, "
        "and the directions it finds edit images",
        data=f"planted subspaces of R^{_AMBIENT}; {data.name}: {len(data.fit)} pictures of {people} people fit, "
        f"{len(data.held)} are held out; Fashion-MNIST of {pixels} pixels",
        model=f"mixture of {people} low-rank Gaussians of {dim} dimensions; a residual network of width 512",
        metric=metric,
        ours=gain["mixture"],
        baselines={name: value for name, value in gain.items() if name not in ("mixture", "one Gaussian")},
        main=Check.at_least("a mixture denoises better than one subspace", metric, gain["mixture"], 1.5),
        checks=checks,
        tables=tables,
        notes=[
            "At low noise one Gaussian with all directions denoises better than the mixture, and an exactly low-rank "
            "mixture worse than doing nothing: what the components miss is then larger than the noise.",
            "The number of samples that large networks need is not measured here: the law for U-Nets is the paper's.",
        ],
    )
