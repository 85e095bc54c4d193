"""Edit directions of a generator: its own, and those of orthogonal low-rank projections put in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.modules import evaluation
from subspan.datasets import is_available, is_installed, load, load_sentence_encoder, stdlib_docstrings
from subspan.edit import displacement_mixing, displacements, latent_directions, orthogonalize_projections, path_length
from subspan.geometry import Subspace
from subspan.geometry.grassmann import random_basis
from subspan.models import SentenceEncoder, replace
from subspan.nn import HouseholderProjector

from .materials import FeatureDistance, StyleAutoencoder
from .materials.style_generator import FactorNetwork, Pictures, factor_network, garments, sprites
from .protocol import Check, Outcome, Progress, Table
from .training import kept, one_cycle, shuffled, train
from .trials import Trials

LATENT, RANK, BATCH, BETA, STEP = 64, 10, 32, 1e-3, 0.1
BASE_STEPS, TUNED_STEPS, COLD_STEPS, SPRITE_STEPS = 1500, 150, 600, 1000
QUICK_STEPS = (20, 10, 10)
BASE_RATE, TUNED_RATE, EVERY = 3e-3, 5e-4, 10
N_TRAIN, N_CHECK, N_TEST = 10_000, 128, 500
TARGETS = "generator.first.*.style"
# A direction counts where a step as long as a latent's own deviation changes this share of what two pictures differ by.
PERCEPTIBLE = 0.05
EDITS = ("PIPL", "mean |cos|", "perceptible", "effect of a typical step")
TEXT_RANKS = (32, 64, 128, 256)
# Ways to find directions: of a plain layer, and of one with a projector.
OF_LAYERS = {"SeFa": "sefa", "canonical axes in SeFa's plane": "jacobian", "PCA of w": "pca", "random": "random"}
OF_PROJECTORS = {"columns of V": "householder", "canonical axes": "jacobian"}
UNTOUCHED, TUNED = "untouched", "tuned without projectors"
OURS, SMALL, COLD = (f"projector, k = {k}, {start}" for k, start in ((RANK, "warm"), (4, "warm"), (RANK, "cold")))
# Of each arm with projectors their rank, and whether it starts cold; of all arms the ways to find directions.
PROJECTED = {OURS: (RANK, False), SMALL: (4, False), COLD: (RANK, True)}
WAYS = {UNTOUCHED: OF_LAYERS, TUNED: {"SeFa": "sefa"}, OURS: OF_PROJECTORS, SMALL: OF_PROJECTORS,
        COLD: {"columns of V": "householder"}}  # fmt: skip


def tuned(
    model: StyleAutoencoder, images: Tensor, distance: FeatureDistance, steps: int, seed: int, **options: Any
) -> StyleAutoencoder:
    """Adam on all weights with the unchanged loss."""
    batches = shuffled(images, batch_size=BATCH, seed=seed)
    torch.manual_seed(seed + 1000)
    options = {"learning_rate": TUNED_RATE, "betas": (0.9, 0.99), "clip": 1.0, **options}
    return train(
        model, lambda net, batch: net.loss(batch[0], distance, beta=BETA), batches, epochs=None, steps=steps, **options
    )


def base_model(data: Pictures, distance: FeatureDistance, steps: int, seed: int) -> StyleAutoencoder:
    """The generator that everything starts from; kept in the cache."""
    torch.manual_seed(seed)
    model = StyleAutoencoder(data.train.shape[1], LATENT)
    images = data.train[N_CHECK:]
    key = {"start": model, "images": images, "steps": steps, "seed": seed, "rate": BASE_RATE, "beta": BETA}
    cycle: Any = {"learning_rate": BASE_RATE, "schedule": one_cycle(0.1)}
    key |= {"distance": distance.name}
    made = kept(model, "style-generators", key, lambda: tuned(model, images, distance, steps, seed, **cycle))
    return made.requires_grad_(True)


def projected(base: StyleAutoencoder, rank: int, *, cold: bool, seed: int) -> StyleAutoencoder:
    """A copy whose upsampling convolutions are modulated through projectors, warm started or with random frames."""
    model = copy.deepcopy(base)
    orthogonalize_projections(model, TARGETS, rank)
    if cold:
        generator = torch.Generator().manual_seed(seed)
        for part in model.modules():
            if isinstance(part, HouseholderProjector):
                for frame in (part.u, part.v):
                    frame.frame = random_basis(*frame.frame.shape, generator=generator, dtype=torch.float32)
    return model


@torch.no_grad()
def error(model: StyleAutoencoder, images: Tensor, distance: FeatureDistance) -> tuple[float, float]:
    """Mean feature distance and squared pixel error of pictures that went through the model."""
    made = torch.cat([model.generator(model.latents(part)) for part in images.split(100)])
    far = torch.cat([distance(a, b) for a, b in zip(made.split(100), images.split(100))])
    return float(far.mean()), float(F.mse_loss(made, images))


@dataclass
class Recovery:
    """Held-out feature distance in the course of training; ends it after `least` steps once it is back at `goal`."""

    model: StyleAutoencoder
    images: Tensor
    distance: FeatureDistance
    goal: float
    least: int
    steps: int | None = None

    def now(self) -> float:
        """The distance as it stands."""
        with evaluation(self.model):
            return error(self.model, self.images, self.distance)[0]

    def __call__(self, model: nn.Module, step: int) -> bool:
        """Whether to stop."""
        if step % EVERY:
            return False
        if self.steps is None and self.now() <= self.goal:
            self.steps = step
        return self.steps is not None and step >= self.least


def moved(model: StyleAutoencoder, w: Float[Tensor, "n l"]) -> Callable[[Tensor], Tensor]:
    """Latents (n, 3, l) of the three upsampling convolutions → pictures, all other layers being given w."""
    return lambda each: torch.cat([model.generator(a, b) for a, b in zip(w.split(100), each.split(100))])


@torch.no_grad()
def measure(
    model: StyleAutoencoder, images: Tensor, directions: Float[Tensor, "r l k"], distance: FeatureDistance, seed: int
) -> dict[str, float]:
    """PIPL, mean |cos| of displacements, share of perceptible directions, and mean effect of a typical step."""
    w = model.latents(images)
    random = torch.Generator().manual_seed(seed)
    stacked = w[:, None].expand(-1, 3, -1)
    pipl = path_length(moved(model, w), stacked, directions, distance=distance, eps=STEP, random=random)
    spread = deviation(w)
    between = float(distance(images, images.roll(1, 0)).mean())
    few = w[: max(8, len(w) // 8)]
    start = model.generator(few)
    mixing, effects = [], []
    for index in range(len(directions)):
        edit = partial(edited, model, few, index)
        mixing.append(displacement_mixing(displacements(edit, few, directions[index], eps=STEP)))
        effects += [float(distance(start, edit(few + spread * v)).mean()) / between for v in directions[index].mT]
    share = np.mean([value > PERCEPTIBLE for value in effects])
    return dict(zip(EDITS, map(float, (pipl, np.mean(mixing), share, np.mean(effects)))))


def edited(model: StyleAutoencoder, w: Tensor, index: int, x: Float[Tensor, "n l"]) -> Float[Tensor, "n c h w"]:
    """Pictures of w with x as the latent of one upsampling convolution."""
    return model.generator(w, torch.stack([x if place == index else w for place in range(3)], 1))


def deviation(w: Float[Tensor, "n l"]) -> float:
    """Root mean square distance of latents from their mean: the length of a typical step."""
    return float((w - w.mean(0)).square().sum(1).mean().sqrt())


def styles(model: StyleAutoencoder) -> list[nn.Module]:
    """The layers whose directions are edited."""
    return [part.style for part in model.generator.first]  # pyright: ignore[reportReturnType]


def found_directions(
    model: StyleAutoencoder, images: Tensor, method: str, seed: int, rank: int = RANK
) -> Float[Tensor, "r l k"]:
    """Directions of the three layers by "sefa", "householder", "jacobian", "pca" of w, or "random".

    "jacobian" turns the axes inside of the layer's plane, which is SeFa's for a layer without projector.
    """
    with torch.no_grad():
        w = model.latents(images)
    made = []
    for index, layer in enumerate(styles(model)):
        if method == "pca":
            basis = Subspace.fit(w.double(), rank=rank).basis
        elif method == "random":
            basis = random_basis(w.shape[1], rank, generator=torch.Generator().manual_seed(seed + index))
        elif method == "jacobian":
            few = w[:16]
            # Of a plain layer: the same choice of axes, inside of the plane of SeFa.
            layer = layer if isinstance(layer, HouseholderProjector) else HouseholderProjector.from_linear(layer, rank)
            effect = partial(edited, model, few, index)
            basis = latent_directions(layer, rank, method="jacobian", effect=effect, latents=few).basis
        else:
            basis = latent_directions(layer, rank, method=method).basis
        made.append(basis.to(w.dtype))
    return torch.stack(made)


@torch.no_grad()
def purity(
    model: StyleAutoencoder, images: Tensor, directions: Float[Tensor, "r l k"], network: FactorNetwork
) -> float:
    """Mean over directions of the largest factor's share in what a typical step changes of all predictions.

    Change of a factor: total variation between its predicted distributions, a mean over pictures and both signs.
    """
    w = model.latents(images)
    few, spread = w[: max(8, len(w) // 8)], deviation(w)
    before = [z.softmax(1) for z in network(model.generator(few))]
    shares = []
    for index in range(len(directions)):
        for v in directions[index].mT:
            change = torch.zeros(len(network.sizes))
            for sign in (-1, 1):
                after = network(edited(model, few, index, few + sign * spread * v))
                change += torch.stack([(z.softmax(1) - p).abs().sum(1).mean() for z, p in zip(after, before)])
            shares.append(float(change.max() / change.sum().clamp_min(1e-12)))
    return float(np.mean(shares))


def truncated(layer: Any, rank: int) -> nn.Linear:
    """A linear map cut to its leading singular directions."""
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    made = copy.deepcopy(layer)
    with torch.no_grad():
        made.weight.copy_(u[:, :rank] * s[:rank] @ vh[:rank])
    return made


def sentence_table(count: int, ranks: tuple[int, ...]) -> Table:
    """Cosine of MiniLM's sentence vectors, before and after the 384 → 384 maps of layer 3 are replaced at a rank."""
    if is_available("stsb"):
        texts = [record["sentence1"] for record in load("stsb")["test"]]
    else:
        texts = [row.text for row in stdlib_docstrings()]
    texts = list(dict.fromkeys(texts))[:count]
    model, tokenizer = load_sentence_encoder()
    encoder = SentenceEncoder(model, tokenizer, max_length=64)
    before = encoder.encode(texts)
    names = [n for n, part in model.named_modules() if isinstance(part, nn.Linear) and ".layer.3.attention" in n]

    def cosine_with(make: Callable[..., nn.Module], rank: int) -> float:
        surgery = replace(model, dict.fromkeys(names, lambda layer: make(layer, rank)))
        after = encoder.encode(texts)
        surgery.undo()
        return float((before * after).sum(1).mean())

    ways = {"projector, equal gains": HouseholderProjector.from_linear, "truncated SVD": truncated}
    title = "MiniLM, the four 384 → 384 maps of layer 3 at rank k: cosine with the sentence vectors before"
    rows = ([rank, *(cosine_with(make, rank) for make in ways.values())] for rank in ranks)
    return Table.rounded(title, ["k", *ways], rows)


