from .clusters_page import render_clusters
from .page import render
from .upgrade_page import render_upgrade

__all__ = ["render", "render_clusters", "render_upgrade"]
