"""PyTorch peers: the paper's algorithm from its equations, and TorchJD.

They use eager mode, float32 and all cores, as an ordinary user would write
them. T backward passes go through one retained graph. Then for each task the
step perturbs, runs the model again, differentiates the task's own loss and
restores. Gradients are flattened into a matrix [T, P], and Adam follows.

References:
  Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
  Regions <https://arxiv.org/abs/2211.13723>`_, 2022, Algorithm 1
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib

import numpy as np
import scipy.optimize
import torch
from torch import nn
from torch.nn import functional
from torchjd import aggregation
from torchjd import autojac

from benchmarks import cases
from benchmarks import torch_models
from mtl_jax import types

_TORCHJD = {
  'mgda': aggregation.MGDA,
  'pcgrad': aggregation.PCGrad,
  'upgrad': aggregation.UPGrad,
}


def variant(
  case: cases.Case, spec: cases.Spec, params: types.Params, device: str
) -> cases.Variant:
  """A PyTorch train step for the case.

  Args:
    case: the case.
    spec: with library `'pytorch'` or `'torchjd'`.
    params: the project's initial parameters, NumPy arrays.
    device: `'cpu'` or `'cuda'`.

  Returns:
    The variant.
  """
  # Full float32, like JAX's precision 'highest'.
  torch.backends.cudnn.allow_tf32 = False
  torch.backends.cuda.matmul.allow_tf32 = False
  model, image, labels = _prepared(case, params, device, torch.float32)
  optimizer = torch.optim.Adam(model.parameters(), cases.LEARNING_RATE)
  fill = _filler(spec)

  def step():
    optimizer.zero_grad()
    losses = fill(model, image, labels)
    optimizer.step()
    return losses

  def run(count):
    for _ in range(count):
      step()
    if device == 'cuda':
      torch.cuda.synchronize()

  return cases.Variant(spec, lambda: _first(step(), model), run, {})


def in_float64(
  case: cases.Case, spec: cases.Spec, params: types.Params
) -> cases.First:
  """Results of a variant's first step in float64, on the CPU."""
  model, image, labels = _prepared(case, params, 'cpu', torch.float64)
  return _first(_filler(spec)(model, image, labels), model)


def _prepared(case, params, device, dtype):
  """The model, the images [B, C, H, W] and the labels of each task."""
  model = torch_models.make(case, params, device).to(dtype)
  batch = cases.batch_of(case)
  image = torch.from_numpy(batch['image'].transpose(0, 3, 1, 2).copy())
  labels = [
    torch.from_numpy(label.astype(np.int64)).to(device)
    for label in batch['labels'].values()
  ]
  return model, image.to(device, dtype), labels


def _first(losses, model):
  return cases.First(
    torch.stack(losses).detach().cpu().numpy(),
    {
      name: parameter.grad.detach().cpu().numpy()
      for name, parameter in model.named_parameters()
    },
  )


def _filler(spec) -> Callable[..., list[torch.Tensor]]:
  """A function `(model, image, labels) -> losses` that fills `.grad`."""
  if spec.library == 'torchjd':
    aggregator = _TORCHJD[spec.method]()
    return lambda *args: _torchjd(aggregator, *args)
  if spec.method == 'plain':
    return _plain
  aggregate = _AGGREGATES[spec.method.removeprefix('flat ')]
  if spec.method.startswith('flat '):
    return lambda *args: _flat(aggregate, *args)
  raise ValueError(f'no PyTorch step is written for method {spec.method!r}')


def _losses(model, features, labels):
  return [
    functional.cross_entropy(head(features), label)
    for head, label in zip(model.heads, labels, strict=True)
  ]


def _plain(model, image, labels):
  losses = _losses(model, model.shared(image), labels)
  (sum(losses) / len(losses)).backward()
  return losses


def _torchjd(aggregator, model, image, labels):
  features = model.shared(image)
  losses = _losses(model, features, labels)
  autojac.mtl_backward(losses, features=features)
  autojac.jac_to_grad(model.shared.parameters(), aggregator)
  return losses