def factor_table(distance: FeatureDistance, seed: int) -> Table:
    """Purity of directions on sprites: untouched generator, and one tuned with projectors."""
    data = sprites(N_TEST)
    network, right = factor_network(data, 3, seed)
    base = base_model(data, distance, SPRITE_STEPS, seed)
    ours = tuned(projected(base, RANK, cold=False, seed=seed), data.train[N_CHECK:], distance, TUNED_STEPS, seed)
    rows = []
    for generator, model, methods in (("untouched", base, OF_LAYERS), (f"projector, k = {RANK}", ours, OF_PROJECTORS)):
        for name, method in methods.items():
            found = found_directions(model, data.test, method, seed)
            rows.append([generator, name, round(purity(model, data.test, found, network), 3)])
    far = {name: error(model, data.test, distance)[0] for name, model in (("untouched", base), ("ours", ours))}
    rows.append(["accuracy of the factor network", "", round(right, 3)])
    rows += [["feature distance of reconstructions", name, round(value, 4)] for name, value in far.items()]
    title = "sprites: share of the most changed factor, a mean over directions"
    return Table(title, ["generator", "directions", "value"], rows)


class Study:
    """The untouched generator and its copies, tuned and turned into facts arm by arm."""

    def __init__(self, data: Pictures, distance: FeatureDistance, *, quick: bool, seed: int) -> None:
        self.images, self.check = data.train[N_CHECK:], data.train[:N_CHECK]
        self.test = data.test[: 40 if quick else N_TEST]
        self.distance, self.steps = distance, QUICK_STEPS if quick else (BASE_STEPS, TUNED_STEPS, COLD_STEPS)
        base = base_model(data, distance, self.steps[0], seed)
        self.models = {UNTOUCHED: base, TUNED: copy.deepcopy(base)}
        self.models |= {arm: projected(base, k, cold=cold, seed=seed) for arm, (k, cold) in PROJECTED.items()}
        self.goal = 1.05 * error(base, self.check, distance)[0]

    def tune(self, arm: str, seed: int) -> dict[str, float]:
        """Errors before and after all but the untouched are tuned, PPL, and the steps until it is back, if it is."""
        model, steps = self.models[arm], {}
        before = error(model, self.test, self.distance)[0]
        if arm != UNTOUCHED:
            least, most = self.steps[1:]
            watch = Recovery(model, self.check, self.distance, self.goal, least)
            watch.steps = 0 if watch.now() <= self.goal else None
            tuned(model, self.images, self.distance, most if arm == COLD else least, seed, after_step=watch)
            steps = {} if watch.steps is None else {"steps": watch.steps}
        far, squared = error(model, self.test, self.distance)
        random: Any = {"random": torch.Generator().manual_seed(seed)}
        with torch.no_grad():
            ppl = path_length(model.generator, model.latents(self.test), distance=self.distance, eps=STEP, **random)
        return {"before tuning": before, "after": far, "squared error": squared, "PPL": ppl, **steps}

    def edit(self, arm: tuple[str, str], seed: int) -> dict[str, float]:
        """What the directions of one generator do that are found in one way."""
        model, rank = self.models[arm[0]], PROJECTED.get(arm[0], (RANK, False))[0]
        found = found_directions(model, self.test, WAYS[arm[0]][arm[1]], seed, rank)
        return measure(model, self.test, found, self.distance, seed)


