"""Adaptation cost of spectral steering: the batched closed form, a loop of it, autograd, and prompt tuning.

All rows are measured side by side in one run on the same views; what must agree is checked before it is timed.
Run: python benchmarks/sts.py [--classes 100] [--dim 512] [--images 200] [--views 64] [--prompts 3] [--json FILE]
"""

import torch
from torch.nn import functional as F

from record import Record, parser
from record import timed as best_of
from subspan.edit import ConfidentAverage, PrototypeShift, SpectralSteering, select_confident

SCALE = 30.0


def autograd_loop(steering: SpectralSteering, views: torch.Tensor) -> torch.Tensor:
    """One image after the other through autograd and torch.optim.AdamW, as the method is usually written."""
    answers = []
    for image in views:
        index, _ = select_confident(steering.logit_scale * image @ steering.prototypes.T, steering.keep)
        kept = image[index]
        coefficients = torch.zeros(steering.subspace.dim, dtype=image.dtype, requires_grad=True)
        optimizer = torch.optim.AdamW([coefficients], steering.learning_rate)
        for _ in range(steering.steps):
            moved = F.normalize(steering.prototypes + coefficients @ steering.basis.T, dim=-1)
            mean = (steering.logit_scale * kept @ moved.T).softmax(-1).mean(0)
            optimizer.zero_grad()
            (-torch.special.xlogy(mean, mean).sum()).backward()
            optimizer.step()
        with torch.no_grad():
            moved = F.normalize(steering.prototypes + coefficients @ steering.basis.T, dim=-1)
            answers.append((steering.logit_scale * kept @ moved.T).softmax(-1).mean(0))
    return torch.stack(answers)


def timed(run, images: int, repeats: int = 3) -> float:
    """Processor milliseconds an image."""
    return 1000 * best_of(run, repeats).processor / images


def prompt_tuning_row(classes: int, views: torch.Tensor) -> float | None:
    """Prompt tuning through MiniLM with invented class names; None where the weights are not installed."""
    from subspan.datasets import is_installed, load_sentence_encoder
    from subspan.models import SentenceEncoder
    from subspan.reproduce.materials import JointSpace
    from subspan.reproduce.sts import prompt_tuning

    if not is_installed("minilm"):
        return None
    encoder = SentenceEncoder(*load_sentence_encoder())
    head = torch.randn(384, views.shape[-1], generator=torch.Generator().manual_seed(0)) / 384**0.5
    space = JointSpace("random head", lambda x: x, lambda x: x @ head, SCALE)
    names = [f"thing number {number}" for number in range(classes)]
    return timed(lambda: prompt_tuning(space, encoder, names, views), len(views), repeats=1)


def main() -> None:
    arguments = parser(__doc__)
    for name, default in (("classes", 100), ("dim", 512), ("images", 200), ("views", 64), ("prompts", 3)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    options = arguments.parse_args()
    generator = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -1.5, options.dim)
    rows = torch.randn(options.classes, options.dim, generator=generator) * decay + 0.1
    prototypes = F.normalize(rows, dim=-1)
    truth = torch.randint(options.classes, (options.images,), generator=generator)
    noise = torch.randn(options.images, options.views, options.dim, generator=generator) * decay
    views = F.normalize(prototypes[truth][:, None] + noise, dim=-1)
    steering = SpectralSteering(prototypes, SCALE)
    exact = SpectralSteering(prototypes.double(), SCALE)
    few = views[:20]
    gap = float((exact(few.double()) - autograd_loop(exact, few.double())).abs().max())
    assert gap < 1e-6, gap
    moved = float((steering(few) - ConfidentAverage(prototypes, SCALE)(few)).abs().max())
    assert moved > 1e-3, f"the views are too easy to compare anything on: steering moves them by {moved}"
    sizes = f"{options.classes} classes, {options.dim} dimensions, {options.images} images of {options.views} views"
    record = Record("sts", f"{sizes}, k = {steering.subspace.dim}")
    results = {
        "closed form, one batch": timed(lambda: steering(views), options.images),
        "closed form, image by image": timed(lambda: [steering(image) for image in few], 20),
        "autograd, image by image": timed(lambda: autograd_loop(steering, few), 20),
        "shift in all dimensions, one batch": timed(lambda: PrototypeShift(prototypes, SCALE)(views), options.images),
        "shift per class, 20 images": timed(
            lambda: PrototypeShift(prototypes, SCALE, per_class=True)(few), 20, repeats=1
        ),
    }
    if options.prompts:
        tuned = prompt_tuning_row(options.classes, views[: options.prompts])
        if tuned is not None:
            results["prompt tuning through MiniLM"] = tuned
    best = results["closed form, one batch"]
    rows = [[name, each, each / best] for name, each in results.items()]
    record.table("Adaptation to one image", ["", "processor ms an image", "x the batched closed form"], rows)
    loop = results["autograd, image by image"] / best
    record.target("per-image autograd loop over the batched closed form, processor time", loop, least=1)
    record.target("largest difference of their probabilities, float64", gap, most=1e-6)
    record.save(options.json)


if __name__ == "__main__":
    main()
