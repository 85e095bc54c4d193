"""The report: what is in a set of embeddings and what can be done with it, as facts and as one HTML page."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
