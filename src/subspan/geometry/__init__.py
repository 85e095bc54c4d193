"""What a subspace is, and how one is estimated: the ground floor of the library."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
