from .alignment import align_rows
from .clustering import cluster_graph, cluster_rows
from .description import describe
from .detection import detect_images, detect_label_errors, detect_rows
from .inputs import read_nodes, read_rows
from .selection import select_rows
from .shortening import read_stored, shorten_to
from .upgrading import UpgradeFiles, UpgradeInputs, run_upgrade

__all__ = [
    "UpgradeFiles",
    "UpgradeInputs",
    "align_rows",
    "cluster_graph",
    "cluster_rows",
    "describe",
    "detect_images",
    "detect_label_errors",
    "detect_rows",
    "read_nodes",
    "read_rows",
    "read_stored",
    "run_upgrade",
    "select_rows",
    "shorten_to",
]
