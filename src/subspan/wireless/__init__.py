"""Channels of many antennas: codebooks of beams, fingerprints of beam powers, and subspaces predicted from them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
