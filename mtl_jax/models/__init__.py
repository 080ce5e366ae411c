"""Trunks and multi-task models as pure `init` and `apply` functions."""

from mtl_jax.models.compute_dtype import in_dtype as in_dtype
from mtl_jax.models.intercept import intercept_dense as intercept_dense
from mtl_jax.models.layers import native_layers as native_layers
from mtl_jax.models.lenet import LeNet as LeNet
from mtl_jax.models.mlp import MLP as MLP
from mtl_jax.models.multi_task import make_model as make_model
from mtl_jax.models.registry import by_name as by_name
from mtl_jax.models.resnet import ResNet as ResNet
from mtl_jax.models.vit import ViT as ViT
