"""A world model that predicts its own latents: images and actions in, the next latents and a cost of goals out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.nn import MLP, ConvEncoder
from subspan.nn.flow_transformer import TransformerBlock

from .sub_jepa import SubspaceGaussianRegularizer

if TYPE_CHECKING:
    from subspan.nn import Objective


class ActionPredictor(nn.Module):
    """Latents (b, t, d) and embedded actions (b, t, d) → the latents one step later (b, t, d), by a causal transformer.

    Actions shift, scale and gate each token in every block, and at first change nothing (adaLN-zero).

    Parameters
    ----------
    width
        d, a multiple of the heads.
    history
        Most latents that are looked at.
    depth, heads, mlp_ratio
        Blocks; heads of each; hidden width of their networks over the width.

    Raises
    ------
    ValueError
        For a width that the heads do not divide, and for more latents than the history.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import ActionPredictor
    >>> ActionPredictor(16, history=3, depth=1, heads=2)(torch.randn(4, 3, 16), torch.randn(4, 3, 16)).shape
    torch.Size([4, 3, 16])
    """

    def __init__(
        self, width: int, *, history: int = 3, depth: int = 6, heads: int = 16, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: a multiple of the {heads} heads is needed, got {width}")
        self.history = history
        self.positions = nn.Parameter(torch.randn(history, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, mlp_ratio, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for block in self.blocks:
            assert isinstance(block.modulation, nn.Linear)
            nn.init.zeros_(block.modulation.weight)
            nn.init.zeros_(block.modulation.bias)

    def forward(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """The latent after each."""
        if z.shape[1] > self.history:
            raise ValueError(f"z: at most {self.history} latents in a row, got {z.shape[1]}")
        x = z + self.positions[: z.shape[1]]
        for block in self.blocks:
            x = block(x, actions)
        return self.norm(x)


class JEPAWorldModel(nn.Module):
    """Images and actions → latents and the latents that actions lead to, learnt together from pixels.

    No decoder, no second encoder and no stopped gradient: what keeps latents from collapsing is the regularizer alone.

    Parameters
    ----------
    encoder
        Images (n, c, h, w) → features (n, f).
    projector
        Features → latents (n, d). It should end without a norm over its own row: unit rows can never look normal.
    action_encoder
        Actions (…, a) → (…, d).
    predictor
        As `ActionPredictor`, with its `history`.
    prediction_projector
        What the predictor says → latents.
    regularizer
        Of latents (time, batch, d), samples along the second last axis: `SubspaceGaussianRegularizer`,
        `SlicedGaussianLoss`, or any other; None: nothing, for comparison.
    penalty
        Its weight; >= 0.

    Raises
    ------
    ValueError
        For a negative penalty, too few images for a step, and shapes of images and actions that do not agree.

    References
    ----------
    Zhao et al. (2026), Sub-JEPA, arXiv 2605.09241, on LeWorldModel, arXiv 2603.19312.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import JEPAWorldModel
    >>> model = JEPAWorldModel.of_images((3, 16, 16), action_dim=2, dim=16, heads=2, depth=1, width=4)
    >>> images, actions = torch.rand(8, 4, 3, 16, 16), torch.randn(8, 4, 2)
    >>> sorted(model.losses(images, actions))
    ['prediction', 'regularizer']
    >>> z = model.eval().encode(images[:, :1])
    >>> model.rollout(z, actions[:, :3]).shape
    torch.Size([8, 3, 16])
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        action_encoder: nn.Module,
        predictor: nn.Module,
        prediction_projector: nn.Module,
        *,
        regularizer: nn.Module | None = None,
        penalty: float = 0.09,
    ) -> None:
        super().__init__()
        if not penalty >= 0:
            raise ValueError(f"penalty: must be 0 or more, got {penalty}")
        self.encoder, self.projector = encoder, projector
        self.action_encoder, self.predictor = action_encoder, predictor
        self.prediction_projector = prediction_projector
        self.regularizer, self.penalty = regularizer, penalty

    @classmethod
    def of_images(
        cls,
        image_shape: tuple[int, int, int],
        action_dim: int,
        *,
        dim: int = 192,
        subspace_dim: int = 6,
        history: int = 3,
        depth: int = 6,
        heads: int = 16,
        hidden: int | None = None,
        width: int = 32,
        regularizer: nn.Module | None = None,
        penalty: float = 0.09,
    ) -> JEPAWorldModel:
        """A model with `ConvEncoder` and the published parts behind it.

        image_shape (c, h, w); action_dim: numbers of an action, or of a block of them; dim: of latents;
        subspace_dim: of the default regularizer; history, depth, heads: of the predictor; hidden: of the projectors,
        by default as published 2048 for 192 dimensions; width: of the first convolution.
        """
        hidden = max(4 * dim, 2048 * dim // 192) if hidden is None else hidden
        projector = MLP((dim, hidden, dim), norm="batch")
        return cls(
            ConvEncoder(image_shape, dim, width=width, block="plain"),
            projector,
            MLP((action_dim, 4 * dim, dim), activation="silu"),
            ActionPredictor(dim, history=history, depth=depth, heads=heads),
            copy.deepcopy(projector),
            regularizer=SubspaceGaussianRegularizer(dim=dim, subspace_dim=subspace_dim)
            if regularizer is None
            else regularizer,
            penalty=penalty,
        )

    @property
    def history(self) -> int:
        """Latents that a prediction looks at."""
        return int(self.predictor.history)  # pyright: ignore

    def encode(self, images: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d"]:
        """Latents of images."""
        return self.projector(self.encoder(images.flatten(0, 1))).unflatten(0, images.shape[:2])

    def predict(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b t a"]) -> Float[Tensor, "b t d"]:
        """The latent one step after each; actions that are NaN, as behind the end of an episode, count as 0."""
        return self.prediction_projector(self.predictor(z, self.action_encoder(actions.nan_to_num(0.0))))

    def losses(
        self, images: Float[Tensor, "b t c h w"], actions: Float[Tensor, "b t a"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Mean squared error of the next latents, and the weighted regularizer of all latents, a time step each."""
        if images.shape[1] < 2 or actions.shape[:2] != images.shape[:2]:
            raise ValueError(
                "images, actions: expected (b, t, …) of the same b and t, t at least 2, got "
                f"{tuple(images.shape)} and {tuple(actions.shape)}"
            )
        z = self.encode(images)
        steps = min(self.history, images.shape[1] - 1)
        predicted = self.predict(z[:, :steps], actions[:, :steps])
        found = {"prediction": F.mse_loss(predicted, z[:, 1 : steps + 1])}
        if self.regularizer is not None and self.penalty:
            found["regularizer"] = self.penalty * self.regularizer(z.transpose(0, 1))
        return found

    def objective(self, *, learning_rate: float = 5e-5, weight_decay: float = 1e-3, **options: Any) -> Objective:
        """For a Trainer (extra: train), batches (images, actions); the published rates, options of `Objective`."""
        from subspan.nn import Objective

        usual: dict[str, Any] = {"schedule": "cosine", "warmup": 0.1, **options}
        return Objective(
            self, lambda model, batch: model.losses(*batch), learning_rate=learning_rate, weight_decay=weight_decay,
            **usual,
        )  # fmt: skip

    def rollout(self, z: Float[Tensor, "b t d"], actions: Float[Tensor, "b n a"]) -> Float[Tensor, "b n d"]:
        """Latents that n actions lead to, from t latents of which the last is where the first action is taken.

        Actions before that are not known to the model, and count as 0.
        """
        taken = torch.cat([actions.new_zeros(len(z), z.shape[1] - 1, actions.shape[-1]), actions], 1)
        for now in range(z.shape[1], taken.shape[1] + 1):
            start = max(0, now - self.history)
            following = self.predict(z[:, start:], taken[:, start:now])[:, -1:]
            z = torch.cat([z, following], 1)
        return z[:, -actions.shape[1] :]

    def goal_cost(self, z: Float[Tensor, "*b d"], goal: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
        """Squared distance to the latent of a goal."""
        return (z - goal).square().sum(-1)


def straightness(z: Float[Tensor, "*b t d"]) -> Float[Tensor, "*b"]:
    """Mean cosine of successive steps of a path: 1 for a straight line, about 0 for steps that are unrelated.

    Parameters
    ----------
    z
        Paths (…, t, d) of at least three points.

    Returns
    -------
    Tensor (…,), in [-1, 1]; a step of length 0 counts as unrelated.

    Raises
    ------
    ValueError
        For fewer than three points.

    Examples
    --------
    >>> import torch
    >>> from subspan.dynamics import straightness
    >>> line = torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0])
    >>> round(float(straightness(line)), 4), float(straightness(torch.tensor([[0.0], [1.0], [0.0], [1.0]])))
    (1.0, -1.0)
    """
    if z.shape[-2] < 3:
        raise ValueError(f"z: at least three points are needed, got {z.shape[-2]}")
    steps = z.diff(dim=-2)
    return F.cosine_similarity(steps[..., 1:, :], steps[..., :-1, :], dim=-1).mean(-1)