def checks(tuning: Trials[str], edits: Trials[tuple[str, str]], most: int) -> list[Check]:
    """What directions mix, and what tuning costs in fidelity and in steps, `most` where it never came back."""
    mixing = edits.means(EDITS[1])
    ours, canonical = mixing[OURS, "columns of V"], mixing[OURS, "canonical axes"]
    sefa, turned = mixing[UNTOUCHED, "SeFa"], mixing[UNTOUCHED, "canonical axes in SeFa's plane"]
    warm, cold = (max(1, *(tuning.values(arm, "steps") or [most])) for arm in (OURS, COLD))
    fidelity = tuning.mean(OURS, "after") / tuning.mean(UNTOUCHED, "after")
    apart, axes = "mean |cos| of displacements, ours less SeFa's", "mean |cos|, canonical "
    plane = f"{axes}axes of ours less those of the untouched"
    return [
        Check.below("directions mix less", apart, ours - sefa, 0),
        Check.at_most("fidelity is kept", "feature distance of reconstructions, tuned over untouched", fidelity, 1.05),
        Check.at_most("a warm start is sooner back", "steps over those of the cold start", warm / cold, 1 / 3),
        Check.below("canonical axes mix less", f"{axes}less SeFa's", canonical - sefa, 0, required=False),
        Check.below("and less than in SeFa's plane", plane, canonical - turned, 0, required=False),
    ]


