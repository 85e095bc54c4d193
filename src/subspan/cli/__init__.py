"""The command `subspan`: one verb a task, the report, and the reproductions. Parses and prints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
