"""What every room stands on: the doors of arrays and estimators, files and tables in them, optional dependencies."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
