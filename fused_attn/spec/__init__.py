"""The definitions that every layer shares: a validated call (`problem`), masks, ragged batches, caches, dropout."""
