"""Choose a subset of rows or samples that stands for the whole pool."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
