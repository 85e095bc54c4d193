"""Neural building blocks: layers, heads and losses as plain torch modules and functions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
