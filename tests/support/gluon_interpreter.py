"""Run generated Gluon kernels on the CPU: what Triton's interpreter does for Triton, for the part of Gluon that we use.

A kernel's partitions run as threads that meet at real barriers, so that a wrong phase, a barrier with a wrong count, copies of
another size than was announced, and deadlocks show. Copies and products happen at once: what depends on their being
asynchronous (a tile that is overwritten too early) shows only where the barriers themselves are wrong. Tiles are torch
tensors; layouts are ignored.
"""

from __future__ import annotations

import ast
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["GluonKernel", "is_gluon"]

PATIENCE = 30.0
"""Seconds that a partition waits at a barrier before it is taken for a deadlock."""


def is_gluon(source: str) -> bool:
    """Whether a generated kernel is Gluon."""
    return "@gluon.jit" in source


@dataclass
class GluonKernel:
    """A generated Gluon kernel, launched as Inductor's launcher is: the kernel's arguments, then the grid."""

    name: str
    source: str
    launches: list[str]

    def run(self, *arguments: Any, stream: Any = None) -> None:
        self.launches.append(self.name)
        *operands, x, y, z = arguments
        operands = [_pointer(operand) if isinstance(operand, Tensor) else operand for operand in operands]
        grid = int(x), int(y), int(z)
        for program in itertools.product(*map(range, grid)):
            machine = _Machine(program, grid)
            # In a thread of its own, where no mode of the caller's is active.
            machine.warp_specialize([(_load(self.source, machine)[self.name], tuple(operands))], (), ())


def _load(source: str, machine: _Machine) -> dict[str, Any]:
    """The kernel's functions as plain Python on ``machine``: without imports and decorators."""
    module = ast.parse(source)
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        function.decorator_list = []
    # A kernel has another name, too: the one that Inductor asks for.
    names_too = [node for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)]
    module.body = [*functions, *names_too]
    names = machine.names()
    exec(compile(module, "<generated gluon>", "exec"), names)
    return names


# --- memory ---------------------------------------------------------------------------------------------------------


class Tile(Tensor):
    """A tile in registers. Gluon's tensors know their layout; here there is none."""

    type = property(lambda self: SimpleNamespace(layout=None))  # type: ignore[assignment]

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:  # type: ignore[override]
        return self.contiguous().view(dtype) if bitcast else super().to(dtype)


def _tile(value: Any, dtype: torch.dtype | None = None) -> Tile:
    return torch.as_tensor(value, dtype=dtype).as_subclass(Tile)


@dataclass
class Pointer:
    """Elements of a storage, from ``offset`` (an int, or a tensor of them) on."""

    storage: Tensor
    offset: Any

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.storage.dtype)

    def __add__(self, distance: Any) -> Pointer:
        return Pointer(self.storage, self.offset + distance)


def _pointer(tensor: Tensor) -> Pointer:
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return Pointer(torch.as_strided(tensor, (elements,), (1,), 0), tensor.storage_offset())


def _load_from(pointer: Pointer, mask: Any = None, other: Any = 0.0, **hints: Any) -> Tile:
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return _tile(pointer.storage[offset.long()])
    inside = torch.where(mask, offset, 0)
    return _tile(torch.where(mask, pointer.storage[inside.long()], other))


