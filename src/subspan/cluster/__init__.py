"""Cluster rows, images and nodes of graphs by the subspaces that they lie in."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
