"""The PyTorch fallback: attention tile by tile, on any device, in O(M + N) memory."""
