"""Tokens a second of training a sparse autoencoder, beside sae_lens' trainer where it is installed.

Run: python benchmarks/sae.py [--json FILE]
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from record import Record, parser, timed
from subspan.nn.training import quiet_trainer
from subspan.probe import TopKSAE

BATCH, K, RATE = 1024, 32, 3e-4


def ours(x: torch.Tensor, atoms: int, variant: Any) -> None:
    options: dict[str, Any] = {"learning_rate": RATE, "batch_size": BATCH, "epochs": 1}
    TopKSAE(n_atoms=atoms, k=K, variant=variant, random_state=0, **options).fit(x)


def theirs(x: torch.Tensor, atoms: int, variant: str) -> None:
    """sae_lens' own trainer and training classes, on the same rows."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    classes: dict[str, Any] = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    }
    made, config = classes[variant]
    sae = made(config(d_in=x.shape[1], d_sae=atoms, k=K))
    schedule: dict[str, Any] = {"lr_scheduler_name": "constant", "lr_end": RATE / 10, "lr_warm_up_steps": 0}
    schedule |= {"lr_decay_steps": 0, "n_restart_cycles": 1, "adam_beta1": 0.9, "adam_beta2": 0.999, "lr": RATE}
    files: dict[str, Any] = {"n_checkpoints": 0, "checkpoint_path": None, "save_final_checkpoint": False}
    sizes: dict[str, Any] = {"total_training_samples": len(x), "train_batch_size_samples": BATCH}
    windows: dict[str, Any] = {"dead_feature_window": 1000, "feature_sampling_window": 2000}
    options = SAETrainerConfig(
        device="cpu", autocast=False, logger=LoggingConfig(log_to_wandb=False), **schedule, **files, **sizes, **windows
    )

    def rows() -> Iterator[torch.Tensor]:
        while True:
            yield from x.split(BATCH)

    SAETrainer(cfg=options, sae=sae, data_provider=rows()).fit()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=32)
    arguments.add_argument("--atoms", type=int, default=2304)
    arguments.add_argument("--dim", type=int, default=576)
    options = arguments.parse_args()
    logging.disable(logging.WARNING)
    record = Record("sae", f"{options.steps} batches of {BATCH} rows of {options.dim}, {options.atoms} atoms, k = {K}")
    x = torch.randn(options.steps * BATCH, options.dim, generator=torch.Generator().manual_seed(0))
    with quiet_trainer(max_epochs=1):
        pass  # what Lightning imports on its first use is not training
    runs: dict[str, Callable[[], None]] = {
        "TopK": lambda: ours(x, options.atoms, "topk"),
        "BatchTopK": lambda: ours(x, options.atoms, "batchtopk"),
    }
    installed = importlib.util.find_spec("sae_lens") is not None
    if installed:
        runs |= {
            "TopK, sae_lens": lambda: theirs(x, options.atoms, "topk"),
            "BatchTopK, sae_lens": lambda: theirs(x, options.atoms, "batchtopk"),
        }
    speeds = {name: len(x) / timed(run, repeats=1, warm=False).processor for name, run in runs.items()}
    record.table("Training", ["autoencoder", "tokens a second"], [[name, speed] for name, speed in speeds.items()])
    if installed:
        for name in ("TopK", "BatchTopK"):
            faster = speeds[name] / speeds[f"{name}, sae_lens"]
            record.target(f"{name}, times as fast as sae_lens'", faster, least=1)
    else:
        record.note("sae_lens is not installed: ours alone.")
    record.note("Seconds of the processor, one thread each, with set-up.")
    record.save(options.json)


if __name__ == "__main__":
    main()