def _store_to(pointer: Pointer, value: Any, mask: Any = None, **hints: Any) -> None:
    offset = torch.as_tensor(pointer.offset)
    value = torch.as_tensor(value).to(pointer.storage.dtype)
    keep = torch.ones(offset.shape, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    offset, value, keep = torch.broadcast_tensors(offset, value, keep)
    pointer.storage[offset[keep].long()] = value[keep].as_subclass(Tensor)


def _assembly(asm: str, constraints: str, args: Sequence[Tensor], dtype: torch.dtype, is_pure: bool, pack: int) -> Tile:
    """The assembly that the kernels have: tanh, 16-bit numbers and what rounding leaves."""
    x, *others = args
    if asm.startswith("tanh.approx.f32"):
        return torch.tanh(x)
    if dtype == torch.int8:
        assert "prmt.b32 a, $1, $2, 0x51" in asm and pack == 4
        return _tile((x.as_subclass(Tensor).contiguous().view(torch.int32) >> 8).to(torch.int8))
    assert dtype == torch.float32
    if others:
        assert "prmt.b32 a, $6, 0, 0x8804" in asm and pack == 4
        bits = x.as_subclass(Tensor).float().contiguous().view(torch.int32) + (others[0].to(torch.int32) << 8)
        return _tile(bits.as_subclass(Tensor).view(torch.float32))
    assert pack == 2 and {torch.float16: "cvt.f32.f16", torch.bfloat16: "shl.b32 $0, $2, 16"}[x.dtype] in asm
    return _tile(x.to(dtype))


class Shared:
    """A descriptor of shared memory: a view of its elements, and the barriers that live in it."""

    def __init__(self, elements: Tensor, barriers: dict[int, Barrier] | None = None, place: int = 0) -> None:
        self.elements = elements
        self.barriers = {} if barriers is None else barriers
        self.place = place
        self.dtype = elements.dtype

    def index(self, position: Any) -> Shared:
        assert 0 <= int(position) < self.elements.shape[0]
        return Shared(self.elements[int(position)], self.barriers, int(position))

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.elements.view(list(shape)))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.elements.permute(*order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.elements.narrow(dim, start, length))

    def load(self, layout: Any) -> Tile:
        return _tile(self.elements.clone())

    def store(self, value: Any) -> None:
        self.elements.copy_(torch.as_tensor(value).as_subclass(Tensor))

    @property
    def barrier(self) -> Barrier:
        return self.barriers[self.place]


# --- barriers and copies --------------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: a phase ends when as many have arrived as it counts, and all announced bytes have come."""

    def __init__(self, count: int, changed: threading.Condition) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.parity = 0
        self.changed = changed

    def arrive(self, announced: int = 0) -> None:
        with self.changed:
            assert self.pending > 0, "more arrivals than the barrier counts"
            self.pending -= 1
            self.bytes += announced
            self._settle()

    def received(self, count: int) -> None:
        with self.changed:
            self.bytes -= count
            self._settle()

    def wait(self, parity: int, failed: threading.Event) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.parity != parity or failed.is_set(), PATIENCE):
                raise RuntimeError(f"deadlock: a barrier stays in the phase of parity {parity}")
            if failed.is_set():
                raise _AnotherFailedError

    def _settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.parity ^= 1
            self.pending = self.count
            self.changed.notify_all()


class _AnotherFailedError(Exception):
    """Ends a partition where another one has raised."""


@dataclass
class _Source:
    """A tensor descriptor."""

    base: Pointer
    shape: list[int]
    strides: list[int]
    block: list[int]

    def __post_init__(self) -> None:
        item = self.base.storage.element_size()
        assert self.strides[-1] == 1
        assert all(stride * item % 16 == 0 for stride in self.strides[:-1]), (
            "strides of a descriptor: multiples of 16 bytes"
        )
        assert int(self.base.offset) * item % 16 == 0, "base of a descriptor: a multiple of 16 bytes"

    def read(self, coordinates: Sequence[Any]) -> Tensor:
        offset = torch.tensor(int(self.base.offset))
        inside = torch.tensor(True)
        for dim, (start, size, stride, length) in enumerate(
            zip(coordinates, self.block, self.strides, self.shape, strict=True)
        ):
            index = int(start) + torch.arange(size)
            view = [1] * len(self.block)
            view[dim] = size
            offset = offset + (index * int(stride)).view(view)
            inside = inside & ((index >= 0) & (index < int(length))).view(view)
        return torch.where(inside, self.base.storage[torch.where(inside, offset, 0)], 0)


# --- the language ---------------------------------------------------------------------------------------------------


