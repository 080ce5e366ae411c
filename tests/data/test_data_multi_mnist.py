"""The builder on tiny sources whose images show their own number.

A base image shows its number in its first and in its last pixel. As the first
of a pair its first pixel is seen, as the second its last: the other image can
lie on neither.
"""

import functools
import gzip
import http.server
import struct
import sys
import threading

import numpy as np
import pytest

from mtl_jax.data import idx
from mtl_jax.data import multi_mnist
from mtl_jax.data import multi_mnist_builder
from mtl_jax.data import pairs
from mtl_jax.data import prepare

_NUM_TRAIN, _NUM_TEST = 60, 20
# The numbers of training images start at 1, those of test images at 101.
_TEST_FROM = 101


def _write_source(folder, name, seed=0, num_train=_NUM_TRAIN):
  """Writes tiny files of a dataset; returns {'train', 'test'} base images."""
  rng = np.random.default_rng([seed, len(name)])
  base = {}
  for part, size, start in (
    ('train', num_train, 1),
    ('t10k', _NUM_TEST, _TEST_FROM),
  ):
    images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
    images[:, 0, 0] = images[:, 27, 27] = np.arange(start, start + size)
    labels = rng.integers(0, 10, size, dtype=np.uint8)
    base['test' if part == 't10k' else part] = pairs.BaseImages(images, labels)
    (folder / name).mkdir(parents=True, exist_ok=True)
    for kind, array in (('images-idx3', images), ('labels-idx1', labels)):
      header = struct.pack(f'>HBB{array.ndim}I', 0, 8, array.ndim, *array.shape)
      path = folder / name / f'{part}-{kind}-ubyte.gz'
      path.write_bytes(gzip.compress(header + array.tobytes()))
  return base


@pytest.fixture(autouse=True)
def _no_source_from_the_environment(monkeypatch):
  monkeypatch.delenv('MTL_JAX_SOURCE_DIR', raising=False)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('source')
  bases = {name: _write_source(folder, name) for name in idx.URLS}
  return folder, bases


@pytest.fixture(scope='module')
def data_dir(source, tmp_path_factory):
  """Where 'multi_mnist' and 'multi_fashion_and_mnist' are prepared."""
  folder = tmp_path_factory.mktemp('data')
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv('MTL_JAX_SOURCE_DIR', raising=False)
    for name in ('multi_mnist', 'multi_fashion_and_mnist'):
      prepare.prepare(name, folder, source[0])
  return folder


def _numbers(arrays):
  """The numbers of the first and of the second image of each pair."""
  image = arrays['image'].astype(int)[..., 0]
  return image[:, 0, 0], image[:, 35, 35]


@pytest.mark.parametrize(
  'name, first, second',
  [
    ('multi_mnist', 'mnist', 'mnist'),
    ('multi_fashion_and_mnist', 'mnist', 'fashion_mnist'),
  ],
)
@pytest.mark.parametrize('split', ['train', 'test'])
def test_prepared_pairs_are_the_overlapped_base_images_with_their_labels(
  source, data_dir, name, first, second, split
):
  arrays = multi_mnist.load_multi_mnist(
    name, split, data_dir=data_dir, split_scheme='paper'
  ).arrays
  left, right = source[1][first][split], source[1][second][split]
  start = 1 if split == 'train' else _TEST_FROM
  i, j = (number - start for number in _numbers(arrays))
  for base in (i, j):  # Every base image twice in either position.
    assert (np.bincount(base, minlength=len(left.labels)) == 2).all()
  np.testing.assert_array_equal(
    arrays['image'][..., 0], pairs.overlap(left.images[i], right.images[j], 8)
  )
  np.testing.assert_array_equal(arrays['labels']['task_1'], left.labels[i])
  np.testing.assert_array_equal(arrays['labels']['task_2'], right.labels[j])
  assert arrays['image'].dtype == np.uint8
  assert arrays['labels']['task_1'].dtype == np.int32


def test_validation_and_training_pairs_share_no_base_image(data_dir):
  used = {}
  for split in ('train', 'validation', 'test'):
    arrays = multi_mnist.load_multi_mnist(
      'multi_mnist', split, data_dir=data_dir
    ).arrays
    used[split] = set(np.concatenate(_numbers(arrays)).tolist())
  assert len(used['validation']) == _NUM_TRAIN // 12
  assert not used['train'] & used['validation']
  assert used['train'] | used['validation'] == set(range(1, _NUM_TRAIN + 1))
  assert used['test'] == set(range(_TEST_FROM, _TEST_FROM + _NUM_TEST))


def test_preparing_again_changes_nothing_on_disk(source, data_dir):
  def state():
    files = [path for path in data_dir.rglob('*') if path.is_file()]
    return {
      path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files
    }

  before = state()
  for source_dir in (source[0], None):
    prepare.prepare('multi_mnist', data_dir, source_dir)
  assert state() == before


