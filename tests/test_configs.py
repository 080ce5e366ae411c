"""Configs say what they stand for, and wrong words get the right ones."""

import inspect
import pathlib

import pytest

from configs import common
from configs import methods
from configs import multi_digits
from configs import multi_mnist
from mtl_jax import models
from mtl_jax import problems
from mtl_jax import transforms
from mtl_jax.train import build
from mtl_jax.train import checks

_CONFIGS = {'multi_digits': multi_digits, 'multi_mnist': multi_mnist}
_NAMES = methods.NAMES
# What needs functions, and what is no method by itself.
_NO_ENTRY = {
  'scheduled_weights',
  *('after_step', 'default_labels', 'diagnostics', 'every', 'flat_minima'),
  'left_out',
  *('from_gram', 'per_group', 'shared_only', 'skip_nonfinite', 'weighted'),
}


@pytest.mark.parametrize('name', _NAMES)
@pytest.mark.parametrize('config', _CONFIGS)
def test_every_method_of_every_config_can_be_built(config, name):
  values = _CONFIGS[config].get_config(f'method={name}')
  tasks = problems.by_name(values.problem).task_names
  joint = build.joint_update(values, tasks, steps_per_epoch=5)
  joint.init({'shared': {}, 'heads': {task: {} for task in tasks}})
  build.optimizer(values, total_steps=10)
  assert (values.method.flat is not None) == name.startswith('f_')
  assert values.method.name == name


# Arguments that no text of a command line stands for, and those of the trainer.
_NO_KEY = {
  *('seed', 'num_tasks', 'axis_name', 'shard_axis', 'reduce'),
  *('optimizer', 'aggregator', 'kpi', 'steps_per_epoch'),
}


@pytest.mark.parametrize('name', methods.METHODS)
def test_config_holds_every_argument_at_the_factorys_default(name):
  config = multi_digits.get_config(f'method={name}').method
  factory = getattr(transforms, config.aggregator or config.weighting)
  parameters = inspect.signature(factory).parameters
  assert set(config.kwargs) == set(parameters) - _NO_KEY
  entry = methods.METHODS[name]
  told = {**entry.get('kwargs', {}), **entry.get('plain', {})}
  for key, value in config.kwargs.items():
    default = told.get(key, parameters[key].default)
    assert value == default and type(value) is type(default)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('cagrad', {'name': 'pcgrad'}, "name is 'pcgrad', where method=cagrad"),
    ('cagrad', {'name': 'f_cagrad'}, "name is 'f_cagrad'"),
    ('cagrad', {'aggregator': 'pcgrad'}, "aggregator is 'pcgrad'"),
    ('cagrad', {'weighting': 'dwa'}, "weighting is 'dwa'"),
    ('f_cagrad', {'flat': None}, 'flat is False'),
    ('mgda_l2', {'kwargs': {'normalization': 'loss'}}, "'normalization': 'l2'"),
    ('stl', {'sharing': 'shared'}, "model.sharing is 'shared'"),
  ],
)
def test_run_that_is_not_of_the_method_it_is_called_by_is_refused(
  name, change, message
):
  config = multi_digits.get_config(f'method={name}').unlock()
  checks.check_config(config)
  part = config.model if 'sharing' in change else config.method
  for key, value in change.items():
    part[key] = value
  with pytest.raises(ValueError, match=message):
    checks.check_config(config)


def test_config_has_the_entries_that_are_asked_of_one():
  config = multi_digits.get_config()
  checks.check_config(config)
  for group, entries in checks.ENTRIES.items():
    own = set(config[group]) if group else set(config)
    # Own configs may do without these.
    assert own - {'stands_for', 'clip_shared'} == set(entries)
  with config.unlocked():
    del config.parallel['batch_norm']
  with pytest.raises(ValueError, match=r"no entry 'parallel\.batch_norm'"):
    checks.check_config(config)


def test_seed_that_jax_cannot_take_is_refused():
  config = multi_digits.get_config()
  config.seed = 2**63 - 1
  checks.check_config(config)
  for seed in (2**63, 99999999999999999999, -1):
    config.seed = seed
    with pytest.raises(ValueError, match=rf'seed must be .* got {seed}'):
      checks.check_config(config)


