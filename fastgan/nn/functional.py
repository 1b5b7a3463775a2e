"""The public functions, with torch's own names and signatures.

What a caller can get wrong is refused here, by shapes and dtypes alone so that ``torch.compile`` traces through.
"""

from fastgan.nn._functional.attention import scaled_dot_product_attention, varlen_attention
from fastgan.nn._functional.convolution import conv2d, conv_transpose2d
from fastgan.nn._functional.layers import dropout, embedding, gelu, linear
from fastgan.nn._functional.losses import (
    conv_bce_with_logits,
    conv_gan_loss,
    gan_loss_with_logits,
    linear_cross_entropy,
)
from fastgan.nn._functional.normalization import batch_norm_act, dropout_add_layer_norm

__all__ = [
    "batch_norm_act",
    "conv2d",
    "conv_bce_with_logits",
    "conv_gan_loss",
    "conv_transpose2d",
    "dropout",
    "dropout_add_layer_norm",
    "embedding",
    "gan_loss_with_logits",
    "gelu",
    "linear",
    "linear_cross_entropy",
    "scaled_dot_product_attention",
    "varlen_attention",
]
