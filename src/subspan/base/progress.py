"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done, in [0, 1]."""


def silent(message: str, fraction: float) -> None:
    """Progress that nobody watches.

    Parameters
    ----------
    message
        What is being done.
    fraction
        Of it that is done, in [0, 1].

    Examples
    --------
    >>> from subspan.base import silent
    >>> silent("reading", 0.5)
    """
