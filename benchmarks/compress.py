"""Batched pursuit beside scikit-learn's, factored layers in use, capture, and merging in little memory.

Run: python benchmarks/compress.py [--megabytes 200] [--json FILE]. One thread. Merging runs in processes of its own, so
that peak memory is its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from record import Record, by_turns, parser, peak, timed

ATOMS, NONZERO, D = 204, 102, 384
WIDTH, OUTPUTS = 576, 1536
METHODS = ("average", "ties")


def unit_rows(n: int, d: int, seed: int) -> torch.Tensor:
    """Random rows of unit length."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def pursuit(record: Record) -> None:
    """Orthogonal matching pursuit of many rows at once, and as scikit-learn does it."""
    from sklearn.linear_model import orthogonal_mp, orthogonal_mp_gram

    from subspan.solvers import omp, sparse_coding

    atoms, rows = unit_rows(ATOMS, D, 0), unit_rows(384, D, 1)
    gram, few = (atoms @ atoms.T).numpy(), rows[:48].numpy()
    products = atoms.numpy() @ few.T
    peers = {
        "orthogonal_mp_gram": lambda: orthogonal_mp_gram(gram, products, n_nonzero_coefs=NONZERO),
        "orthogonal_mp": lambda: orthogonal_mp(atoms.numpy().T, few.T, n_nonzero_coefs=NONZERO),
    }
    # numpy's arrays may have threads that torch's setting does not reach: processor time counts them all.
    found = {name: timed(peer, repeats=2).processor / len(few) for name, peer in peers.items()}
    ours = timed(lambda: omp(rows, atoms, NONZERO)).processor / len(rows)
    # As where numba is not installed.
    sparse_coding._compiled, compiled = lambda: None, sparse_coding._compiled
    plain = timed(lambda: omp(rows, atoms, NONZERO)).processor / len(rows)
    sparse_coding._compiled = compiled
    theirs = torch.from_numpy(peers["orthogonal_mp_gram"]().T)
    difference = float((omp(rows[:48], atoms, NONZERO).dense() - theirs).abs().max())
    table = [["subspan.solvers.omp, 384 rows at once", 1e6 * ours, 1.0]]
    table += [["the same without numba", 1e6 * plain, plain / ours]]
    table += [[f"scikit-learn {name}", 1e6 * seconds, seconds / ours] for name, seconds in found.items()]
    title = f"Pursuit of rows in {D} dimensions, {ATOMS} atoms, {NONZERO} of them a row, float32"
    record.table(title, ["", "processor µs a row", "x ours"], table)
    least = min(found.values())
    record.target("processor time a row of scikit-learn's fastest over ours", least / ours, least=20)
    record.target("the same without numba", least / plain, least=20)
    record.target("largest difference of a code to scikit-learn's", difference, most=1e-3)


def int8_layer(weight: torch.Tensor):
    """y = x W' with W in 8 bits and a scale an output, multiplied out block by block."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    small = (weight / scale).round().to(torch.int8)
    return small, lambda x: torch.nn.functional.linear(x, small.float()) * scale.mT


def int8_kernel(weight: torch.Tensor):
    """The same by torch's kernel of 8-bit dynamic quantisation, where this build has one; else None."""
    try:
        from torch.ao.quantization import quantize_dynamic

        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight
        found = quantize_dynamic(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)
        found(torch.randn(2, weight.shape[1]))
    except (ImportError, RuntimeError, AttributeError):
        return None
    return found


def layers(record: Record) -> None:
    """A factored layer in use: time and memory beside the dense one and 8 bits."""
    from subspan.weights import factorise

    weight = torch.randn(OUTPUTS, WIDTH, generator=torch.Generator().manual_seed(0))
    dense = torch.nn.Linear(WIDTH, OUTPUTS, bias=False)
    dense.weight.data = weight
    small, multiplied = int8_layer(weight)
    runs = {"dense, float32": (dense, 4 * weight.numel(), 2 * weight.numel())}
    for ratio in (0.2, 0.4):
        for solver, name in (("svd", "low rank"), ("procrustes", "sparse dictionary")):
            found = factorise(weight, ratio=ratio, solver=solver, max_iter=1)
            held = sum(value.nbytes for value in found.layer.state_dict().values())
            runs[f"{name}, {ratio:g} saved"] = (found.layer, held, found.bits / 8)
    runs["8 bits, widened at each call"] = (multiplied, small.nbytes + 4 * OUTPUTS, small.nbytes + 2 * OUTPUTS)
    kernel = int8_kernel(weight)
    if kernel is not None:
        runs["8 bits, torch's dynamic kernel"] = (kernel, weight.numel() + 4 * OUTPUTS, weight.numel() + 2 * OUTPUTS)
    rows = []
    seconds = {}
    for count in (1, 256):
        x = torch.randn(count, WIDTH)
        with torch.no_grad():
            times = 50 if count == 1 else 3
            calls = {
                n: lambda run=run, x=x, times=times: [run(x) for _ in range(times)] for n, (run, *_) in runs.items()
            }
            seconds[count] = {name: value / times for name, value in by_turns(calls, rounds=4).items()}
    for name, (_, held, stored) in runs.items():
        rows.append([name, *(1e6 * seconds[count][name] for count in (1, 256)), held / 1e6, stored / 1e6])
    record.table(
        f"A layer of {WIDTH} inputs and {OUTPUTS} outputs, processor time a call",
        ["", "µs, 1 row", "µs, 256 rows", "MB in memory", "MB stored"],
        rows,
    )
    for name in ("low rank", "sparse dictionary"):
        share = seconds[256][f"{name}, 0.4 saved"] / seconds[256]["dense, float32"]
        record.target(f"time of a {name} over dense, 256 rows, 0.4 saved", share, most=1)
    record.note(
        "In memory indices are 32-bit integers and numbers float32, as the sum over atoms wants them; stored sizes are "
        "the counted bits. A sparse dictionary saves storage, not time: its sum over atoms is bound by memory."
    )


