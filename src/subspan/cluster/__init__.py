"""Cluster rows, images and nodes of graphs by the subspaces that they lie in."""

from .s2cag import S2CAG

__all__ = ["S2CAG"]
