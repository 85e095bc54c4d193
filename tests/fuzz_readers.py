"""Give every reader damaged files and say which of them did anything but read, or refuse by the file's name.

    python tests/fuzz_readers.py --count 5000 --seed 0
    python tests/fuzz_readers.py --count 500 --only parquet --keep /tmp/failures

A damaged file is a good one of which bytes, numbers or stretches are changed, what is packed in it too. It is read in a
process of its own with 3 GiB of address space and 10 seconds of work (120 by the clock): another exception than
ValueError or OSError, a message without the file's name, a crash, and a stop by a limit are failures.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import save_file

from subspan.base import read_table
from subspan.base.reading import read_json
from subspan.commands.inputs import read_labels
from subspan.datasets import image_folder, is_anomaly_layout, open_image, original, read_graph, read_texts
from subspan.datasets.index_writing import _recorded_rows
from subspan.datasets.indexes import open_index, read_ids
from subspan.detect import SubspaceDetector
from subspan.geometry import AffineMap, Subspace
from subspan.models.sentence_folders import read_sentence_folder
from subspan.select.shards import RepresentationShards
from subspan.statistics import Moments, fit_moments

MEMORY = 3 * 2**30
SECONDS, WAITING = 10, 120
ROWS = np.random.default_rng(0).standard_normal((24, 6)).astype(np.float32)
LABELS = [f"class {row % 3}" for row in range(len(ROWS))]
RECORDS = [{"id": row, "kind": LABELS[row], "embedding": values.tolist()} for row, values in enumerate(ROWS)]


@dataclass(frozen=True)
class Case:
    """A good file, or one of a folder: how it is written and read, and what a message may call it beside its name."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    called: tuple[str, ...] = ()
    beside: dict[str, Callable[[Path], Any]] = field(default_factory=dict)


def whole(path: Path, **columns: str) -> None:
    table = read_table(path, **columns)
    array = table.array()
    assert array.shape == table.shape
    table.rows([0, len(table) - 1])


def vectors(path: Path) -> None:
    stored = open_index(path)
    for _ in stored.blocks():
        pass


def packed(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(gzip.compress(text.encode()))


def lines(text: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(text, encoding="utf-8")


def arrow(columns: dict[str, Any], **options: Any) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        import pyarrow.feather
        import pyarrow.parquet

        table = pyarrow.table(columns)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path, row_group_size=9, **options)
        else:
            pyarrow.feather.write_feather(table, path, chunksize=9, **options)

    return write


def picture(path: Path | io.BytesIO, kind: str, size: tuple[int, int] = (12, 9)) -> None:
    from PIL import Image

    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)


def pictures(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train/good/a.png", "train/good/b.png", "test/good/c.png"):
            stream = io.BytesIO()
            picture(stream, "png")
            archive.writestr(name, stream.getvalue())


def all_pictures(path: Path) -> None:
    is_anomaly_layout(str(path))
    for image in image_folder(path):
        assert image.width


def idx(path: Path) -> None:
    data = b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (5, 4, 3)) + bytes(range(60))
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def graph(path: Path) -> None:
    matrix = {"data": np.ones(24), "indices": np.arange(24)[::-1], "indptr": np.arange(25), "shape": np.array([24, 24])}
    arrays = {f"{part}_{name}": value for part in ("adj", "attr") for name, value in matrix.items()}
    np.savez_compressed(path, **arrays, labels=np.arange(24) % 3, kind=np.array(LABELS))


def faiss_index(factory: str) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        import faiss

        rows = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
        index = faiss.index_factory(16, factory)
        index.train(rows)
        index.add_with_ids(rows, np.arange(300) * 3) if "IDMap" in factory else index.add(rows)
        faiss.write_index(index, str(path))

    return write


