"""Counts of the bytes between devices in a program, from its HLO text."""

from collections.abc import Iterator
import dataclasses
import math
import re

_BYTES = {
  **dict.fromkeys(('pred', 's8', 'u8'), 1),
  **dict.fromkeys(('s16', 'u16', 'f16', 'bf16'), 2),
  **dict.fromkeys(('s32', 'u32', 'f32'), 4),
  **dict.fromkeys(('s64', 'u64', 'f64', 'c64'), 8),
}
_COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# Operations that send data at an unknown cost.
_UNKNOWN = (
  'collective-broadcast',
  'ragged-all-to-all',
  'send',
  'recv',
)
# Operations that may come between a value and its slices.
_MOVES = ('bitcast', 'copy', 'reshape', 'transpose', 'convert')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: `'all-reduce'`, `'all-gather'`, `'reduce-scatter'`, `'all-to-all'` or
      `'collective-permute'`.
    devices: number of devices that take part together.
    bytes: size of the whole array, which each device holds before a reduction
      or an exchange, and after a gathering.
    sliced_bytes: the part of an all-reduce of which every device keeps only its
      share; a backend with reduce-scatter uses that for it.
    times: the number of times that it is run.
  """

  kind: str
  devices: int
  bytes: int
  sliced_bytes: int = 0
  times: int = 1

  @property
  def sent(self) -> float:
    """Bytes that each device sends, with ring algorithms."""
    share = (self.devices - 1) / self.devices
    if self.kind == 'collective-permute':
      return float(self.times * self.bytes)
    factor = 2 if self.kind == 'all-reduce' else 1
    return self.times * factor * share * self.bytes

  @property
  def sent_with_reduce_scatter(self) -> float:
    """The same if all-reduces that are sliced were reduce-scatters."""
    share = (self.devices - 1) / self.devices
    return self.sent - self.times * share * self.sliced_bytes


def collectives(text: str) -> list[Collective]:
  """The collective operations that one device runs in a program.

  Args:
    text: `compiled.as_text()` of a partitioned program. An operation in a loop
      counts for every iteration.

  Returns:
    The operations, without those that involve only one device.

  Raises:
    ValueError: if the number of runs is unknown (a loop of unknown length, a
      branch), and for operations of unknown cost.
  """
  program = _Program(text)
  return [c for c in program.run(program.entry, 1) if c.devices > 1]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  rest: str


class _Program:
  """The computations of a module, and the calls between them."""

  def __init__(self, text):
    partitions = re.search(r'num_partitions=(\d+)', text)
    replicas = re.search(r'replica_count=(\d+)', text)
    self._devices = max(int(m[1]) if m else 1 for m in (partitions, replicas))
    self._computations: dict[str, dict[str, _Instruction]] = {}
    self.entry = ''
    body: dict[str, _Instruction] = {}
    # Comments and the layouts of arrays do not matter here.
    plain = re.sub(r'/\*.*?\*/|(?<=\])\{[^}]*\}', '', text)
    for line in plain.splitlines():
      start = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$', line)
      if start:
        body = self._computations[start[2]] = {}
        if start[1]:
          self.entry = start[2]
      elif found := _parse(line):
        body[found.name] = found

  def run(self, computation: str, times: int) -> Iterator[Collective]:
    """The collectives in `times` calls of a computation."""
    for x in self._computations[computation].values():
      kind = x.opcode.removesuffix('-start')
      if kind in _UNKNOWN:
        raise ValueError(f'the cost of {x.opcode} ({x.name}) is not known')
      if kind in _COLLECTIVES:
        yield self._collective(kind, x, computation, times)
        continue
      for callee, number in self._calls(x):
        yield from self.run(callee, number * times)

  def _calls(self, x):
    """(computation, times) for every call in an instruction."""
    named = re.findall(
      r'(?:calls|to_apply|body|condition|called_computations)='
      r'(%?[\w.\-]+|\{[^}]*\})',
      x.rest,
    )
    callees = [n.strip(' %{}') for names in named for n in names.split(',')]
    callees = [n for n in callees if n in self._computations]
    if x.opcode == 'while':
      count = re.search(r'known_trip_count\W+n\W+(\d+)', x.rest)
      if count:
        return [(name, int(count[1])) for name in callees]
      if any(self._communicates(name) for name in callees):
        raise ValueError(
          f'the loop {x.name} communicates and its length is not known'
        )
      return []
    if x.opcode == 'conditional':
      branches = re.findall(
        r'(?:branch_computations=\{|(?:true|false)_computation=)([^}\s]*)',
        x.rest.replace(', %', ',%'),
      )
      names = [n.strip(' %,') for b in branches for n in b.split(',')]
      if any(self._communicates(n) for n in names if n in self._computations):
        raise ValueError(f'a branch of {x.name} communicates')
      return []
    return [(name, 1) for name in callees]

  def _communicates(self, computation):
    return any(
      x.opcode.removesuffix('-start') in (*_COLLECTIVES, *_UNKNOWN)
      or any(self._communicates(name) for name in self._callees(x))
      for x in self._computations[computation].values()
    )

  def _callees(self, x):
    names = re.findall(r'%([\w.\-]+)', x.rest)
    return [n for n in names if n in self._computations]

  def _collective(self, kind, x, computation, times):
    sizes = [_size(shape) for shape in _shapes(x.shape)]
    if x.opcode.endswith('-start') and kind != 'all-reduce':
      # (operands, results, context): results are at least as large as operands,
      # except for a reduce-scatter, whose operand counts.
      sizes = [max(sizes)]
    elif kind == 'reduce-scatter':
      sizes = [n * self._group(x) for n in sizes]
    sliced = 0
    if kind == 'all-reduce' and not x.opcode.endswith('-start'):
      sliced = self._sliced(computation, x, sizes, self._group(x))
    return Collective(kind, self._group(x), sum(sizes), sliced, times)

  def _group(self, x):
    """Number of devices that take part together."""
    if x.opcode.startswith('collective-permute'):
      pairs = re.search(r'source_target_pairs=\{(.*?)\}\}', x.rest)
      return 2 if pairs and re.search(r'\d', pairs[1]) else 1
    iota = re.search(r'replica_groups=\[\d+,(\d+)\]<=', x.rest)
    if iota:
      return int(iota[1])
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', x.rest)
    if listed:
      return len(listed[1].split(','))
    named = re.search(r'replica_groups=mesh\[(.*?)\].*?\{(.*?)\}', x.rest)
    if named:
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
      # A part of an axis is written 'name':(size of the parts before it)size.
      axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
      return math.prod(int(part or sizes[name]) for name, part in axes)
    if 'replica_groups={}' in x.rest:
      return self._devices
    raise ValueError(f'the devices of {x.name} are unknown: {x.rest}')

  def _sliced(self, computation, x, sizes, devices):
    """Bytes of an all-reduce of which every device keeps only its share."""
    if not x.shape.startswith('('):
      return sizes[0] * self._only_sliced(
        computation, x.name, sizes[0] / devices
      )
    total = 0
    for user in self._computations[computation].values():
      if user.opcode == 'get-tuple-element' and x.name in user.operands:
        size = sizes[int(re.search(r'index=(\d+)', user.rest)[1])]
        total += size * self._only_sliced(
          computation, user.name, size / devices
        )
    return total

  def _only_sliced(self, computation, name, share):
    """Whether a value is used only for slices of a given size."""
    users = [
      x for x in self._computations[computation].values() if name in x.operands
    ]

    def slices(x):
      if x.opcode == 'dynamic-slice':
        return _size(x.shape) == share
      if x.opcode == 'fusion':
        (callee,) = (n for n, _ in self._calls(x))
        body = self._computations[callee].values()
        return all(
          self._only_sliced(callee, p.name, share)
          for p in body
          if p.opcode == 'parameter'
          and x.operands[int(re.match(r'\d+', p.rest)[0])] == name
        )
      return x.opcode in _MOVES and self._only_sliced(
        computation, x.name, share
      )

    return bool(users) and all(map(slices, users))


def _parse(line):
  """The instruction in a line, if there is one."""
  found = re.match(
    r'\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|[^\s(]+) ([\w\-]+)\((.*)$',
    line,
  )
  if not found:
    return None
  name, shape, opcode, rest = found.groups()
  operands = rest.partition(')')[0] if opcode != 'parameter' else ''
  return _Instruction(
    name, shape, opcode, tuple(re.findall(r'%([\w.\-]+)', operands)), rest
  )


def _shapes(shape):
  return re.findall(r'\w+\[[\d,]*\]', shape)


def _size(shape):
  """Bytes of an array's shape, such as `f32[8,4]{1,0}`."""
  dtype, entries = re.match(r'(\w+)\[([\d,]*)\]', shape).groups()
  if dtype not in _BYTES:
    raise ValueError(f'the size of {dtype} is not known')
  return _BYTES[dtype] * math.prod(int(n) for n in entries.split(',') if n)
