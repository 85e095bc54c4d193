"""Maps between representation spaces: one modality onto another, one encoder onto another."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