def qdrant(path: Path) -> None:
    """The folder beside `path` is the collection; `path` is its table of points."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(path.parents[2]))
    config = models.VectorParams(size=6, distance=models.Distance.COSINE)
    client.create_collection(path.parent.name, vectors_config=config)
    points = [models.PointStruct(id=row, vector=values.tolist()) for row, values in enumerate(ROWS)]
    client.upsert(path.parent.name, points)
    client.close()


def sentence_folder(path: Path) -> None:
    """modules.json and what it names, of which `path` is one file."""
    root = path.parent if path.parent.name != "1_Pooling" else path.parents[1]
    (root / "1_Pooling").mkdir(exist_ok=True)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]  # fmt: skip
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 6, "pooling_mode_cls_token": True})
    )
    (root / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 128, "do_lower_case": False}))


def shard(path: Path) -> None:
    facts = json.dumps({"kind": "representations", "ids": LABELS, "digest": "x"})
    rows = {"rows": torch.from_numpy(ROWS), "known": torch.ones(len(ROWS), dtype=torch.bool)}
    save_file(rows, path, metadata={"subspan": facts})


def csv_text(separator: str = ",") -> str:
    header = separator.join(["id", "kind", *(f"x{place}" for place in range(6))])
    rows = [separator.join([str(row), LABELS[row], *map(str, values)]) for row, values in enumerate(ROWS)]
    return "\n".join([header, *rows]) + "\n"


JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXT_LINES = "".join(
    json.dumps({"id": row, "text": f"Text {row}: naïve 中", "kind": LABELS[row]}) + "\n" for row in range(24)
)
EDGES = "# edges\n" + "".join(f"{row} {(row * 7 + 1) % 24} 0.5\n" for row in range(24))
ATTRIBUTES = {"x.npy": lambda path: np.save(path, ROWS)}
COLUMNS = {"id": range(24), "kind": LABELS, **{f"x{place}": ROWS[:, place] for place in range(6)}}
LISTS = {"id": range(24), "kind": LABELS, "v": ROWS.tolist()}
TEXTS = {"id": range(24), "kind": LABELS, "v": [json.dumps(values.tolist()) for values in ROWS]}
NAMED = {"label_column": "kind", "id_column": "id"}

CASES: dict[str, Case] = {
    "array.npy": Case(lambda path: np.save(path, ROWS), whole),
    "labels.npy": Case(lambda path: np.save(path, np.array(LABELS)), lambda path: read_labels(path, 24)),
    "ids.npy": Case(lambda path: np.save(path, np.arange(24, dtype=np.uint64)), read_ids),
    "ids.txt": Case(lines("a\nb\né\n" * 8), read_ids),
    "arrays.npz": Case(lambda path: np.savez_compressed(path, x=ROWS, kind=np.array(LABELS)),
                       lambda path: whole(path, label_column="kind")),
    "stored.npz": Case(lambda path: np.savez(path, x=ROWS), whole),
    "tensors.safetensors": Case(
        lambda path: save_file({"x": torch.from_numpy(ROWS), "y": torch.ones(24)}, path), whole
    ),
    "table.csv": Case(lines(csv_text()), lambda path: whole(path, **NAMED)),
    "packed.csv.gz": Case(packed(csv_text()), lambda path: whole(path, **NAMED)),
    "table.tsv": Case(lines(csv_text("\t")), lambda path: whole(path, **NAMED)),
    "lists.csv": Case(lines("v\n" + "".join(f'"{values.tolist()}"\n' for values in ROWS)), whole),
    "vectors.jsonl": Case(lines(JSON_LINES), lambda path: whole(path, **NAMED)),
    "vectors.jsonl.gz": Case(packed(JSON_LINES), whole),
    "texts.jsonl": Case(lines(TEXT_LINES), lambda path: read_texts(path, label_column="kind", id_column="id")),
    "texts.jsonl.gz": Case(packed(TEXT_LINES), lambda path: read_texts(path, column="text")),
    "texts.txt": Case(lines("one\ntwo thrée\n" * 9), read_texts),
    "texts.txt.gz": Case(packed("one\ntwo thrée\n" * 9), lambda path: read_labels(path, 18)),
    "texts.csv": Case(lines("text,kind\n" + 'one,"a, b"\n' * 9), lambda path: read_texts(path, label_column="kind")),
    "columns.parquet": Case(arrow(COLUMNS), lambda path: whole(path, **NAMED)),
    "lists.parquet": Case(arrow(LISTS, compression="zstd"), lambda path: whole(path, **NAMED)),
    "plain.parquet": Case(arrow(LISTS, compression="none", use_dictionary=False), fit_moments),
    "texts.parquet": Case(arrow(TEXTS), whole),
    "columns.feather": Case(arrow(COLUMNS), lambda path: whole(path, **NAMED)),
    "lists.arrow": Case(arrow(LISTS, compression="uncompressed"), lambda path: whole(path, **NAMED)),
    "images-idx3-ubyte": Case(idx, original.read_idx),
    "images-idx3-ubyte.gz": Case(idx, original.read_idx),
    "pictures.zip": Case(pictures, all_pictures, ("train/good/a.png", "train/good/b.png", "test/good/c.png")),
    **{f"image.{suffix}": Case(lambda path, kind=kind: picture(path, kind), open_image) for suffix, kind in
       {"png": "png", "jpg": "jpeg", "gif": "gif", "bmp": "bmp", "tiff": "tiff", "webp": "webp", "ppm": "ppm"}.items()},
    "links.edges": Case(lines(EDGES), lambda path: read_graph(path, path.parent / "x.npy"), beside=ATTRIBUTES),
    "links.edges.gz": Case(packed(EDGES), lambda path: read_graph(path, path.parent / "x.npy"), beside=ATTRIBUTES),
    "graph.npz": Case(graph, lambda path: read_graph(path, label_column="kind")),
    **{f"{name}.faiss": Case(faiss_index(factory), vectors) for name, factory in
       {"flat": "Flat", "ids": "IDMap,Flat", "ivf": "IVF4,Flat", "codes": "SQ8", "graph": "HNSW8,Flat"}.items()},
    "collection/points/storage.sqlite": Case(qdrant, lambda path: vectors(path.parents[2]), ("points", "qdrant")),
    "subspace.safetensors": Case(lambda path: Subspace.fit(ROWS, rank=2).save(path), Subspace.load),
    "map.safetensors": Case(lambda path: AffineMap(torch.eye(6), torch.ones(6)).save(path), AffineMap.load),
    "moments.safetensors": Case(lambda path: fit_moments(ROWS).save(path), Moments.load),
    "detector.safetensors": Case(lambda path: SubspaceDetector(2).fit(ROWS).save(path), SubspaceDetector.load),
    "shard-00000.safetensors": Case(shard, lambda path: RepresentationShards(path.parent, {}).read(0)),
    "settings.json": Case(lines('{"layer": 3, "pool": "mean"}'),
                          lambda path: RepresentationShards(path.parent, {"layer": 3, "pool": "mean"}), ("another",)),
    "modules.json": Case(sentence_folder, lambda path: read_sentence_folder(path.parent), ("_Pooling", "sentence_")),
    "1_Pooling/config.json": Case(sentence_folder, lambda path: read_sentence_folder(path.parents[1]), ()),
    "progress.json": Case(lines('{"key": "x", "rows": 3}'), lambda path: _recorded_rows(path, "x")),
    "facts.json": Case(lines('{"a": [1, 2, {"b": null}]}'), read_json),
}  # fmt: skip


# ---------------------------------------------------------------------- damage


NUMBERS = [
    b"9" * 400,
    b"-1",
    b"0",
    b"1e999",
    b"nan",
    b"18446744073709551615",
    b"9" * 5000,
    b"0.5",
    b"\xf3\xa0",
    b"\\ud800",
]
WORDS = [value.to_bytes(size, "little", signed=False) for size in (1, 2, 4, 8)
         for value in (0, 1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 2 ** (8 * size) - 1)]  # fmt: skip
TOKENS = [
    b"[" * 3000,
    b"{" * 3000,
    b"(",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"\x1b[2J",
    b"]",
    b"}",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
]


def damage(data: bytes, dice: random.Random) -> bytes:
    """The bytes with one to four changes; what is packed is unpacked for it half of the time."""
    if dice.random() < 0.5:
        with contextlib.suppress(OSError, EOFError, zipfile.BadZipFile):
            if data[:2] == b"\x1f\x8b":
                return gzip.compress(damage_plain(gzip.decompress(data), dice))
            if data[:4] == b"PK\x03\x04":
                return damage_archive(data, dice)
    return damage_plain(data, dice)


def damage_archive(data: bytes, dice: random.Random) -> bytes:
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(result, "w", zipfile.ZIP_DEFLATED) as changed:
        entries = archive.infolist()
        chosen = dice.randrange(len(entries))
        for place, entry in enumerate(entries):
            content = archive.read(entry)
            changed.writestr(entry.filename, damage_plain(content, dice) if place == chosen else content)
            if place == chosen and dice.random() < 0.1:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    changed.writestr(entry.filename, content)
    return result.getvalue()


def damage_plain(data: bytes, dice: random.Random) -> bytes:
    for _ in range(dice.choice((1, 1, 2, 4))):
        # The heads and tails of files say what the rest is.
        near = dice.choice((len(data), len(data), min(len(data), 128)))
        start = dice.randrange(near + 1) if dice.random() < 0.8 else max(0, len(data) - dice.randrange(1, 65))
        length = min(dice.choice((1, 2, 4, 8, 64, 512)), len(data) - start)
        stop = start + length
        kind = dice.randrange(8)
        if kind == 0:
            data = data[:start] + dice.randbytes(length) + data[stop:]
        elif kind == 1:
            data = data[:start]
        elif kind == 2:
            data = data[:start] + data[stop:]
        elif kind == 3:
            data = data[:stop] + data[start:]
        elif kind == 4:
            word = dice.choice(WORDS)
            data = data[:start] + word + data[start + len(word) :]
        elif kind == 5:
            data = data[:start] + dice.choice(TOKENS) + data[start:]
        elif kind == 6 and data:
            place = start % len(data)
            data = data[:place] + bytes([data[place] ^ (1 << dice.randrange(8))]) + data[place + 1 :]
        else:
            digits = [place for place in range(start, min(start + 200, len(data))) if 48 <= data[place] <= 57]
            place = dice.choice(digits) if digits else start
            data = data[:place] + dice.choice(NUMBERS) + data[place + 1 :]
    return data


# ---------------------------------------------------------------------- runs


def prepared(root: Path, only: str) -> list[str]:
    """Write the good files, each into a folder of its own; the names of those whose packages are there."""
    names = []
    for place, (name, case) in enumerate(CASES.items()):
        if only not in name:
            continue
        path = root / str(place) / name
        path.parent.mkdir(parents=True)
        try:
            for other, write in case.beside.items():
                write(path.parent / other)
            case.write(path)
        except ImportError:
            continue
        case.read(path)
        names.append(name)
    return names


def outcome(name: str, place: int, root: Path, seed: int, index: int) -> tuple[str, str, bytes]:
    """(what happened, in which words, the file) for a damaged copy of one good file."""
    dice = random.Random(f"{seed} {index}")
    case = CASES[name]
    path = root / str(place) / name
    good = path.read_bytes()
    data = damage(good, dice)
    path.write_bytes(data)
    try:
        case.read(path)
    except (ValueError, OSError) as error:
        named = any(word in str(error) for word in (path.name, *case.called))
        if named and "\n" not in str(error) and len(str(error)) < 1000:
            return "refused", "", data
        return "unnamed", f"{type(error).__name__}: {str(error)[:300]}", data
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "raised", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})", data
    finally:
        path.write_bytes(good)
    return "read", "", data


def child(names: list[str], root: Path, seed: int, indices: range, pipe: int) -> None:
    """Report every case before and after it is read."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    places = {name: place for place, name in enumerate(CASES)}
    with os.fdopen(pipe, "w", buffering=1) as out:
        for index in indices:
            name = names[index % len(names)]
            print(json.dumps({"start": index}), file=out)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WAITING)
            what, words, data = outcome(name, places[name], root, seed, index)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            kept = data.hex() if what in ("unnamed", "raised") else ""
            print(json.dumps({"index": index, "what": what, "words": words, "data": kept}), file=out)


