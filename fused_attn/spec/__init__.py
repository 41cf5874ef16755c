"""The definitions that every layer shares: a validated call (`problem`), masks, ragged batches, caches, dropout."""

from typing import TYPE_CHECKING

from ..deprecated import names_of

if not TYPE_CHECKING:
    __getattr__ = names_of(__name__, "problem", "dropout")
