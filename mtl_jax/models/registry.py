"""Trunks by name, for configs."""

from collections.abc import Mapping
import difflib
from typing import Any

from flax import linen as nn

from mtl_jax.models import arguments
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
# Attributes of every flax module, and those that the trainer sets.
_HIDDEN = ('parent', 'name', 'batch_norm_axis')


def by_name(name: str, /, **kwargs: Any) -> nn.Module:
  """The trunk with that name.

  Args:
    name: `'lenet'`, `'mlp'`, `'resnet18'` or `'vit_s'`.
    **kwargs: attributes of `LeNet`, `MLP`, `ResNet` or `ViT`.

  Returns:
    The module, for `make_model`.

  Raises:
    ValueError: if there is no trunk with that name (the message names the
      nearest), or if an argument is unknown, of the wrong type or too small.
  """
  trunk = get(_TRUNKS, name, 'model')
  arguments.check_arguments('model.kwargs', name, trunk, kwargs, hidden=_HIDDEN)
  for key, value in kwargs.items():
    least = 0 if key == 'blocks' else 1
    for size in value if isinstance(value, list | tuple) else (value,):
      if isinstance(size, int) and size < least:
        raise ValueError(
          f'model.kwargs.{key} of {name!r} must be {least} or more, got {value}'
        )
  return trunk(**kwargs)


def get(table: Mapping[str, Any], name: str, what: str) -> Any:
  """`table[name]`, or a ValueError with the nearest names."""
  if name not in table:
    near = difflib.get_close_matches(str(name), table, cutoff=0.4)
    hint = f'did you mean {" or ".join(map(repr, near))}? ' if near else ''
    raise ValueError(
      f'unknown {what} {name!r}; {hint}expected one of {sorted(table)}'
    )
  return table[name]