def capturing(record: Record) -> None:
    """What it costs to look at the inputs of all linear layers in a forward pass."""
    transformers = __import__("transformers")
    from subspan.models import Capture, collect_moments, linear_names

    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=WIDTH, intermediate_size=OUTPUTS, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(2048, (2, 256))}
    names = linear_names(model)

    def captured() -> None:
        with Capture(model, names, site="input") as capture:
            capture.run(batch, early_exit=False, forward=lambda whole, given: whole.model(**given))

    def forward() -> None:
        model.model(**batch)

    with torch.no_grad():
        calls = {"bare": forward, "captured": captured, "moments": lambda: collect_moments(model, [batch], names)}
        found = by_turns(calls, rounds=5)
    record.table(
        f"Six blocks of width {WIDTH}, 512 tokens, inputs of {len(names)} linear layers",
        ["", "processor seconds", "x bare"],
        [[name, value, value / found["bare"]] for name, value in found.items()],
    )
    record.target("capture over the bare forward pass", found["captured"] / found["bare"], most=1.1)
    record.note(
        "Second moments are matrix products of their own, about half as many multiplications as the pass itself."
    )


def checkpoints(folder: Path, megabytes: int) -> int:
    """A base and two experts in bfloat16, 0.4 of the numbers an embedding, the rest matrices; the bytes of one."""
    from subspan.models import write_weights

    numbers = megabytes * 500_000
    shapes = {"embed": (int(0.4 * numbers) // 1024, 1024)}
    left, block = numbers - shapes["embed"][0] * 1024, 0
    while left > 0:
        shapes[f"block.{block}"] = (min(4096, max(1, left // 1024)), 1024)
        left, block = left - shapes[f"block.{block}"][0] * 1024, block + 1
    for seed, name in enumerate(("base", "one", "two")):
        generator = torch.Generator().manual_seed(seed)
        pairs = ((key, torch.randn(shape, generator=generator).bfloat16()) for key, shape in shapes.items())
        write_weights(pairs, folder / name, shard_bytes=megabytes * 250_000)
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def merge_one(folder: str, method: str) -> None:
    """One merge in this process: time, and the largest resident memory beside that before it."""
    from subspan.commands.merging import Merge

    root = Path(folder)
    job = Merge(root / "base", (root / "one", root / "two"), method, {})
    torch.randn(64, 64) @ torch.randn(64, 64)
    start, wall, processor = peak(), time.perf_counter(), time.process_time()
    job.run(root / f"merged-{method}", lambda *_: None)
    facts = {"seconds": time.perf_counter() - wall, "processor": time.process_time() - processor, "mib": peak() - start}
    print(json.dumps(facts))


def read_all(files: list[Path]) -> float:
    """Seconds to read files from the disk, as far as the kernel lets go of what it has of them."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass
    return time.perf_counter() - started


def merging(record: Record, megabytes: int) -> None:
    """Merging checkpoints in a third of the memory that one of them takes."""
    with tempfile.TemporaryDirectory() as folder:
        size = checkpoints(Path(folder), megabytes)
        files = [file for name in ("base", "one", "two") for file in (Path(folder) / name).glob("*.safetensors")]
        reading = read_all(files)
        rows, most = [], 0.0
        for method in METHODS:
            command = [sys.executable, __file__, "--one", folder, method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                record.note(f"{method} failed: {done.stderr.splitlines()[-1]}")
                most = float("inf")
                continue
            run = json.loads(done.stdout.splitlines()[-1])
            most = max(most, run["mib"])
            rows.append([method, run["seconds"], run["processor"], run["mib"], run["mib"] * 2**20 / size])
            if method == "average":
                share = reading / run["seconds"]
                record.target("reading the three checkpoints alone over the time to average them", share, least=0.5)
    record.table(
        f"Two experts of {size / 1e6:.0f} MB and their base",
        ["", "seconds", "processor seconds", "MiB over the start, pages of files included", "of a model"],
        rows,
    )
    record.note(f"Reading base and experts from the disk, nothing else: {reading:.2f} s.")
    record.target("largest memory over the start, of the size of a model", most * 2**20 / size, most=1 / 3)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--megabytes", type=int, default=200)
    options.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = options.parse_args()
    torch.set_num_threads(1)
    if options.one:
        merge_one(*options.one)
        return
    record = Record("compress", "pursuit, factored layers, capture, merging in little memory")
    pursuit(record)
    layers(record)
    capturing(record)
    merging(record, options.megabytes)
    record.save(options.json)


if __name__ == "__main__":
    main()