def run(count: int, seed: int, only: str = "", keep: Path | None = None) -> tuple[Counter[str], list[str]]:
    """(how often what happened, failures in words) of `count` damaged files, in turn of each kind."""
    happened: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder) / "qdrant"
        root.mkdir()
        # In a process of its own, so that those that are limited start without the threads of the writers.
        names = _in_a_process(lambda: prepared(root, only))
        index = 0
        while index < count:
            index = _run_from(index, count, names, root, seed, happened, failures, keep)
    return happened, failures


def _in_a_process(work: Callable[[], list[str]]) -> list[str]:
    end, begin = os.pipe()
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            os.write(begin, json.dumps(work()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    os.close(begin)
    with os.fdopen(end, "rb") as stream:
        text = stream.read()
    if os.waitpid(worker, 0)[1] or not text:
        raise RuntimeError("the good files could not be made")
    return json.loads(text)


def _run_from(
    index: int, count: int, names: list[str], root: Path, seed: int, happened: Counter[str], failures: list[str],
    keep: Path | None,
) -> int:  # fmt: skip
    """Cases from `index` on, until all are done or the process has ended; the next index."""
    end, begin = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(end)
        with contextlib.suppress(BaseException):
            child(names, root, seed, range(index, count), begin)
        os._exit(0)
    os.close(begin)
    started = None
    with os.fdopen(end, encoding="utf-8") as stream:
        for line in stream:
            report = json.loads(line)
            if "start" in report:
                started = report["start"]
                continue
            started, index = None, report["index"] + 1
            happened[report["what"]] += 1
            if report["what"] not in ("read", "refused"):
                _note(f"{report['what']}: {report['words']}", report, names, seed, failures, keep)
    status = os.waitpid(worker, 0)[1]
    if started is None:
        return count if index >= count else index
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    what = "hung" if number in (signal.SIGALRM, signal.SIGPROF) else "crashed"
    happened[what] += 1
    place = list(CASES).index(names[started % len(names)])
    path = root / str(place) / names[started % len(names)]
    data = path.read_bytes()
    _note(f"{what} (signal {number})", {"index": started, "data": data.hex()}, names, seed, failures, keep)
    shutil.rmtree(root / str(place))
    _in_a_process(lambda: _again(root, place))
    return started + 1


def _again(root: Path, place: int) -> list[str]:
    name, case = list(CASES.items())[place]
    path = root / str(place) / name
    path.parent.mkdir(parents=True)
    for other, write in case.beside.items():
        write(path.parent / other)
    case.write(path)
    return [name]


def _note(
    words: str, report: dict[str, Any], names: list[str], seed: int, failures: list[str], keep: Path | None
) -> None:
    name = names[report["index"] % len(names)]
    failures.append(f"{name} (seed {seed}, case {report['index']}): {words}")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{report['index']}-{Path(name).name}").write_bytes(bytes.fromhex(report["data"]))


def main() -> int:
    """Print what happened, and every failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="good files with this in their name")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    options = parser.parse_args()
    started = time.monotonic()
    happened, failures = run(options.count, options.seed, options.only, options.keep)
    for failure in failures:
        print(failure)
    shown = ", ".join(f"{number} {what}" for what, number in sorted(happened.items()))
    print(f"{sum(happened.values())} damaged files: {shown}; {time.monotonic() - started:.0f} s")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