def test_the_same_source_gives_the_same_pairs_in_another_folder(
  source, data_dir, tmp_path
):
  prepare.prepare('multi_mnist', tmp_path, source[0])
  here, there = (
    multi_mnist.load_multi_mnist('multi_mnist', 'train', data_dir=folder).arrays
    for folder in (tmp_path, data_dir)
  )
  np.testing.assert_array_equal(here['image'], there['image'])


def test_a_dataset_made_of_other_files_is_not_taken_silently(
  data_dir, tmp_path, monkeypatch
):
  _write_source(tmp_path, 'mnist', seed=1)
  message = r'was not prepared from .*ubyte\.gz'
  with pytest.raises(ValueError, match=message):
    prepare.prepare('multi_mnist', data_dir, tmp_path)
  with pytest.raises(ValueError, match=message):
    multi_mnist.load_multi_mnist(
      'multi_mnist', 'test', data_dir=data_dir, source_dir=tmp_path
    )
  monkeypatch.setenv('MTL_JAX_SOURCE_DIR', str(tmp_path))
  with pytest.raises(ValueError, match=message):
    prepare.prepare('multi_mnist', data_dir)


def test_a_source_folder_without_the_files_is_an_error_even_when_prepared(
  data_dir, tmp_path
):
  with pytest.raises(FileNotFoundError, match=r'mnist: 4 of 4 source files'):
    prepare.prepare('multi_mnist', data_dir, tmp_path)


def test_examples_read_from_disk_equal_those_in_memory(data_dir):
  disk, memory = (
    multi_mnist.load_multi_mnist(
      'multi_mnist', 'test', data_dir=data_dir, storage=storage
    )
    for storage in ('disk', 'memory')
  )
  assert len(disk) == len(memory) == 2 * _NUM_TEST
  indices = np.array([7, 0, 39, 7])
  ours, theirs = disk.__getitems__(indices), memory.__getitems__(indices)
  np.testing.assert_array_equal(ours['image'], theirs['image'])
  for group in ('labels', 'mask'):
    for task in multi_mnist.TASK_NAMES:
      np.testing.assert_array_equal(ours[group][task], theirs[group][task])
      assert ours[group][task].dtype == theirs[group][task].dtype


def test_loading_what_is_not_prepared_shows_the_command_that_prepares(tmp_path):
  with pytest.raises(FileNotFoundError) as error:
    multi_mnist.load_multi_mnist(
      'multi_fashion', 'train', data_dir=tmp_path, source_dir='raw'
    )
  assert str(error.value).endswith(
    'python -m mtl_jax.data.prepare --dataset=multi_fashion '
    f'--data_dir={tmp_path} --source_dir=raw'
  )


def test_the_papers_split_has_no_validation_and_says_why(data_dir):
  with pytest.raises(ValueError, match=r"trains on all base images.*'holdout'"):
    multi_mnist.load_multi_mnist(
      'multi_mnist', 'validation', data_dir=data_dir, split_scheme='paper'
    )


@pytest.mark.parametrize(
  'name, split, options, message',
  [
    ('multi_cifar', 'train', {}, "name.*'multi_cifar'"),
    ('multi_mnist', 'dev', {}, "split must be.*'dev'"),
    ('multi_mnist', 'train', {'split_scheme': 'k'}, "split_scheme.*'k'"),
    ('multi_mnist', 'train', {'storage': 'tape'}, "storage.*'tape'"),
  ],
)
def test_unknown_choices_are_refused_by_name(
  data_dir, name, split, options, message
):
  with pytest.raises(ValueError, match=message):
    multi_mnist.load_multi_mnist(name, split, data_dir=data_dir, **options)


