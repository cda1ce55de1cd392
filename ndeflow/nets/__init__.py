"""Networks: plain modules `net(t, x, cond)` that know nothing of paths, solvers or training."""

from ndeflow.nets.embeddings import ConditionEmbedding, TimeEmbedding
from ndeflow.nets.mlp import MLP
from ndeflow.nets.unet import UNet

__all__ = ["MLP", "ConditionEmbedding", "TimeEmbedding", "UNet"]
