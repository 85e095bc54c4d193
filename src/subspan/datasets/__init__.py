"""Data and pretrained models: bundled, installed, in a local folder, or in their original formats."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
