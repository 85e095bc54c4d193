"""One protocol a system: real data, baselines, the paper's claim, and a bar that can fail."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