class _Machine:
    """One program: its place in the grid, its threads, and the names that the kernel's text uses."""

    def __init__(self, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.program, self.grid = program, grid
        self.changed = threading.Condition()
        self.failed = threading.Event()

    def names(self) -> dict[str, Any]:
        def no_layout(*arguments: Any, **named: Any) -> None:
            return None

        dtypes = {
            name: getattr(torch, name)
            for name in ("int1", "int8", "int32", "int64", "float16", "bfloat16", "float32")
            if name != "int1"
        }
        tiles = SimpleNamespace(
            **dtypes,
            int1=torch.bool,
            constexpr=lambda value: value,
            static_range=range,
            program_id=lambda axis: _tile(self.program[axis]),
            num_programs=lambda axis: _tile(self.grid[axis]),
            NVMMASharedLayout=SimpleNamespace(get_default_for=no_layout),
            SwizzledSharedLayout=no_layout,
            SharedLinearLayout=no_layout,
            NVMMADistributedLayout=no_layout,
            DotOperandLayout=no_layout,
            SliceLayout=no_layout,
            BlockedLayout=no_layout,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            arange=lambda start, end, layout=None: _tile(torch.arange(start, end)),
            zeros=lambda shape, dtype, layout=None: _tile(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout=None: _tile(torch.full(shape, value, dtype=dtype)),
            broadcast_to=lambda value, shape: _tile(value).expand(shape),
            broadcast=lambda a, b: torch.broadcast_tensors(_tile(a), _tile(b)),
            split=lambda value: value.unbind(-1),
            convert_layout=lambda value, layout: value,
            cdiv=lambda a, b: -(-a // b),
            where=lambda condition, a, b: _tile(torch.where(torch.as_tensor(condition), a, b)),
            minimum=lambda a, b: torch.minimum(_tile(a), _tile(b)),
            maximum=lambda a, b: torch.maximum(_tile(a), _tile(b)),
            max=lambda value, axis: value.amax(axis),
            min=lambda value, axis: value.amin(axis),
            sum=lambda value, axis: value.sum(axis),
            abs=torch.abs,
            exp2=torch.exp2,
            sqrt=torch.sqrt,
            ceil=torch.ceil,
            fma=lambda a, b, c: _tile(a) * b + c,
            log2=torch.log2,
            load=_load_from,
            store=_store_to,
            atomic_add=self.atomic_add,
            inline_asm_elementwise=_assembly,
            debug_barrier=lambda: None,
        )
        return {
            "gl": tiles,
            "tl": tiles,
            "fence_async_shared": lambda: None,
            "tma": SimpleNamespace(
                make_tensor_descriptor=lambda base, shape, strides, block, layout: _Source(base, shape, strides, block),
                async_copy_global_to_shared=self.copy,
            ),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=no_layout,
                init=self.init,
                wait=lambda bar, parity: bar.barrier.wait(int(parity), self.failed),
                arrive=lambda bar: bar.barrier.arrive(),
                expect=lambda bar, count: bar.barrier.arrive(int(count)),
            ),
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": lambda outstanding, deps: deps if len(deps) > 1 else deps[0],
        }

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        poison = torch.full(list(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype)
        return Shared(poison)

    def init(self, bar: Shared, count: int) -> None:
        bar.barriers[bar.place] = Barrier(count, self.changed)

    def copy(self, source: _Source, coordinates: Sequence[Any], bar: Shared, into: Shared) -> None:
        values = source.read(coordinates)
        assert values.shape == into.elements.shape
        into.elements.copy_(values)
        bar.barrier.received(values.numel() * values.element_size())

    def product(self, a: Any, b: Shared, acc: Tile, use_acc: bool = True, is_async: bool = False) -> Tile:
        left = a.elements if isinstance(a, Shared) else a
        found = left.float() @ b.elements.float()
        return _tile(found + acc if use_acc else found)

    def atomic_add(self, pointer: Pointer, value: int) -> Tile:
        with self.changed:
            before = _load_from(pointer).clone()
            _store_to(pointer, before + value)
        return before

    def warp_specialize(
        self, partitions: Sequence[tuple[Callable[..., Any], tuple]], warps: Any, registers: Any
    ) -> None:
        assert len(partitions) == len(warps) + 1 == len(registers) + 1
        raised: list[BaseException] = []

        def run(function: Callable[..., Any], arguments: tuple) -> None:
            try:
                with torch.no_grad():
                    function(*arguments)
            except _AnotherFailedError:
                pass
            except BaseException as error:
                raised.append(error)
                self.failed.set()
                with self.changed:
                    self.changed.notify_all()

        threads = [threading.Thread(target=run, args=partition) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if raised:
            raise raised[0]
