"""`EmbeddingAdapter`: a fitted map between embedding spaces as a torch module, for FAISS and for ONNX."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from subspan.base import normalize_rows, require, save_arrays, saved_object
from subspan.base.files import atomic_write
from subspan.base.saved import Schema, optional
from subspan.geometry import AffineMap

_SMALLEST_LENGTH = 1e-30


class EmbeddingAdapter(nn.Module):
    """Rows e → π_out(W π_in(e) + b + MLP(π_in(e))), π to unit length where asked for; zero rows stay zero under π.

    Parameters
    ----------
    weight
        W (d_out, d_in).
    bias
        b (d_out,); None for 0.
    hidden
        (First weight (h, d_in), first bias, second weight (d_out, h), second bias) of the residual MLP with GELU, or
        None for a linear map.
    normalize_input, normalize_output
        Whether π is applied before and after.

    Examples
    --------
    >>> import torch
    >>> from subspan.align import EmbeddingAdapter
    >>> adapter = EmbeddingAdapter(torch.tensor([[0.0, 2.0], [2.0, 0.0]]), normalize_output=True)
    >>> adapter(torch.tensor([[0.0, 5.0]])).tolist()
    [[1.0, 0.0]]
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "d_out d_in"],
        bias: Float[Tensor, " d_out"] | None = None,
        *,
        hidden: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
        normalize_input: bool = False,
        normalize_output: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", weight.new_zeros(len(weight)) if bias is None else bias)
        for name, value in zip(_HIDDEN, hidden or (None,) * 4):
            self.register_buffer(name, value)
        self.normalize_input = normalize_input
        self.normalize_output = normalize_output

    @property
    def hidden(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Weights of the residual MLP, or None."""
        parts = tuple(getattr(self, name) for name in _HIDDEN)
        return None if parts[0] is None else parts

    def forward(self, rows: Float[Tensor, "*n d_in"]) -> Float[Tensor, "*n d_out"]:
        """Map rows (…, d_in), in their dtype."""
        rows = normalize_rows(rows) if self.normalize_input else rows
        mapped = F.linear(rows, self.weight.to(rows), self.bias.to(rows))
        if self.hidden is not None:
            w1, b1, w2, b2 = (part.to(rows) for part in self.hidden)
            mapped = mapped + F.linear(F.gelu(F.linear(rows, w1, b1)), w2, b2)
        return normalize_rows(mapped) if self.normalize_output else mapped

    def extra_repr(self) -> str:
        """Shown by print."""
        d_out, d_in = self.weight.shape
        kind = "linear" if self.hidden is None else f"linear and MLP of {len(self.hidden[0])}"
        return f"{d_in} -> {d_out}, {kind}, normalize=({self.normalize_input}, {self.normalize_output})"

    def to_faiss(self) -> list[Any]:
        """faiss VectorTransforms in the order in which they apply (extra: index). Raises ValueError for an MLP."""
        if self.hidden is not None:
            raise ValueError("method: an MLP is no chain of FAISS transforms; use to_onnx, or a linear method")
        faiss: Any = require("faiss", extra="index")
        d_out, d_in = self.weight.shape
        chain = [faiss.NormalizationTransform(d_in, 2.0)] if self.normalize_input else []
        chain.append(AffineMap(self.weight, self.bias).to_faiss())
        return chain + ([faiss.NormalizationTransform(d_out, 2.0)] if self.normalize_output else [])

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write as an ONNX graph "embeddings" (n, d_in) → "mapped" (n, d_out), float32, whole or not at all."""
        onnx: Any = require("onnx", extra="onnx")
        make, kind = onnx.helper, onnx.TensorProto.FLOAT
        d_out, d_in = self.weight.shape
        constants, nodes = [], []

        def constant(name: str, value: Any) -> str:
            array = np.ascontiguousarray(value, dtype=value.dtype if value.dtype == np.int64 else np.float32)
            constants.append(onnx.numpy_helper.from_array(array, name))
            return name

        def node(operation: str, inputs: list[str], output: str, **options: Any) -> str:
            nodes.append(make.make_node(operation, inputs, [output], **options))
            return output

        def unit(rows: str, output: str) -> str:
            if "last_axis" not in {c.name for c in constants}:
                constant("last_axis", np.array([-1], dtype=np.int64))
                constant("smallest_length", np.array(_SMALLEST_LENGTH))
            length = node("ReduceL2", [rows, "last_axis"], f"{output}_length", keepdims=1)
            return node("Div", [rows, node("Max", [length, "smallest_length"], f"{output}_divisor")], output)

        def linear(rows: str, weight: Tensor, bias: Tensor, output: str) -> str:
            names = [
                constant(f"{output}_weight", weight.detach().cpu().numpy()),
                constant(f"{output}_bias", bias.detach().cpu().numpy()),
            ]
            return node("Gemm", [rows, *names], output, transB=1)

        rows = unit("embeddings", "unit_embeddings") if self.normalize_input else "embeddings"
        mapped = linear(rows, self.weight, self.bias, "linear")
        if self.hidden is not None:
            w1, b1, w2, b2 = self.hidden
            inner = linear(rows, w1, b1, "hidden")
            # GELU written out with Erf, which runtimes have had since operator set 9.
            scaled = node("Mul", [inner, constant("root_half", np.array(0.5**0.5))], "hidden_scaled")
            gate = node(
                "Add", [node("Erf", [scaled], "hidden_erf"), constant("one", np.array(1.0))], "hidden_gate_doubled"
            )
            halved = node("Mul", [inner, constant("half", np.array(0.5))], "hidden_halved")
            residual = linear(node("Mul", [halved, gate], "hidden_active"), w2, b2, "residual")
            mapped = node("Add", [mapped, residual], "sum")
        node("Identity", [unit(mapped, "unit_mapped") if self.normalize_output else mapped], "mapped")
        graph = make.make_graph(
            nodes,
            "embedding adapter",
            [make.make_tensor_value_info("embeddings", kind, ["n", d_in])],
            [make.make_tensor_value_info("mapped", kind, ["n", d_out])],
            constants,
        )
        model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9, producer_name="subspan")
        onnx.checker.check_model(model)
        with atomic_write(path) as temporary:
            temporary.write_bytes(model.SerializeToString())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_arrays(path, "embedding-adapter", self.state_dict(), **self._facts())

    def _facts(self) -> dict[str, bool]:
        return {"normalize_input": self.normalize_input, "normalize_output": self.normalize_output}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EmbeddingAdapter:
        """Read a file written by `save`. Raises ValueError when it is not one."""
        with saved_object(path, "embedding-adapter", SAVED_ARRAYS, _SAVED_FACTS) as found:
            return cls.from_arrays(*found)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], facts: dict[str, Any]) -> EmbeddingAdapter:
        """From the state and facts of a file."""
        hidden: Any = tuple(arrays[name] for name in _HIDDEN) if set(_HIDDEN) & set(arrays) else None
        return cls(arrays["weight"], arrays["bias"], hidden=hidden, **facts)


_HIDDEN = ("hidden_weight", "hidden_bias", "residual_weight", "residual_bias")
SAVED_ARRAYS: Schema = {
    "weight": Float[Tensor, "d_out d_in"],
    "bias": Float[Tensor, " d_out"],
    "hidden_weight": optional(Float[Tensor, "h d_in"]),
    "hidden_bias": optional(Float[Tensor, " h"]),
    "residual_weight": optional(Float[Tensor, "d_out h"]),
    "residual_bias": optional(Float[Tensor, " d_out"]),
}
_SAVED_FACTS = {"normalize_input": bool, "normalize_output": bool}
