"""The PyTorch fallback: attention tile by tile, on any device, with memory linear in the sequence length."""
