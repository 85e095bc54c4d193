"""Representations of a pool, kept in shards so that a long pass over it can stop and go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from subspan.base import save_arrays, saved_object
from subspan.base.columns import listed
from subspan.base.files import write_text
from subspan.base.reading import read_json

_KIND = "representations"
_SETTINGS = "settings.json"


class Shard(NamedTuple):
    """Consecutive samples of a pool: their ids, their rows (NaN for a skipped sample), and a digest of the samples."""

    ids: list[str]
    rows: Float[Tensor, "m d"]
    digest: str


class RepresentationShards:
    """Shards in a folder, one safetensors file each, or in memory where `folder` is None.

    `settings` (JSON values) say how the rows were made; a folder with other settings is refused with ValueError.
    Iterating gives the rows without the skipped ones, as often as wanted.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[int, Shard] = {}
        self.count = 0
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _SETTINGS
        if not path.exists():
            write_text(path, json.dumps(settings, indent=1))
            return
        stored = read_json(path, "folder")
        changed = sorted(key for key in settings.keys() | stored.keys() if settings.get(key) != stored.get(key))
        if changed:
            raise ValueError(
                f"folder: {str(self.folder)!r} was made with another {listed(changed)}; choose another folder"
            )

    def path(self, index: int) -> Path:
        """File of shard `index`."""
        assert self.folder is not None
        return self.folder / f"shard-{index:05d}.safetensors"

    def read(self, index: int) -> Shard | None:
        """Shard `index`, or None where it is not there or its file is damaged."""
        if self.folder is None:
            return self._kept.get(index)
        schema = {"rows": Float[Tensor, "m d"], "known": Bool[Tensor, " m"]}
        try:
            with saved_object(self.path(index), _KIND, schema, {"ids": list[str], "digest": str}) as (arrays, facts):
                if len(facts["ids"]) != len(arrays["rows"]):
                    raise ValueError(f"{len(facts['ids'])} ids of {len(arrays['rows'])} rows")
                return Shard(facts["ids"], arrays["rows"].masked_fill(~arrays["known"][:, None], nan), facts["digest"])
        except (FileNotFoundError, ValueError):
            return None

    def write(self, index: int, shard: Shard) -> None:
        """Keep shard `index`, whole or not at all."""
        if self.folder is None:
            self._kept[index] = shard
            return
        known = ~shard.rows.isnan().any(1)
        arrays = {"rows": shard.rows.masked_fill(~known[:, None], 0), "known": known}
        save_arrays(self.path(index), _KIND, arrays, ids=shard.ids, digest=shard.digest)

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self.count):
            shard = self.read(index)
            if shard is None:
                raise ValueError(f"folder: shard {index} is missing or damaged; run the extraction again")
            known = shard.rows[~shard.rows.isnan().any(1)]
            if len(known):
                yield known
