"""Training against the fixed simplex, task after task and model after model (Biondi et al., 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from subspan.base.modules import evaluation, release
from subspan.nn import CompatibleCE, HOCLoss, SimplexClassifier

from .stationary_simplex import BalancedBatches, Rehearsal

if TYPE_CHECKING:
    from subspan.nn import Objective

_SMALLEST_RATE = 1e-5


class StationaryModule(nn.Module):
    """A backbone and a `SimplexClassifier`, trained one task at a time; embeddings of all times can be compared.

    A task: `start_task`, then `Trainer.fit(module.objective(), module.loader(data, labels))` (extra: train), then
    `end_task(data, labels)`.

    Parameters
    ----------
    backbone
        Items → features (n, head.in_features).
    head
        The fixed classifier.
    lam
        Share of cross entropy beside the HOC loss; 1: cross entropy alone. More than the published 0.1 where classes of
        later tasks are not learnt.
    mu
        Inverse temperature of the HOC loss.
    memory
        Items kept of every class.
    batch_size
        Half of it is memory.
    random_state
        Of the memory and the batches.

    References
    ----------
    Biondi et al. (2024), arXiv 2405.02581.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import SimplexClassifier, StationaryModule
    >>> module = StationaryModule(torch.nn.Linear(4, 9), SimplexClassifier(3, preallocated=10))
    >>> unit = module(torch.randn(5, 4))
    >>> tuple(unit.shape), torch.allclose(unit.norm(dim=1), torch.ones(5))
    ((5, 9), True)
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: SimplexClassifier,
        *,
        lam: float = 0.1,
        mu: float = 10.0,
        memory: int = 20,
        batch_size: int = 128,
        random_state: int = 0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.teacher: nn.ModuleDict | None = None
        self.loss = CompatibleCE(lam, hoc=HOCLoss(mu))
        self.rehearsal = Rehearsal(memory, random_state=random_state)
        self.batch_size = batch_size
        self.random_state = random_state
        self.tasks = 0

    def start_task(
        self, num_classes: int, replace_with: nn.Module | tuple[nn.Module, SimplexClassifier] | None = None
    ) -> None:
        """Begin a task after which the labels are 0 … num_classes - 1.

        replace_with: a backbone trained elsewhere against the same vertices, with its head where its features are not
        embeddings yet; any architecture and width; trained too, but for the parts of it that are frozen where others
        are not. The teacher of the HOC loss is the model that the task starts from, the replacement where there is one;
        a first task without one starts untrained, has no teacher, and is trained by cross entropy alone.
        Raises ValueError for a head on another simplex.
        """
        if replace_with is not None:
            backbone, head = replace_with if isinstance(replace_with, tuple) else (replace_with, None)
            self.backbone = release(copy.deepcopy(backbone))
            if head is not None:
                if head.preallocated != self.head.preallocated:
                    raise ValueError(
                        f"replace_with: its head has {head.preallocated} vertices, the interface "
                        f"{self.head.preallocated}"
                    )
                self.head.projection = copy.deepcopy(head.projection).requires_grad_(True)
                self.head.in_features = head.in_features
        self.head.extend(num_classes)
        if self.tasks or replace_with is not None:
            self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(self.backbone), "head": copy.deepcopy(self.head)})
            self.teacher.eval().requires_grad_(False)
        self.tasks += 1

    def loader(self, data: Dataset[Any], labels: Any, **options: Any) -> DataLoader[Any]:
        """Batches (x, label) for a trainer, half of `data`, half of the memory; labels (n,): those of `data`."""
        self.head.class_index(torch.as_tensor(labels))
        sampler = BalancedBatches(len(labels), len(self.rehearsal), self.batch_size, random_state=self.random_state)
        return DataLoader(self.rehearsal.joined(data), batch_sampler=sampler, **options)

    def end_task(self, data: Dataset[Any], labels: Any) -> None:
        """Put items of the task into the memory."""
        self.rehearsal.remember(data, labels)

    def train(self, mode: bool = True) -> StationaryModule:
        """Training mode; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def embed(self, x: Any) -> Float[Tensor, "n e"]:
        """Embeddings of a batch, not normalised."""
        return self.head.embed(self.backbone(x))

    def forward(self, x: Any) -> Float[Tensor, "n e"]:
        """Unit embeddings of a batch, for galleries and queries, always as in evaluation mode."""
        with evaluation(self):
            return F.normalize(self.embed(x), dim=-1)

    def training_loss(self, batch: Sequence[Any]) -> Float[Tensor, ""]:
        """The loss of a batch (x, labels)."""
        x, labels = batch
        z = self.embed(x)
        vertices: Int[Tensor, " n"] = self.head.class_index(labels)
        old = None
        if self.loss.lam < 1 and self.teacher is not None:
            with torch.no_grad():
                head: Any = self.teacher["head"]
                old = head.embed(self.teacher["backbone"](x))
        return self.loss(self.head.logits(z), vertices, z, old)

    def objective(self, *, learning_rate: float = 1e-3, momentum: float = 0.9, weight_decay: float = 5e-4) -> Objective:
        """Of one task, for a Trainer (extra: train): SGD, no decay of vectors, a cosine fall of the rate to 1e-5."""
        from subspan.nn import Objective

        return Objective(
            self,
            StationaryModule.training_loss,
            optimizer="sgd",
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            decay_vectors=False,
            schedule="cosine",
            final_rate=_SMALLEST_RATE / learning_rate,
        )
