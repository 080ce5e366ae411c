"""Trunks by name, for configs."""

from collections.abc import Mapping
import difflib
from typing import Any

from flax import linen as nn

from mtl_jax.models import lenet
from mtl_jax.models import mlp
from mtl_jax.models import resnet
from mtl_jax.models import vit

_TRUNKS = {
  'lenet': lenet.LeNet,
  'mlp': mlp.MLP,
  'resnet18': resnet.ResNet,
  'vit_s': vit.ViT,
}


def by_name(name: str, **kwargs) -> nn.Module:
  """The trunk of that name.

  Args:
    name: `'lenet'`, `'mlp'`, `'resnet18'` or `'vit_s'`.
    **kwargs: attributes of `LeNet`, `MLP`, `ResNet` or `ViT`.

  Returns:
    The module, for `make_model`.

  Raises:
    ValueError: if there is no trunk of that name; it tells the nearest.
  """
  return get(_TRUNKS, name, 'model')(**kwargs)


def get(table: Mapping[str, Any], name: str, what: str) -> Any:
  """`table[name]`, or a ValueError that tells the nearest names."""
  if name not in table:
    near = difflib.get_close_matches(str(name), table, cutoff=0.4)
    hint = f'; did you mean {" or ".join(map(repr, near))}?' if near else ''
    raise ValueError(
      f'unknown {what} {name!r}, expected one of {sorted(table)}{hint}'
    )
  return table[name]
