"""The definitions that every layer shares: a validated call (`problem`), masks, ragged batches, caches, dropout."""

from ..deprecated import names_of

__getattr__ = names_of(__name__, "problem", "dropout")
