"""What is measured: retrieval, neighbours, clusterings, agreement of representations, anomaly maps, intervals."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