def test_an_interrupted_preparation_is_not_taken_for_a_dataset(
  source, tmp_path, monkeypatch
):
  make = pairs.paired_examples
  calls = []

  def interrupted(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:  # Two splits are written, the third is not.
      raise KeyboardInterrupt
    return make(*args, **kwargs)

  monkeypatch.setattr(pairs, 'paired_examples', interrupted)
  with pytest.raises(KeyboardInterrupt):
    prepare.prepare('multi_mnist', tmp_path, source[0])
  with pytest.raises(FileNotFoundError, match='has not been prepared'):
    multi_mnist.load_multi_mnist('multi_mnist', 'train', data_dir=tmp_path)
  prepare.prepare('multi_mnist', tmp_path, source[0])
  loaded = multi_mnist.load_multi_mnist(
    'multi_mnist', 'test', data_dir=tmp_path
  )
  assert len(loaded) == 2 * _NUM_TEST


def test_of_two_preparations_at_once_the_later_takes_the_earliers_result(
  source, tmp_path, monkeypatch
):
  builder = multi_mnist_builder.MultiMnist
  write = builder._download_and_prepare
  written = []

  def overtaken(self, *args, **kwargs):
    write(self, *args, **kwargs)
    if not written:
      written.append(None)
      written[0] = prepare.prepare('multi_mnist', tmp_path, source[0])

  monkeypatch.setattr(builder, '_download_and_prepare', overtaken)
  assert prepare.prepare('multi_mnist', tmp_path, source[0]) == written[0]
  folders = [path.name for path in (tmp_path / 'multi_mnist').rglob('*.0.0')]
  assert folders == ['1.0.0']


def test_a_source_file_cut_short_is_named_and_nothing_is_prepared(tmp_path):
  _write_source(tmp_path / 'raw', 'mnist')
  path = tmp_path / 'raw' / 'mnist' / f'{idx.TEST_IMAGES}.gz'
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r't10k-images.*cut short'):
    prepare.prepare('multi_mnist', tmp_path / 'data', tmp_path / 'raw')
  assert not list(tmp_path.rglob('*array_record*'))


def test_datasets_of_different_sizes_cannot_be_paired(tmp_path):
  _write_source(tmp_path / 'raw', 'mnist')
  _write_source(tmp_path / 'raw', 'fashion_mnist', num_train=40)
  with pytest.raises(ValueError, match=r"'mnist': 60, 'fashion_mnist': 40"):
    prepare.prepare(
      'multi_fashion_and_mnist', tmp_path / 'data', tmp_path / 'raw'
    )


def test_nothing_is_printed_and_tensorflow_is_not_asked_for(
  source, tmp_path, monkeypatch, capfd
):
  asked = []

  class Watch:
    def find_spec(self, name, path=None, target=None):
      if name.partition('.')[0] == 'tensorflow':
        asked.append(name)

  monkeypatch.setattr(sys, 'meta_path', [Watch(), *sys.meta_path])
  prepare.prepare('multi_mnist', tmp_path, source[0])
  loaded = multi_mnist.load_multi_mnist(
    'multi_mnist', 'test', data_dir=tmp_path
  )
  loaded.__getitems__(np.arange(4))
  assert not asked and 'tensorflow' not in sys.modules
  assert capfd.readouterr() == ('', '')


@pytest.fixture
def served(source, monkeypatch):
  """The tiny source on a server of this machine, in place of the originals."""

  class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  handler = functools.partial(Handler, directory=source[0])
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f'http://127.0.0.1:{server.server_port}/mnist/'
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    monkeypatch.setitem(idx.URLS, 'mnist', url)
    yield url
    server.shutdown()
    thread.join()


def test_without_a_source_folder_the_files_are_downloaded(
  source, data_dir, served, tmp_path, monkeypatch
):
  found = idx.find_source(source[0], 'mnist')
  monkeypatch.setitem(
    idx.SHA256, 'mnist', {k: idx.fingerprint(p) for k, p in found.items()}
  )
  prepare.prepare('multi_mnist', tmp_path)
  here, there = (
    multi_mnist.load_multi_mnist('multi_mnist', 'test', data_dir=folder).arrays
    for folder in (tmp_path, data_dir)
  )
  np.testing.assert_array_equal(here['image'], there['image'])


def test_a_download_that_is_not_the_original_is_refused(served, tmp_path):
  with pytest.raises(
    ValueError, match=f'{served}.*is not the original file: the SHA-256'
  ):
    prepare.prepare('multi_mnist', tmp_path)


def test_without_network_and_source_the_error_says_what_to_do(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  monkeypatch.setitem(idx.URLS, 'mnist', 'http://127.0.0.1:9/mnist/')
  with pytest.raises(ConnectionError) as error:
    prepare.prepare('multi_mnist', tmp_path)
  message = str(error.value)
  assert 'http://127.0.0.1:9/mnist/' in message
  assert '--source_dir or MTL_JAX_SOURCE_DIR' in message


def test_the_command_prepares_and_says_where(
  source, tmp_path, monkeypatch, capsys
):
  monkeypatch.setenv('MTL_JAX_SOURCE_DIR', str(source[0]))
  prepare.main([f'--data_dir={tmp_path}', '--dataset=multi_mnist'])
  assert f'multi_mnist is ready in {tmp_path}' in capsys.readouterr().out
  assert multi_mnist.is_prepared(
    multi_mnist.make_builder('multi_mnist', tmp_path)
  )


def test_the_command_ends_with_status_1_and_the_reason(tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    prepare.main([f'--data_dir={tmp_path}', f'--source_dir={tmp_path}'])
  assert ended.value.code == 1
  assert '4 of 4 source files are missing' in capsys.readouterr().err