def _flat(aggregate, model, image, labels):
  shared = list(model.shared.parameters())
  heads = [list(head.parameters()) for head in model.heads]
  losses = _losses(model, model.shared(image), labels)
  last = len(losses) - 1
  loss_grads, flat_grads = [], []
  grads = [
    torch.autograd.grad(loss, shared + head, retain_graph=i < last)
    for i, (loss, head) in enumerate(zip(losses, heads, strict=True))
  ]
  for i, head in enumerate(heads):
    on_shared, on_head = grads[i][: len(shared)], grads[i][len(shared) :]
    moved = shared + head
    before = [p.detach().clone() for p in moved]
    with torch.no_grad():
      for parameters, own in ((shared, on_shared), (head, on_head)):
        length = torch.sqrt(sum((g * g).sum() for g in own))
        for p, g in zip(parameters, own, strict=True):
          p.add_(g * (cases.RHO / (length + 1e-12)))
    with _statistics_at_rest(model):
      prediction = model.heads[i](model.shared(image))
    loss = functional.cross_entropy(prediction, labels[i])
    sam = torch.autograd.grad(loss, moved)
    with torch.no_grad():
      for p, old in zip(moved, before, strict=True):
        p.copy_(old)
    g, s = _flattened(on_shared), _flattened(sam[: len(shared)])
    loss_grads.append(g)
    flat_grads.append(s - g)
    for p, value in zip(head, sam[len(shared) :], strict=True):
      p.grad = value
  update = aggregate(torch.stack(loss_grads))
  update = update + aggregate(torch.stack(flat_grads))
  sizes = [p.numel() for p in shared]
  for p, piece in zip(shared, update.split(sizes), strict=True):
    p.grad = piece.view_as(p)
  return losses


def _flattened(grads: Sequence[torch.Tensor]) -> torch.Tensor:
  return torch.cat([g.reshape(-1) for g in grads])


@contextlib.contextmanager
def _statistics_at_rest(model: nn.Module) -> Iterator[None]:
  """Keeps BatchNorm's running statistics, which only the first pass moves."""
  norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
  usual = [norm.momentum for norm in norms]
  for norm in norms:
    norm.momentum = 0.0
  try:
    yield
  finally:
    for norm, momentum in zip(norms, usual, strict=True):
      norm.momentum = momentum


def _mean(stack: torch.Tensor) -> torch.Tensor:
  return stack.mean(0)


def _cagrad(stack: torch.Tensor) -> torch.Tensor:
  """CAGrad for a matrix [T, P]; its dual problem is solved on the host."""
  gram = (stack @ stack.T).double().cpu().numpy()
  weights = torch.as_tensor(cagrad_weights(gram, cases.C))
  return weights.to(stack) @ stack


def cagrad_weights(gram: np.ndarray, c: float) -> np.ndarray:
  """CAGrad's weights [T] for a Gram matrix [T, T], by SLSQP."""
  size = len(gram)
  mean = np.full(size, 1 / size)
  gram = gram / max(np.trace(gram), np.finfo(float).tiny)
  radius = c * np.sqrt(mean @ gram @ mean)

  def objective(w):
    along = gram @ w
    length = np.sqrt(max(w @ along, 1e-30))
    value = along @ mean + radius * length
    return value, gram @ mean + radius * along / length

  found = scipy.optimize.minimize(
    objective,
    mean,
    jac=True,
    bounds=[(0, 1)] * size,
    constraints={
      'type': 'eq',
      'fun': lambda w: w.sum() - 1,
      'jac': lambda w: np.ones_like(w),
    },
    method='SLSQP',
    options={'ftol': 1e-12},
  ).x
  length = np.sqrt(max(found @ gram @ found, 1e-30))
  return mean + radius / length * found


_AGGREGATES = {'linear': _mean, 'cagrad': _cagrad}
