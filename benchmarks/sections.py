"""The cases and variants in each section of the joint update's benchmark."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

from benchmarks.cases import Case
from benchmarks.cases import Spec
from mtl_jax import models

_TASKS = (1, 2, 3, 5, 10, 20, 40)
_WIDE = (512, 512)
# Two layers with these widths on 36x36 images: 10^5, 10^6, 10^7, 10^8
# parameters.
_WIDTHS = (70, 540, 2580, 9370)


class Group(NamedTuple):
  """Variants of one case, which take turns."""

  case: Case
  specs: tuple[Spec, ...]


def all_sections() -> dict[str, list[Group]]:
  """The sections by name, `{section: groups}`."""
  ours = lambda *methods: [Spec('ours', m) for m in methods]
  torch = lambda *methods: [Spec('pytorch', m) for m in methods]
  lenet = lambda tasks, batch: Case('lenet', tasks, batch)
  mlp = lambda tasks, batch, widths=_WIDE: Case(
    'mlp', tasks, batch, options={'widths': widths}
  )
  pair = (
    *ours('plain', 'flat cagrad'),
    *torch('plain', 'flat cagrad'),
  )

  goals = (
    *ours('plain', 'linear', 'flat linear', 'flat cagrad'),
    # XLA counts one round of a loop, so operations come from this variant.
    Spec('ours', 'flat cagrad', 'unroll'),
    *torch('plain', 'flat linear', 'flat cagrad'),
  )
  # Only the MLP's layers give it something to save.
  ghost = Spec('ours', 'flat cagrad', 'ghost')
  peers = ('upgrad', 'mgda', 'pcgrad')
  torchjd = (*ours(*peers), *(Spec('torchjd', m) for m in peers))
  sam = (*ours('plain', 'sam'), Spec('optax', 'sam'))
  return {
    'goals': [
      Group(lenet(2, 256), goals),
      Group(Case('resnet18', 2, 64), goals),
      Group(mlp(10, 256), (*goals, ghost)),
    ],
    'peers': [
      Group(lenet(2, 256), torchjd),
      Group(mlp(10, 256), torchjd),
      Group(lenet(1, 256), sam),
      Group(mlp(1, 256), sam),
    ],
    'tasks': [
      Group(make(tasks, batch), specs)
      for make, batch, specs in (
        (mlp, 128, (*pair, ghost)),
        (lenet, 64, pair),
      )
      for tasks in _TASKS
    ],
    'parameters': [
      *(Group(mlp(2, 64, (width, width)), pair) for width in _WIDTHS),
      Group(lenet(2, 64), pair),
      Group(Case('resnet18', 2, 64), pair),
      # 81 patches an image: a batch of 64 would take minutes on two cores.
      *(
        [Group(Case('vit_s', 2, 8), tuple(ours('plain', 'flat cagrad')))]
        if _is_registered('vit_s')
        else []
      ),
    ],
    'batch': [
      Group(make(2, batch), specs)
      for make, specs in ((mlp, (*pair, ghost)), (lenet, pair))
      for batch in (16, 64, 256, 1024)
    ],
    'engines': [
      Group(
        case,
        (
          Spec('ours', 'plain'),
          *(
            Spec('ours', method, engine)
            for method in ('linear', 'flat cagrad')
            for engine in ('auto', 'unroll', 'vmap', 'scan')
          ),
        ),
      )
      for case in (lenet(2, 64), mlp(2, 256), mlp(10, 256))
    ],
    'dtypes': [
      Group(
        case,
        tuple(
          Spec('ours', method, dtype=dtype)
          for method in ('plain', 'flat cagrad')
          for dtype in ('float32', 'bfloat16')
        ),
      )
      for case in (lenet(2, 256), mlp(10, 256))
    ],
  }


def quick(sections: Mapping[str, Sequence[Group]]) -> dict[str, list[Group]]:
  """The same sections at sizes that take seconds, to check that they work.

  Args:
    sections: the result of `all_sections`.

  Returns:
    From each section one group for each set of variants, with the MLP, and the
    ViT's group; from the goals every model's group. Models and batches are
    small, with at most three tasks.
  """
  found = {}
  for name, groups in sections.items():
    small = {}
    for group in groups:
      case = group.case
      if name == 'goals' or case.model in ('mlp', 'vit_s'):
        small[case.model, group.specs] = group._replace(
          case=dataclasses.replace(
            case,
            tasks=min(case.tasks, 3),
            batch=8,
            image_shape=_SMALL_IMAGE,
            options=_SMALL[case.model],
          )
        )
    found[name] = list(small.values())
  return found


_SMALL_IMAGE = (20, 20, 1)
_SMALL = {
  'mlp': {'widths': (16, 8)},
  'lenet': {},
  'resnet18': {'widths': (4, 8), 'blocks': (1, 1), 'features': 8},
  'vit_s': {'width': 8, 'blocks': 1, 'heads': 2, 'hidden': 8},
}


def _is_registered(model: str) -> bool:
  try:
    models.by_name(model)
  except ValueError:  # The registry's answer for a name it lacks.
    return False
  return True
