from .page import render, render_clusters, render_upgrade

__all__ = ["render", "render_clusters", "render_upgrade"]
