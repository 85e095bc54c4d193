"""What several protocols work with: pictures and their features, sentence pairs, small networks, a shared space."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
