"""The vocabulary: a validated call (`problem`), masks, ragged batches, caches, dropout. Imports torch alone."""
