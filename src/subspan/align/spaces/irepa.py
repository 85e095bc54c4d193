"""iREPA: a network's tokens pulled towards a frozen encoder's, keeping their spatial structure (Singh et al., 2026)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from subspan.base.modules import evaluation
from subspan.measures import spatial_structure
from subspan.measures.spatial import grid_shape
from subspan.models import Capture, FeatureGrid
from subspan.models.capture import to_device_of
from subspan.models.layers import first_tensor
from subspan.nn import PatchProjector, SpatialNorm, cosine_matching_loss, resize_tokens
from subspan.nn.spatial import Interpolation

Teacher = Callable[[Any], Any]
Grid = tuple[int, int]


class RepresentationAlignment(nn.Module):
    """The loss -mean cos(projector(h), norm(x)) between a student's inner tokens h and a frozen teacher's x.

    1. x = teacher(clean images), resized to the student's grid; x̃ = norm(x), without gradient.
    2. h = output of `layer` in the student's own forward pass (on noised images), taken by a hook.
    3. `loss(images)` = weight · mean over the teachers of -mean cos(projector(h), x̃).

    The hook is taken off by `remove()`, or at the end of a with-block.

    Parameters
    ----------
    student
        Any module, also compiled (before its first call) or wrapped in DistributedDataParallel; its parameters are not
        those of this module, the projector's are.
    layer
        As in `subspan.models.layer_names`, one layer.
    teacher
        Images → tokens (b, t, d), a map (b, d, h, w), or a `FeatureGrid`; None where `loss` is given cached features;
        or a list of teachers. A teacher that is a module runs in evaluation mode and is neither trained nor saved.
    projector
        `PatchProjector`, or any module of tokens; a list of them for a list of teachers.
    norm
        "spatial" or `SpatialNorm()` (iREPA), another module, or None (REPA).
    weight
        A number, or a function of the step.
    tokens
        How h and x become tokens (b, t, d): "infer" takes (b, t, d), also where the student has tokens first, and
        flattens (b, d, h, w); or a function of the layer's output, for h alone.
    hw, teacher_hw
        (rows, columns) of the token grids; None = square.
    drop_tokens, teacher_drop_tokens
        First tokens that are left out by "infer".
    resize
        How teacher tokens of another grid are brought to the student's: "bicubic", "bilinear", "area", or None = an
        error.

    Raises
    ------
    ValueError
        For a layer that is not there, states that are no tokens, grids or widths that do not fit.

    References
    ----------
    Singh et al. (2026), arXiv 2512.10794; with MLP projectors and norm=None: Yu et al. (2024), REPA.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import RepresentationAlignment
    >>> from subspan.nn import PatchProjector
    >>> student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(3, d, 4, stride=4)) for d in (8, 5))
    >>> images = torch.rand(2, 3, 16, 16)
    >>> with RepresentationAlignment(student, "0", teacher, PatchProjector(8, 5)) as alignment:
    ...     states = student(images + 0.1 * torch.randn(2, 3, 16, 16))
    ...     loss = alignment.loss(images)
    >>> loss.requires_grad, bool(loss.abs() <= 0.5)
    (True, True)
    """

    def __init__(
        self,
        student: nn.Module,
        layer: str | int,
        teacher: Teacher | Sequence[Teacher] | None,
        projector: nn.Module | Sequence[nn.Module],
        norm: nn.Module | str | None = "spatial",
        *,
        weight: float | Callable[[int], float] = 0.5,
        tokens: str | Callable[[Any], Tensor] = "infer",
        hw: Grid | None = None,
        teacher_hw: Grid | None = None,
        drop_tokens: int = 0,
        teacher_drop_tokens: int = 0,
        resize: Interpolation | None = "bicubic",
    ) -> None:
        super().__init__()
        if isinstance(norm, str) and norm != "spatial":
            raise ValueError(f"norm: 'spatial', a module or None, got {norm!r}")
        if isinstance(tokens, str) and tokens != "infer":
            raise ValueError(f"tokens: 'infer' or a function of the layer's output, got {tokens!r}")
        if not callable(weight) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: finite and not negative, got {weight}")
        if min(drop_tokens, teacher_drop_tokens) < 0:
            raise ValueError("drop_tokens, teacher_drop_tokens: counts of 0 or more")
        single = isinstance(projector, nn.Module) and not isinstance(projector, nn.ModuleList)
        given: Any = [projector] if single else projector
        projectors: list[nn.Module] = list(given)
        teachers = None if teacher is None else list(teacher) if isinstance(teacher, Sequence) else [teacher]
        if not projectors or (teachers is not None and len(teachers) != len(projectors)):
            raise ValueError(f"projector: one a teacher is needed, got {len(projectors)} for {len(teachers or [])}")
        self.projectors = nn.ModuleList(projectors)
        self.norm = SpatialNorm() if norm == "spatial" else norm
        self.weight = weight
        self.hw = hw
        self.teacher_hw = teacher_hw
        self.drop_tokens = drop_tokens
        self.teacher_drop_tokens = teacher_drop_tokens
        self.resize: Interpolation | None = resize
        self._as_tokens = tokens
        # In a tuple, so that neither becomes a part of this module: they have owners and checkpoints of their own.
        self._teachers = None if teachers is None else tuple(teachers)
        states = Capture(_unwrapped(student), layer)
        if len(states.names) != 1:
            raise ValueError(f"layer: one layer is needed, {layer!r} stands for {', '.join(states.names)}")
        self._states = states.__enter__()

    @property
    def layer(self) -> str:
        """Dotted name of the tapped layer."""
        return self._states.names[0]

    def __enter__(self) -> RepresentationAlignment:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hook off the student, and forget its last states."""
        self._states.remove()
        self._states.clear()

    def student_tokens(self) -> tuple[Float[Tensor, "b t d"], Grid]:
        """Tokens of the student's latest forward pass, with gradient, and their grid; each pass is handed out once."""
        if self.layer not in self._states:
            raise ValueError(
                f"layer: {self.layer!r} has no new states; call the student before each loss, within the with-block "
                "and, where it is compiled, make this object before the student's first call"
            )
        if callable(self._as_tokens):
            states = self._as_tokens(self._states[self.layer])
            self._states.clear()
            return _on_grid(states, f"tokens (layer {self.layer!r})", self.hw, 0)
        try:
            states = self._states.by_sample(self.layer)
        except ValueError as error:
            raise ValueError(f"tokens: a function of the layer's output is needed here; {error}") from error
        self._states.clear()
        return _on_grid(states, f"layer {self.layer!r}", self.hw, self.drop_tokens)

    @torch.no_grad()
    def targets(self, images: Any, grid: Grid) -> list[Float[Tensor, "b t d"]]:
        """Every teacher's tokens on the student's grid, normalised."""
        found = []
        for index, tokens in enumerate(self._teacher_outputs(images)):
            x, own = _on_grid(tokens, f"teacher {index}", self.teacher_hw, self.teacher_drop_tokens)
            if own != grid:
                if self.resize is None:
                    raise ValueError(f"resize: None, but teacher {index} has a {own} grid and the student {grid}")
                x = resize_tokens(x, own, grid, mode=self.resize)
            found.append(x if self.norm is None else self.norm(x))
        return found

    def forward(self, images: Any) -> Float[Tensor, ""]:
        """The alignment without its weight, in [-1, 1]; -1 where every token points where its teacher's does."""
        tokens, grid = self.student_tokens()
        losses = []
        for index, (projector, x) in enumerate(zip(self.projectors, self.targets(images, grid), strict=True)):
            projected = self._projected(projector, tokens, grid)
            if projected.shape != x.shape:
                raise ValueError(
                    f"projector: teacher {index} gives {tuple(x.shape)}, the projected student {tuple(projected.shape)}"
                )
            losses.append(cosine_matching_loss(projected, x.to(projected.device)))
        return torch.stack(losses).mean()

    def loss(self, images: Any, step: int | None = None) -> Float[Tensor, ""]:
        """Weighted loss of the student's latest forward pass, to be added to its own.

        images: the clean ones, as the teachers take them; without a teacher their features, a list of several. step:
        needed where the weight is a schedule; where that gives 0 no teacher is run.
        """
        weight = self.weight_at(step)
        if weight == 0:
            tokens, grid = self.student_tokens()
            # Every parameter keeps a (zero) gradient, which DistributedDataParallel waits for.
            return torch.stack([0 * self._projected(each, tokens, grid).sum() for each in self.projectors]).sum()
        return weight * self(images)

    def weight_at(self, step: int | None = None) -> float:
        """The weight in force at a step."""
        if not callable(self.weight):
            return self.weight
        if step is None:
            raise ValueError("step: needed, because the weight is a schedule")
        weight = float(self.weight(step))
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight: finite and not negative, got {weight} at step {step}")
        return weight

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"layer={self.layer!r}, weight={self.weight}, resize={self.resize!r}"

    def _projected(self, projector: nn.Module, tokens: Tensor, grid: Grid) -> Tensor:
        parameter = next(projector.parameters(), None)
        if parameter is not None:
            tokens = tokens.to(device=parameter.device, dtype=parameter.dtype)
        return projector(tokens, grid) if isinstance(projector, PatchProjector) else projector(tokens)

    def _teacher_outputs(self, images: Any) -> Iterator[Any]:
        if self._teachers is None:
            given = [images] if isinstance(images, Tensor) else list(images)
            if len(given) != len(self.projectors):
                raise ValueError(f"images: cached features of {len(self.projectors)} teachers, got {len(given)}")
            yield from given
            return
        for teacher in self._teachers:
            if isinstance(teacher, nn.Module):
                with evaluation(teacher):
                    yield teacher(to_device_of(teacher, images))
            else:
                output = teacher(images)
                yield output.movedim(-1, 1) if isinstance(teacher, FeatureGrid) else output


