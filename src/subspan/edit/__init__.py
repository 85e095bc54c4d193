"""Changing what a model represents or decides, by changing subspaces of its representations."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
