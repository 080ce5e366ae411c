import gzip
import struct

import numpy as np
import pytest

from mtl_jax.data import idx


def _idx_bytes(array, type_code=0x08):
  header = struct.pack('>HBB', 0, type_code, array.ndim)
  return header + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


@pytest.fixture
def images():
  return np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def _write(tmp_path, data, name='file-idx3-ubyte'):
  path = tmp_path / name
  path.write_bytes(data)
  return path


@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_plain_and_gzipped_files_are_read_whatever_their_name(
  tmp_path, images, pack
):
  path = _write(tmp_path, pack(_idx_bytes(images)))
  read = idx.read_idx(path, (None, 3, 4))
  np.testing.assert_array_equal(read, images)
  assert read.dtype == np.uint8


@pytest.mark.parametrize('pack', [bytes, gzip.compress])
@pytest.mark.parametrize('kept', [3, 10, 17, 30])
def test_a_file_cut_short_is_refused_by_name(tmp_path, images, pack, kept):
  path = _write(tmp_path, pack(_idx_bytes(images))[:kept])
  with pytest.raises(ValueError, match=path.name):
    idx.read_idx(path, (None, 3, 4))


def test_a_damaged_gzip_file_is_refused_by_name(tmp_path, images):
  data = bytearray(gzip.compress(_idx_bytes(images)))
  data[-6] ^= 0xFF  # In the checksum.
  path = _write(tmp_path, bytes(data))
  with pytest.raises(ValueError, match=f'{path.name}.*damaged'):
    idx.read_idx(path, (None, 3, 4))


def test_bytes_after_the_last_value_are_refused(tmp_path, images):
  path = _write(tmp_path, _idx_bytes(images) + b'x')
  with pytest.raises(ValueError, match='holds 25 values, expected 24'):
    idx.read_idx(path, (None, 3, 4))


def test_a_foreign_file_is_refused_with_what_it_starts_with(tmp_path):
  path = _write(tmp_path, b'\x89PNG\r\n\x1a\n and more')
  with pytest.raises(
    ValueError, match=r"not an IDX file.*'89 50 4e 47', expected '00 00 08 03'"
  ):
    idx.read_idx(path, (None, 3, 4))


def test_an_idx_file_of_another_type_or_rank_is_refused(tmp_path, images):
  path = _write(tmp_path, _idx_bytes(images.astype('>f4'), type_code=0x0D))
  with pytest.raises(ValueError, match=r'type 0x0d.*expected unsigned bytes'):
    idx.read_idx(path, (None, 3, 4))
  path = _write(tmp_path, _idx_bytes(images[0]))
  with pytest.raises(ValueError, match=r'with 2 dimensions, expected.*with 3'):
    idx.read_idx(path, (None, 3, 4))


def test_images_of_another_size_are_refused(tmp_path, images):
  path = _write(tmp_path, _idx_bytes(images))
  with pytest.raises(
    ValueError, match=r'shape \(2, 3, 4\), expected \(any, 28, 28\)'
  ):
    idx.read_idx(path, (None, 28, 28))


def test_labels_must_fit_the_images_and_the_classes(tmp_path, images):
  images_path = _write(tmp_path, _idx_bytes(images))
  few = _write(tmp_path, _idx_bytes(np.zeros(1, np.uint8)), 'few')
  with pytest.raises(ValueError, match=r'2 images and .*few 1 labels'):
    idx.read_images(images_path, few, image_shape=(3, 4))
  large = _write(tmp_path, _idx_bytes(np.array([3, 10], np.uint8)), 'large')
  with pytest.raises(ValueError, match='large holds the label 10'):
    idx.read_images(images_path, large, image_shape=(3, 4))
  base = idx.read_images(images_path, large, image_shape=(3, 4), num_classes=11)
  assert base.labels.tolist() == [3, 10]


def test_missing_files_are_named_with_the_folder_and_their_url(tmp_path):
  folder = tmp_path / 'fashion_mnist'
  folder.mkdir()
  for file in idx.FILES[:2]:
    (folder / f'{file}.gz').touch()
  with pytest.raises(FileNotFoundError) as error:
    idx.find_source(tmp_path, 'fashion_mnist')
  message = str(error.value)
  assert '2 of 4' in message and str(folder) in message
  assert 't10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz' in message
  assert 'train-images-idx3-ubyte.gz' not in message
  assert idx.URLS['fashion_mnist'] in message
  assert 'MTL_JAX_SOURCE_DIR' in message


def test_unpacked_files_of_a_source_folder_are_found_too(tmp_path):
  folder = tmp_path / 'mnist'
  folder.mkdir()
  for file in idx.FILES:
    (folder / file).touch()
  (folder / f'{idx.TEST_LABELS}.gz').touch()
  found = idx.find_source(tmp_path, 'mnist')
  assert found[idx.TRAIN_IMAGES] == folder / idx.TRAIN_IMAGES
  assert found[idx.TEST_LABELS] == folder / f'{idx.TEST_LABELS}.gz'


def test_a_file_of_another_dataset_is_refused_with_what_it_is(
  tmp_path, monkeypatch
):
  folder = tmp_path / 'mnist'
  folder.mkdir()
  for file in idx.FILES:
    (folder / file).write_bytes(file.encode())
  assert len(idx.find_source(tmp_path, 'mnist')) == 4  # Known to be nothing.
  path = folder / f'{idx.TRAIN_LABELS}.gz'
  path.write_bytes(gzip.compress(b'labels of clothes'))
  monkeypatch.setattr(
    idx,
    'SHA256',
    {'fashion_mnist': {idx.TEST_LABELS: idx.fingerprint(path)}},
  )
  with pytest.raises(
    ValueError,
    match=f'{path} is {idx.TEST_LABELS} of fashion_mnist, expected '
    f'{idx.TRAIN_LABELS} of mnist',
  ):
    idx.find_source(tmp_path, 'mnist')


def test_an_unknown_dataset_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r"name must be one of.*'cifar'"):
    idx.find_source(tmp_path, 'cifar')


def test_fingerprint_is_of_the_content_and_follows_a_change(tmp_path):
  # SHA-256 of 'abc' from FIPS 180-2, appendix B.1.
  abc = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
  path = _write(tmp_path, b'abc')
  assert idx.fingerprint(path) == abc
  path.write_bytes(gzip.compress(b'abc'))
  assert idx.fingerprint(path) == abc
  path.write_bytes(b'abcd')
  assert idx.fingerprint(path) != abc


def test_the_environment_names_the_source_folder_unless_the_caller_does(
  tmp_path, monkeypatch
):
  monkeypatch.delenv('MTL_JAX_SOURCE_DIR', raising=False)
  assert idx.source_folder(None) is None
  monkeypatch.setenv('MTL_JAX_SOURCE_DIR', str(tmp_path))
  assert idx.source_folder(None) == tmp_path
  assert idx.source_folder(tmp_path / 'other') == tmp_path / 'other'