def test_every_method_of_the_package_has_an_entry():
  # Factories whose first words are methods of the literature.
  in_package = {name for name in transforms.__all__ if name.islower()}
  entries = {
    values.get('aggregator') or values['weighting']
    for values in methods.METHODS.values()
  }
  assert in_package - _NO_ENTRY == entries


@pytest.mark.parametrize('name', ['nash_mtl', 'fairgrad'])
def test_method_of_degree_zero_has_none_of_it_inside_flat_minima(name):
  plain, flat = methods.entry(name), methods.entry(f'f_{name}')
  assert plain['kwargs']['scale'] == 'paper'
  assert plain['head_scale'] == 'weights'
  assert flat['kwargs']['scale'] == 'norm'
  assert flat['head_scale'] is flat['clip_shared'] is None


@pytest.mark.parametrize('config', _CONFIGS)
def test_networks_are_separate_for_single_task_methods_only(config):
  for name in _NAMES:
    sharing = _CONFIGS[config].get_config(f'method={name}').model.sharing
    assert sharing == ('separate' if name in ('stl', 'f_stl') else 'shared')


def test_multi_mnist_has_the_values_of_the_papers_scripts():
  config = multi_mnist.get_config('method=f_cagrad')
  assert config.model.name == 'resnet18'
  assert config.optimizer.learning_rate == 1e-3
  assert (config.batch_size, config.epochs) == (256, 200)
  assert config.method.kwargs.c == 0.4
  flat = config.method.flat
  assert (flat.rho, flat.adaptive, flat.norm) == (2.0, True, 'joint')


@pytest.mark.parametrize(
  'argument',
  [
    *('dataset=multi_fashion', 'dataset=multi_fashion_and_mnist'),
    *('model=lenet', 'runlocal', 'model=lenet,runlocal'),
  ],
)
def test_variants_of_multi_mnist_name_problems_and_models_there_are(argument):
  config = multi_mnist.get_config(argument)
  assert problems.by_name(config.problem).name == config.problem
  models.by_name(config.model.name, **config.model.kwargs)
  if 'dataset' in argument:
    assert config.problem == argument.removeprefix('dataset=')
  if 'model' in argument:
    assert config.model.name == 'lenet'


@pytest.mark.parametrize('config', _CONFIGS)
def test_runlocal_needs_no_data_and_few_steps(config):
  values = _CONFIGS[config].get_config('runlocal')
  problem = problems.by_name(values.problem)
  source = problem.load('train', kind=values.data.kind)
  assert values.data.kind == 'synthetic'
  assert values.epochs * len(source) // values.batch_size <= 200


@pytest.mark.parametrize(
  ('get_config', 'argument', 'message'),
  [
    (multi_digits, 'method=cagard', "'cagard'.*did you mean 'cagrad'"),
    (multi_digits, 'method=f_linaer', "did you mean 'f_linear'"),
    (multi_digits, 'sed=1', "argument 'sed'.*did you mean 'seed'"),
    (multi_digits, 'seed=x', "'seed' must be an integer, got 'x'"),
    (multi_digits, 'runlocal=2', "'runlocal' is true or false, got '2'"),
    (multi_digits, 'seed=1,seed=2', "'seed' is given twice"),
    (multi_mnist, 'dataset=mnist', "did you mean 'multi_mnist'"),
    (multi_mnist, 'model=resnet', "did you mean 'resnet18'"),
  ],
)
def test_wrong_argument_is_an_error_with_the_nearest_names(
  get_config, argument, message
):
  with pytest.raises(ValueError, match=message):
    get_config.get_config(argument)


def test_arguments_have_the_type_of_their_defaults():
  args = common.parse_arguments(
    'a=3,b=0.5, c=x,d', a=1, b=1.0, c='', d=False, e='kept'
  )
  assert args.to_dict() == {'a': 3, 'b': 0.5, 'c': 'x', 'd': True, 'e': 'kept'}


def test_key_that_is_not_there_cannot_be_set():
  config = multi_digits.get_config()
  with pytest.raises(AttributeError, match='epochs'):
    config.epoch = 3


@pytest.mark.parametrize('config', _CONFIGS)
def test_config_starts_with_what_it_stands_for(config):
  text = pathlib.Path(_CONFIGS[config].__file__).read_text()
  head = text.split('"""')[1]
  for word in ('Stands for:', 'Command:', 'Hardware:', 'Time:', 'Expected'):
    assert word in head