def protocol(*, quick: bool, seed: int, progress: Progress) -> Outcome:
    """Train a generator, put projectors into it warm and cold, and measure what each method's directions do."""
    progress("data", 0.0)
    data, distance = garments(N_TRAIN, N_TEST), FeatureDistance()
    progress("generator", 0.02)
    study = Study(data, distance, quick=quick, seed=seed)
    steps, least, most = study.steps
    tuning = Trials(WAYS, [seed], study.tune, progress=progress, span=(0.43, 0.75))
    ways = [(arm, way) for arm, ways in WAYS.items() for way in ways]
    edits = Trials(ways, [seed], study.edit, progress=progress, span=(0.75, 0.8))
    back = {arm: (tuning.values(arm, "steps") or ["not reached"])[0] for arm in tuning.arms if arm != UNTOUCHED}
    tables = [
        tuning.table(
            "generators: feature distance and squared error of held-out reconstructions, and steps until the distance "
            "is within 5 % of the untouched one's",
            "generator",
            {**{fact: fact for fact in ("before tuning", "after", "squared error", "PPL")}, "steps": back},
            digits=4,
        ),
        edits.table(
            "directions, 10 (or 4) in each of three layers",
            ["generator", "directions"],
            EDITS,
            digits=4,
        ),
    ]
    if is_available("lpc_sprites") and not quick:
        progress("sprites", 0.8)
        tables.append(factor_table(distance, seed))
    if is_installed("minilm"):
        progress("sentences", 0.95)
        tables.append(sentence_table(*((16, TEXT_RANKS[:1]) if quick else (128, TEXT_RANKS))))
    pipl = edits.means("PIPL")
    ours, sefa = pipl[OURS, "columns of V"], pipl[UNTOUCHED, "SeFa"]
    return Outcome(
        claim="Projections U S V' with orthonormal factors and k equal gains, put into a trained generator and tuned "
        "for about 1 % of its training, give k directions that change more of one attribute each, at no loss of "
        "fidelity.",
        data=f"{data.name} at 32 pixels: {len(study.images)} training and {len(study.test)} test pictures",
        model=f"style-modulated autoencoder (w of {LATENT}, 4 resolutions), {steps} steps of {BATCH}; then "
        f"{least} steps of all weights ({most} at most from a cold start); distance: {distance.name}",
        metric=f"PIPL of the projector's directions, k = {RANK}",
        ours=ours,
        baselines={
            "SeFa, untouched": sefa,
            **{way: pipl[UNTOUCHED, way] for way in ("PCA of w", "random")},
            "projector, k = 4": pipl[SMALL, "columns of V"],
        },
        main=Check.at_most("steps are smoother than SeFa's", "PIPL over SeFa's", ours / sefa, 0.9),
        checks=checks(tuning, edits, most),
        tables=tables,
        notes=[
            "Directions of one layer move that layer's latent alone. A typical step is as long as the latents' "
            "deviation; its effect is the feature distance that it makes over that of two pictures; above 5 % it "
            "counts as perceptible.",
            "A small PIPL is no merit by itself: random directions have one because they change little.",
            "Neither the Hessian penalty nor the orthogonal Jacobian regulariser was run.",
        ],
    )
