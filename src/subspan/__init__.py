"""Subspaces of learned representations: find, measure, project, map, learn."""

__version__ = "0.1.0"