def spatial_structure_of(
    model: nn.Module,
    images: Iterable[Any],
    layer: str | int,
    *,
    norm: SpatialNorm | None = None,
    batch_size: int = 16,
    drop_tokens: int | None = None,
    preprocessing: Any = None,
    **options: Any,
) -> dict[str, Float[Tensor, " n"]]:
    """`spatial_structure` of one layer of a vision network (timm, transformers, torchvision, own).

    Parameters
    ----------
    model
        The network.
    images, preprocessing, drop_tokens
        As in `subspan.models.FeatureGrid`; drop_tokens are CLS and registers, None infers their number.
    layer
        Index or name.
    norm
        Applied to the tokens first.
    batch_size
        Images a forward pass.
    **options
        Of `spatial_structure`: metrics, masks (n, h, w), near, far, dmax.

    Returns
    -------
    dict of metric → Tensor (n,).

    Raises
    ------
    ValueError
        For no image, or another number of masks.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import spatial_structure_of
    >>> from subspan.models import ImagePreprocessing
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 2, stride=2))
    >>> images = (torch.rand(4, 3, 16, 16) * 255).to(torch.uint8)
    >>> prepare = ImagePreprocessing(size=16, resize="squash")
    >>> tuple(spatial_structure_of(network, images, "0", preprocessing=prepare)["lds"].shape)
    (4,)
    """
    grid = FeatureGrid(model, layer, preprocessing=preprocessing, drop_tokens=drop_tokens)
    masks = options.pop("masks", None)
    found: dict[str, list[Tensor]] = {}
    start = 0
    for features in grid.iterate(images, batch_size):
        h, w = features.shape[1:3]
        if norm is not None:
            features = norm(features.flatten(1, 2)).unflatten(1, (h, w))
        part = None if masks is None else masks[start : start + len(features)]
        start += len(features)
        for name, values in spatial_structure(features, masks=part, **options).items():
            found.setdefault(name, []).append(values.cpu())
    if not found:
        raise ValueError("images: at least one image is needed, got none")
    if masks is not None and len(masks) != start:
        raise ValueError(f"masks: one an image is needed, got {len(masks)} for {start}")
    return {name: torch.cat(values) for name, values in found.items()}


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside torch.compile and data-parallel wrappers, whose layers have the names that the user knows."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(module, DistributedDataParallel | DataParallel):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _on_grid(states: Any, name: str, hw: Grid | None, drop: int) -> tuple[Float[Tensor, "b t d"], Grid]:
    """Tokens (b, t, d) without the first `drop`, or a map (b, d, h, w), as tokens and their grid."""
    states = first_tensor(states)
    if not states.is_floating_point() or states.ndim not in (3, 4):
        raise ValueError(f"{name}: tokens (b, t, d) or a map (b, d, h, w) are needed, got {tuple(states.shape)}")
    if states.ndim == 4:
        return states.flatten(2).mT, (states.shape[2], states.shape[3])
    if states.shape[1] <= drop:
        raise ValueError(f"drop_tokens: {drop} of the {states.shape[1]} tokens of {name} leave none")
    try:
        grid = grid_shape(states.shape[1] - drop, hw)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return states[:, drop:], grid
