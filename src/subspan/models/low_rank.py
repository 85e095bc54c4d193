"""Low-rank changes of linear layers that begin at the function as it is, trained, merged, or given away as LoRA."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base.files import temporary_folder
from subspan.geometry import Subspace

from .layers import is_conv1d, linear_weight
from .surgery import Surgery, replace
from .weight_files import write_weights


class LowRankChange(nn.Module):
    """A linear layer plus scale (B A - B₀ A₀) x, with A and B trained from A₀ and B₀, and the layer itself frozen.

    The base's weight is never touched, so that the function at the start is the base's to the last bit, in any
    precision, and what was learnt is a plain low-rank update of the weights that everybody has.

    Parameters
    ----------
    base
        A linear layer (torch's, or transformers' `Conv1D`).
    down, up
        A₀ (r, d_in) and B₀ (d_out, r); kept in float32 or wider.
    scale
        Of the update.
    dropout
        On the inputs of the update while training.

    Examples
    --------
    >>> import torch
    >>> from subspan.geometry import Subspace
    >>> from subspan.models import LowRankChange
    >>> base, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    >>> changed = LowRankChange.from_subspace(base, Subspace.random(4, 2, dtype=torch.float32))
    >>> bool((changed(x) == base(x)).all())
    True
    """

    start_down: Tensor
    start_up: Tensor

    def __init__(
        self,
        base: nn.Module,
        down: Float[Tensor, "r d_in"],
        up: Float[Tensor, "d_out r"],
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        weight, _ = linear_weight(base)
        if (up.shape[0], down.shape[1]) != weight.shape or up.shape[1] != down.shape[0]:
            found = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise ValueError(f"down, up: (r, {weight.shape[1]}) and ({weight.shape[0]}, r) are needed, got {found}")
        self.base = base
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.register_buffer("start_down", down.detach().to(weight.device, wide, copy=True))
        self.register_buffer("start_up", up.detach().to(weight.device, wide, copy=True))
        self.down, self.up = nn.Parameter(self.start_down.clone()), nn.Parameter(self.start_up.clone())
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    @classmethod
    def from_subspace(
        cls,
        base: nn.Module,
        subspace: Subspace | int,
        *,
        side: Literal["output", "input"] = "output",
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> LowRankChange:
        """Start in a subspace Q of the outputs, B₀ = Q and A₀ = Q'W, or of the inputs, A₀ = Q' and B₀ = W Q.

        An int takes the weight's own main singular vectors, B₀ = U √S and A₀ = √S V' (PiSSA; Meng et al., 2024).
        """
        weight = linear_weight(base)[0].detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if isinstance(subspace, int):
            if not 1 <= subspace <= min(weight.shape):
                raise ValueError(f"subspace: a rank between 1 and {min(weight.shape)}, got {subspace}")
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            root = s[:subspace].sqrt()
            down, up = root[:, None] * vh[:subspace], u[:, :subspace] * root
        else:
            wanted = weight.shape[0 if side == "output" else 1]
            if subspace.batch_shape or subspace.ambient_dim != wanted:
                raise ValueError(f"subspace: one of dimension {wanted} is needed, got {tuple(subspace.basis.shape)}")
            q = subspace.basis.to(weight)
            down, up = (q.mT @ weight, q) if side == "output" else (q.mT, weight @ q)
        return cls(base, down, up, scale=scale, dropout=dropout)

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def forward(self, x: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """The base's output, and the change."""
        y = self.base(x)
        rows = self.dropout(x).to(self.down.dtype)
        change = F.linear(F.linear(rows, self.down), self.up)
        change = change - F.linear(F.linear(rows, self.start_down), self.start_up)
        return y + (self.scale * change).to(y.dtype)

    def update(self) -> tuple[Float[Tensor, "q d_in"], Float[Tensor, "d_out q"]]:
        """The change of the weight as factors (2r, d_in) and (d_out, 2r); of r where the start is zero."""
        if not bool(self.start_up.any()) or not bool(self.start_down.any()):
            return self.down.detach(), self.scale * self.up.detach()
        down = torch.cat([self.down.detach(), self.start_down])
        return down, self.scale * torch.cat([self.up.detach(), -self.start_up], 1)

    def extra_repr(self) -> str:
        """Shown by print."""
        return f"rank={self.rank}, scale={self.scale:g}"


