"""What `flat_minima` refuses, and how it says so."""

import jax
import jax.numpy as jnp
import optax
import pytest
import quadratics

import mtl_jax

NAMES = quadratics.NAMES
PROBLEM = quadratics.Quadratics.random()


@pytest.mark.parametrize(
  'argument, value, others',
  [
    ('rho', -0.05, {}),
    ('rho', float('nan'), {}),
    ('rho', float('inf'), {}),
    ('rho_heads', -1.0, {}),
    ('rho_heads', float('nan'), {}),
    ('eps', 0.0, {}),
    ('eps', -1e-12, {}),
    ('eps', float('nan'), {}),
    ('norm', 'both', {}),
    ('norm', None, {}),
    ('combine', 'sum', {}),
    ('head_scale', 'mean', {}),
  ],
)
def test_a_wrong_argument_is_named_with_its_value(argument, value, others):
  with pytest.raises(ValueError, match=rf'{argument} must .*got .?{value}'):
    mtl_jax.flat_minima(mtl_jax.linear(), NAMES, **{argument: value}, **others)


@pytest.mark.parametrize('combine', ['separate', 'direct'])
def test_a_combiner_without_use_is_refused(combine):
  with pytest.raises(ValueError, match=f'combiner has no use.*{combine}'):
    mtl_jax.flat_minima(
      mtl_jax.linear(), NAMES, combine=combine, combiner=mtl_jax.linear()
    )


@pytest.mark.parametrize('combine', ['second', 'each'])
@pytest.mark.parametrize(
  'combiner',
  [
    mtl_jax.pcgrad(),
    mtl_jax.linear(num_tasks=2),
    mtl_jax.mgda(num_tasks=3),
    mtl_jax.Aggregator(
      lambda params: params,
      lambda rows, state, params=None, **_: (
        jax.tree.map(lambda x: x.sum(axis=0), rows),
        state,
      ),
    ),
  ],
  ids=['a key', 'weights', 'weights of three', 'momentum'],
)
def test_a_combiner_with_state_is_refused(combiner, combine):
  with pytest.raises(ValueError, match='combiner must have no state'):
    mtl_jax.flat_minima(
      mtl_jax.linear(), NAMES, combine=combine, combiner=combiner
    ).init(PROBLEM.params)


@pytest.mark.parametrize(
  'names', [(), ('a', 'a'), ('a', 'shared'), ('a', 'frozen')]
)
def test_task_names_that_are_no_names_are_refused(names):
  with pytest.raises(ValueError, match='task_names must be distinct'):
    mtl_jax.flat_minima(mtl_jax.linear(), names)


def test_one_string_for_the_task_names_is_refused():
  with pytest.raises(TypeError, match="got the string 'depth'"):
    mtl_jax.flat_minima(mtl_jax.linear(), 'depth')


def test_labels_that_are_no_task_are_refused():
  tx = mtl_jax.flat_minima(mtl_jax.linear(), ('depth', 'normals'))
  with pytest.raises(ValueError, match=r'param_labels gives .segmentation.'):
    tx.init(PROBLEM.params)


def update(tx, *, task_grads=None, params=PROBLEM.params, **extra_args):
  return tx.update(
    PROBLEM.task_grads if task_grads is None else task_grads,
    tx.init(PROBLEM.params),
    params,
    **extra_args,
  )


TX = mtl_jax.flat_minima(mtl_jax.linear(), NAMES)


def test_an_update_without_params_is_refused():
  with pytest.raises(ValueError, match='needs params'):
    update(TX, params=None, grad_fn=PROBLEM.grad_fn)


def test_an_update_without_grad_fn_is_refused():
  with pytest.raises(ValueError, match='needs the keyword grad_fn'):
    update(TX)


def test_weights_for_heads_need_an_aggregator_that_shows_weights():
  def mean(task_grads, state, params=None, **_):
    del params
    return jax.tree.map(lambda g: jnp.mean(g, axis=0), task_grads), state

  tx = mtl_jax.flat_minima(
    mtl_jax.Aggregator(lambda _: optax.EmptyState(), mean),
    NAMES,
    head_scale='weights',
  )
  with pytest.raises(ValueError, match="head_scale='weights' needs"):
    tx.init(PROBLEM.params)


@pytest.mark.parametrize('active', [jnp.array(True), jnp.array([True, False])])
def test_active_must_have_one_entry_a_task(active):
  with pytest.raises(ValueError, match=r'active must have shape \(3,\)'):
    update(TX, grad_fn=PROBLEM.grad_fn, active=active)


def test_losses_must_have_one_entry_a_task():
  with pytest.raises(ValueError, match=r'losses must have shape \(3,\)'):
    update(TX, grad_fn=PROBLEM.grad_fn, losses=jnp.ones(2))


def without_task_axis(grads):
  return {**grads, 'shared': jax.tree.map(lambda g: g[0], grads['shared'])}


def of_two_tasks(grads):
  return {**grads, 'shared': jax.tree.map(lambda g: g[:2], grads['shared'])}


def heads_with_task_axis(grads):
  heads = jax.tree.map(lambda g: jnp.stack([g] * 3), grads['heads'])
  return {**grads, 'heads': heads}


def one_row_that_would_broadcast(grads):
  return {**grads, 'shared': jax.tree.map(lambda g: g[:1], grads['shared'])}


WRONG = [
  without_task_axis,
  of_two_tasks,
  heads_with_task_axis,
  one_row_that_would_broadcast,
]


@pytest.mark.parametrize('wrong', WRONG)
def test_task_gradients_of_wrong_shapes_are_refused(wrong):
  grads = wrong(PROBLEM.task_grads)
  with pytest.raises(ValueError, match=r'the task gradient at .* has shape'):
    update(TX, task_grads=grads, grad_fn=PROBLEM.grad_fn)


@pytest.mark.parametrize('wrong', WRONG)
def test_a_grad_fn_that_returns_wrong_shapes_is_refused(wrong):
  with pytest.raises(ValueError, match=r'the task gradient at .* has shape'):
    update(TX, grad_fn=lambda params: wrong(PROBLEM.grad_fn(params)))


def test_a_grad_fn_that_returns_another_tree_is_refused():
  with pytest.raises(ValueError, match='expected a tree of structure'):
    update(TX, grad_fn=lambda params: PROBLEM.grad_fn(params)['shared'])


def test_a_grad_fn_that_returns_what_task_grad_returns_is_refused():
  with pytest.raises(ValueError, match='expected a tree of structure'):
    update(TX, grad_fn=lambda p: (quadratics.losses(), PROBLEM.grad_fn(p)))
