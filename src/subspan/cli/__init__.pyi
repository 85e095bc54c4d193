from .running import main, run

__all__ = ["main", "run"]