class LowRankEdit:
    """What `add_low_rank` did to a model: its layers, and the ways to end it.

    `undo()` puts the model back, `merge()` changes its own weights, `export(folder)` writes a plain LoRA adapter.

    Parameters
    ----------
    surgery
        The replacements.
    layers
        The `LowRankChange` of each changed layer, by name.
    trained
        The model's parameters that were trained before, which `undo` unfreezes.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import add_low_rank
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> edit = add_low_rank(model, {"0": 2})
    >>> edit.layers["0"].rank, edit.undo()[0]
    (2, Linear(in_features=6, out_features=4, bias=True))
    """

    def __init__(self, surgery: Surgery, layers: dict[str, LowRankChange], trained: list[nn.Parameter]) -> None:
        self.surgery, self.layers = surgery, layers
        self._trained = trained

    def undo(self) -> nn.Module:
        """The model as it was before, with what was trained then."""
        model = self.surgery.undo()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        return model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """The model with its own layers, whose weights are changed: computed in float32, rounded to the weight's type.

        A weight that another layer shares is changed here alone.
        """
        model = self.undo()
        for layer in self.layers.values():
            base: Any = layer.base
            down, up = layer.update()
            weight, _ = linear_weight(base)
            merged = (weight.to(down.dtype) + up @ down).to(weight.dtype)
            merged = merged.mT.contiguous() if is_conv1d(base) else merged
            base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        return model

    def export(
        self, folder: str | os.PathLike[str], *, base_model: str | None = None, task_type: str | None = None
    ) -> None:
        """Write the change to a new folder as a plain LoRA adapter, which peft loads onto the unchanged base model.

        The rank there is 2r where the start was not zero. base_model, task_type: for adapter_config.json ("CAUSAL_LM").
        Raises ValueError where the folder exists, or linear layers and transformers' `Conv1D` are both changed.
        """
        transposed = {is_conv1d(layer.base) for layer in self.layers.values()}
        if len(transposed) > 1:
            raise ValueError("export: an adapter is for linear layers or for Conv1D, not for both")
        target = Path(os.path.realpath(folder))
        if target.exists():
            raise ValueError(f"folder: {str(folder)!r} exists; give a new one")
        factors = {name: layer.update() for name, layer in self.layers.items()}
        ranks = {name: len(down) for name, (down, _) in factors.items()}
        rank = max(ranks.values())
        other = {name.replace(".", r"\."): own for name, own in ranks.items() if own != rank}
        config = {
            "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_model, "inference_mode": True,
            "r": rank, "lora_alpha": rank, "rank_pattern": other, "alpha_pattern": other, "lora_dropout": 0.0,
            "bias": "none", "target_modules": list(ranks), "fan_in_fan_out": transposed.pop(),
        }  # fmt: skip
        arrays = {}
        for name, (down, up) in factors.items():
            arrays[f"base_model.model.{name}.lora_A.weight"] = down
            arrays[f"base_model.model.{name}.lora_B.weight"] = up
        with temporary_folder(target, exclusive=True) as unfinished:
            made = unfinished / "made"
            write_weights(arrays, made, shard_bytes=1 << 62)
            (made / "model.safetensors").replace(made / "adapter_model.safetensors")
            (made / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            made.replace(target)


def add_low_rank(
    model: nn.Module,
    sites: Mapping[str, Subspace | int | tuple[Tensor, Tensor]],
    *,
    side: Literal["output", "input"] = "output",
    alpha: float | None = None,
    dropout: float = 0.0,
) -> LowRankEdit:
    """Put a `LowRankChange` over linear layers of a model, in place; everything else is frozen, its output is the same.

    Parameters
    ----------
    model
        Any torch module; changed in place.
    sites
        Name of a linear layer → the subspace to start in, or a rank (see `LowRankChange.from_subspace`), or the factors
        (r, d_in) and (d_out, r) to start from.
    side
        Whether subspaces are of outputs or of inputs.
    alpha
        The update is scaled by alpha / r; default r.
    dropout
        On the inputs of the updates while training.

    Returns
    -------
    LowRankEdit
        `layers` by name; `undo()`, `merge()`, `export(folder)`.

    Raises
    ------
    ValueError
        For a name that the model does not have, and for what is no linear layer.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import add_low_rank
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    >>> edit = add_low_rank(model, {"0": 2})
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.down', '0.up']
    >>> type(edit.merge()[0]).__name__
    'Linear'
    """
    if not sites:
        raise ValueError("sites: at least one layer is needed")
    layers: dict[str, LowRankChange] = {}

    def maker(name: str, start: Subspace | int | tuple[Tensor, Tensor]) -> Callable[[Any], nn.Module]:
        def make(base: nn.Module) -> LowRankChange:
            rank = start if isinstance(start, int) else len(start[0]) if isinstance(start, tuple) else start.dim
            scale = 1.0 if alpha is None else alpha / rank
            if isinstance(start, tuple):
                layers[name] = LowRankChange(base, *start, scale=scale, dropout=dropout)
            else:
                layers[name] = LowRankChange.from_subspace(base, start, side=side, scale=scale, dropout=dropout)
            return layers[name]

        return make

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    surgery = replace(model, {name: maker(name, start) for name, start in sites.items()})
    for parameter in trained:
        parameter.requires_grad_(False)
    return LowRankEdit(surgery, layers, trained)
