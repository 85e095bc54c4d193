"""Worlds that move: latent dynamics, and the losses that keep latent states from collapsing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
