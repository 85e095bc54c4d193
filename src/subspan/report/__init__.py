"""Pages (HTML): of a set of embeddings, of clusters, of an upgrade; each complete in itself."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
