from .audit_page import render_audit
from .checkpoint_pages import render_compression, render_merge, render_unlearning
from .clusters_page import render_clusters
from .forecast_page import render_forecast
from .page import render
from .probe_page import render_probe
from .series_page import render_series
from .upgrade_page import render_upgrade

__all__ = [
    "render",
    "render_audit",
    "render_clusters",
    "render_compression",
    "render_forecast",
    "render_merge",
    "render_probe",
    "render_series",
    "render_unlearning",
    "render_upgrade",
]
