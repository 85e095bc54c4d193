"""What is inside a network: where something is represented, and whether two networks represent it alike."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
