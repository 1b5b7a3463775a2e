"""Modules that take the place of torch's own, with the same parameters and state dicts."""

from fastgan.nn import functional
from fastgan.nn.attention import MultiheadAttention
from fastgan.nn.container import Sequential
from fastgan.nn.conv import Conv2d, ConvTranspose2d
from fastgan.nn.dropout import Dropout
from fastgan.nn.embedding import Embedding
from fastgan.nn.gan_loss import DiscriminatorHeadLoss
from fastgan.nn.layer_norm import DropoutAddLayerNorm
from fastgan.nn.linear import Linear
from fastgan.nn.linear_cross_entropy import LinearCrossEntropyLoss
from fastgan.nn.norm_act import BatchNormAct2d

__all__ = [
    "BatchNormAct2d",
    "Conv2d",
    "ConvTranspose2d",
    "DiscriminatorHeadLoss",
    "Dropout",
    "DropoutAddLayerNorm",
    "Embedding",
    "Linear",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "Sequential",
    "functional",
]
