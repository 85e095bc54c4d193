"""Tensors in safetensors files, with the kind of thing that they are and facts beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..base.files import atomic_write


def save_arrays(path: str | os.PathLike[str], kind: str, arrays: Mapping[str, Tensor], **facts: Any) -> None:
    """Write tensors of one `kind` to a safetensors file, whole or not at all; `facts` are JSON values kept beside.

    Such files are read by `subspan.base.saved.saved_object`. Raises ValueError for facts that are NaN or infinite.
    """
    metadata = {"subspan": json.dumps({**facts, "kind": kind}, allow_nan=False)}
    # Copies, as the format refuses tensors that share memory (a subspace's variances are part of its spectrum).
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in arrays.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(copies, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
