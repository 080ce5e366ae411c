"""What the counter of communication finds in programs whose costs are known."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from benchmarks import hlo_collectives

# In one call: an all-gather of 64 bytes among 4; an all-to-all of 2 x 8 bytes
# among 2; a loop of 3 with an all-reduce of 40 bytes among 8, of which 32 are
# sliced, and a permutation of 8 bytes; an asynchronous all-gather of 32 bytes
# among 8; a reduce-scatter of 64 bytes among 4; and what one device does alone.
_TEXT = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%share (param_0: f32[8], param_1: s32[]) -> f32[1] {
  %param_0 = f32[8]{0} parameter(0)
  %param_1 = s32[] parameter(1)
  %copied = f32[8]{0} copy(%param_0)
  ROOT %slice = f32[1]{0} dynamic-slice(%copied, %param_1), \
dynamic_slice_sizes={1}
}

%of_loop (p: (s32[], f32[8], f32[2])) -> (s32[], f32[8], /*index=2*/f32[2]) {
  %p = (s32[], f32[8]{0}, /*index=2*/f32[2]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %y = f32[2]{0} get-tuple-element(%p), index=2
  %ar = (f32[8]{0}, f32[2]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8], \
to_apply=%add
  %ar.0 = f32[8]{0} get-tuple-element(%ar), index=0
  %ar.1 = f32[2]{0} get-tuple-element(%ar), index=1
  %kept = f32[1]{0} fusion(%ar.0, %i), kind=kLoop, calls=%share
  %cp = f32[2]{0} collective-permute(%ar.1), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8]{0}, f32[2]{0}) tuple(%i, %x, %cp)
}

%cond (p: (s32[], f32[8], f32[2])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (param: f32[4]) -> f32[16] {
  %param = f32[4]{0} parameter(0)
  %ag = f32[16]{0} all-gather(%param), replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}
  %aa = (bf16[4]{0}, bf16[4]{0}) all-to-all(%b, %c), \
replica_groups=mesh['x'=4,'y'=2], device_ids=([8]) {'y'}
  %loop = (s32[], f32[8]{0}, f32[2]{0}) while(%init), condition=%cond, \
body=%of_loop, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[1]{0}, f32[8]{0}) all-gather-start(%one), replica_groups={}, \
dimensions={0}
  %done = f32[8]{0} all-gather-done(%start)
  %rs = f32[4]{0} reduce-scatter(%ag), replica_groups=[2,4]<=[4,2]T(1,0), \
dimensions={0}, to_apply=%add
  ROOT %alone = f32[16]{0} all-reduce(%ag), replica_groups=[8,1]<=[8], \
to_apply=%add
}
"""


def test_collectives_of_a_program_written_by_hand():
  found = {c.kind: c for c in hlo_collectives.collectives(_TEXT)}
  counted = sorted(
    (c.kind, c.devices, c.bytes, c.sliced_bytes, c.times)
    for c in hlo_collectives.collectives(_TEXT)
  )
  assert counted == [
    ('all-gather', 4, 64, 0, 1),
    ('all-gather', 8, 32, 0, 1),
    ('all-reduce', 8, 40, 32, 3),
    ('all-to-all', 2, 16, 0, 1),
    ('collective-permute', 2, 8, 0, 3),
    ('reduce-scatter', 4, 64, 0, 1),
  ]
  # Rings: 3 x 2 x 7/8 x 40, of which 3 x 7/8 x 32 would not be sent.
  assert found['all-reduce'].sent == 210
  assert found['all-reduce'].sent_with_reduce_scatter == 126
  assert found['all-to-all'].sent == 8
  assert found['collective-permute'].sent == 24
  assert found['reduce-scatter'].sent == 48


@pytest.mark.parametrize(
  'old, new, message',
  [
    ('"known_trip_count":{"n":"3"}', '', 'loop communicates and its length'),
    ('[1,8]<=[8]', 'new_form', 'the devices of ar are unknown'),
    ('all-to-all(', 'ragged-all-to-all(', 'cost of ragged-all-to-all'),
    ('bf16[4]', 'f8x[4]', 'the size of f8x is not known'),
    (
      'while(%init), condition=%cond, body=%of_loop',
      'conditional(%n, %init), branch_computations={%cond, %of_loop}',
      'a branch of loop communicates',
    ),
  ],
)
def test_what_cannot_be_counted_is_refused(old, new, message):
  assert old in _TEXT
  with pytest.raises(ValueError, match=message):
    hlo_collectives.collectives(_TEXT.replace(old, new))


def test_collectives_of_a_compiled_program_whose_bytes_are_known():
  mesh = jax.make_mesh(
    (2, 4), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def program(rows):
    gathered = jax.lax.all_gather(rows, 'y', tiled=True)

    def body(_, total):
      return jax.lax.psum(jnp.tanh(total), 'x')

    total = jax.lax.fori_loop(0, 5, body, gathered)
    swapped = jax.lax.all_to_all(total, 'y', 0, 1, tiled=True)
    return jax.lax.psum_scatter(swapped, 'y', tiled=True)

  mapped = jax.shard_map(
    program,
    mesh=mesh,
    in_specs=P('y', None),
    out_specs=P('y', None),
    check_vma=False,
  )
  text = jax.jit(mapped).lower(jnp.ones((16, 10))).compile().as_text()
  counted = sorted(
    (c.kind, c.devices, c.bytes, c.times)
    for c in hlo_collectives.collectives(text)
  )
  # float32 [16, 10] everywhere.
  assert counted == [
    ('all-gather', 4, 640, 1),
    ('all-reduce', 2, 640, 5),
    ('all-to-all', 4, 640, 1),
    ('reduce-scatter', 4, 640, 1),
  ]
