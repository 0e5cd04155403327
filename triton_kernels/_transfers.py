"""Transfers between a CUDA device and the host's memory, on a stream of their own.

One stream per device carries both directions, in the order in which they are asked for. So a copy back never overtakes
the copy out that it reads, and pinned memory is used again without waiting: its last reader is ahead on that stream.

    out     starts once the computation so far is done; the source stays referenced until the computation has waited
            for the copy, so that the allocator cannot hand its memory on before. That wait is put off until
            MAX_PENDING_NBYTES have gathered.
    back    lands in memory of the computation's stream, which therefore must be done with its last owner; the
            computation waits for the copy it reads, and the next ones are under way meanwhile.

Nothing waits on the host.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._layout import to_storage_order

# Sources of copies out that may be held beyond their use.
MAX_PENDING_NBYTES = 2**27


class PinnedPool:
    """Host memory in blocks of powers of two, used again once no tensor refers to it.

    Args:
        allocate: Makes a 1-D uint8 CPU tensor of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._free: dict[int, list[Tensor]] = {}

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor [numel] whose memory comes back to the pool with its last reference."""
        nbytes = numel * dtype.itemsize
        size = 1 << max(nbytes - 1, 0).bit_length()
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._allocate(size)
        # The tensor holds this array, and nothing else does.
        array = block.numpy()
        weakref.finalize(array, free.append, block).atexit = False
        return torch.from_numpy(array)[:nbytes].view(dtype)


@dataclass(frozen=True)
class _Pending:
    """Copies out that a computation has not waited for."""

    sources: list[Tensor]
    done: Any
    compute: Any

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


@dataclass(frozen=True)
class _Arrival:
    """A copy back that nobody has read; it holds the host's tensor, so that its address stays its own."""

    host: Tensor
    tensor: Tensor
    done: Any


class Transfers:
    """The transfers of one device.

    Args:
        device: A CUDA device.
        stream: The stream that copies.
        pool: Where copies out land.
    """

    def __init__(self, device: torch.device, stream: Any, pool: PinnedPool) -> None:
        self._device = device
        self._stream = stream
        self._pool = pool
        self._pending: deque[_Pending] = deque()
        self._arrivals: dict[int, _Arrival] = {}

    def offload(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Starts copies out; see ``offload_reference``."""
        compute = torch.cuda.current_stream(self._device)
        sources = [to_storage_order(x) for x in tensors]
        hosts = [self._pool.take(source.numel(), source.dtype) for source in sources]
        self._pending.append(_Pending(sources, self._copy(sources, hosts, compute)[-1], compute))
        self._wait_for_pending(MAX_PENDING_NBYTES)
        return hosts

    def reload(self, hosts: Sequence[Tensor], ahead: Sequence[Tensor], is_first: bool) -> list[Tensor]:
        """Waits for copies back, and starts them and those ``ahead`` where they are not under way."""
        compute = torch.cuda.current_stream(self._device)
        self._wait_for_pending(0)
        if is_first:
            # What a backward that broke off has left.
            for arrival in self._arrivals.values():
                compute.wait_event(arrival.done)
            self._arrivals.clear()
        missing = [host for host in (*hosts, *ahead) if _address(host) not in self._arrivals]
        landed = [torch.empty_like(host, device=self._device) for host in missing]
        for host, tensor, done in zip(missing, landed, self._copy(missing, landed, compute), strict=True):
            self._arrivals[_address(host)] = _Arrival(host, tensor, done)
        arrived = [self._arrivals.pop(_address(host)) for host in hosts]
        for arrival in arrived:
            compute.wait_event(arrival.done)
        return [arrival.tensor for arrival in arrived]

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor], compute: Any) -> list[Any]:
        """Copies, once the computation so far is done; returns an event behind each copy."""
        self._stream.wait_stream(compute)
        done = []
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                done.append(self._stream.record_event())
        return done

    def _wait_for_pending(self, most_nbytes: int) -> None:
        """Lets computations wait for the oldest copies out until at most ``most_nbytes`` are held."""
        held = sum(pending.nbytes for pending in self._pending)
        while self._pending and (held > most_nbytes or not most_nbytes):
            oldest = self._pending.popleft()
            oldest.compute.wait_event(oldest.done)
            held -= oldest.nbytes


@functools.cache
def transfers(device: torch.device) -> Transfers:
    """The transfers of ``device``, for as long as the process runs."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return Transfers(device, stream, PinnedPool(_pinned))


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _address(host: Tensor) -> int:
    # Not that of the first element: an empty tensor has none.
    return host.untyped_storage().data_ptr()
