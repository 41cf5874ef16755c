"""Layers with parameters: a drop-in `torch.nn.MultiheadAttention`, and attention with learned scores.

Masks follow torch.nn: True means that a key is ignored, and float masks are added to the scores.

>>> import torch, fused_attn
>>> layer = fused_attn.modules.MultiheadAttention(64, 8, batch_first=True)
>>> x = torch.randn(2, 128, 64)
>>> out, _ = layer(x, x, x, need_weights=False)
"""

from .multihead import MultiheadAttention
from .scored import AdditiveAttention, BilinearAttention, CosineAttention

__all__ = ["AdditiveAttention", "BilinearAttention", "CosineAttention", "MultiheadAttention"]
