"""The order of transfers, on streams that only keep count: nothing is read, or given up, before its copy is done."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels import _transfers
from actcompile.triton_kernels._transfers import PinnedPool, Transfers

CPU = torch.device("cpu")


class Event:
    """The end of the ``tick``-th copy."""

    def __init__(self, tick: int) -> None:
        self.tick = tick


class CopyStream:
    """Counts copies; each may start after as much of the computation as it waited for."""

    def __init__(self) -> None:
        self.ticks = 0
        self.waits = 0

    def wait_stream(self, compute: "ComputeStream") -> None:
        self.waits += 1

    def record_event(self) -> Event:
        self.ticks += 1
        return Event(self.ticks)


class ComputeStream:
    """Knows of how many copies the computation has waited for."""

    def __init__(self) -> None:
        self.known = 0

    def wait_event(self, event: Event) -> None:
        self.known = max(self.known, event.tick)


class Machine:
    """A device whose copies happen at once, but count as done only when the computation has waited."""

    def __init__(self) -> None:
        self.copy, self.compute = CopyStream(), ComputeStream()
        self.num_allocated = 0
        self.transfers = Transfers(CPU, self.copy, PinnedPool(self._allocate))  # type: ignore[no-untyped-call]
        self.given_up_early: list[int] = []

    def _allocate(self, nbytes: int) -> Tensor:
        self.num_allocated += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def offload(self, value: float, numel: int = 1000) -> Tensor:
        """Starts the copy of a new tensor, and drops the tensor."""
        source = torch.full((numel,), value)
        tick = self.copy.ticks + 1
        weakref.finalize(source, lambda: self.given_up_early.append(tick) if self.compute.known < tick else None)
        (host,) = self.transfers.offload([source])
        return host

    def reload(self, hosts: list[Tensor], ahead: list[Tensor], is_first: bool) -> list[Tensor]:
        return self.transfers.reload(hosts, ahead, is_first)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.compute)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    yield machine
    gc.collect()
    assert not machine.given_up_early


def test_sources_are_held_until_the_computation_waited(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transfers, "MAX_PENDING_NBYTES", 10_000)
    hosts = []
    for value in range(8):
        hosts.append(machine.offload(float(value)))
        # Two sources of 4000 bytes may be pending.
        assert machine.compute.known == max(0, value + 1 - 2)
    assert machine.copy.waits == 8
    assert [float(host[0]) for host in hosts] == [float(value) for value in range(8)]
    machine.reload(hosts[:1], [], True)


def test_what_is_read_has_arrived_and_what_follows_is_under_way(machine: Machine) -> None:
    hosts = [machine.offload(float(value)) for value in range(4)]
    assert machine.compute.known == 0
    first = machine.reload([hosts[3]], [hosts[2], hosts[1]], True)
    assert (machine.copy.ticks, machine.compute.known) == (4 + 3, 4 + 1)
    second = machine.reload([hosts[2]], [hosts[1], hosts[0]], False)
    assert (machine.copy.ticks, machine.compute.known) == (4 + 4, 4 + 2)
    third = machine.reload([hosts[1]], [hosts[0]], False)
    assert (machine.copy.ticks, machine.compute.known) == (4 + 4, 4 + 3)
    last = machine.reload([hosts[0]], [], False)
    assert (machine.copy.ticks, machine.compute.known) == (4 + 4, 4 + 4)
    assert [float(value[0]) for (value,) in (first, second, third, last)] == [3.0, 2.0, 1.0, 0.0]


def test_a_second_backward_reads_again(machine: Machine) -> None:
    host = machine.offload(5.0)
    for _ in range(2):
        (value,) = machine.reload([host], [], True)
        assert value.tolist() == [5.0] * 1000
    assert machine.copy.ticks == 3


def test_what_a_broken_backward_left_is_waited_for_and_dropped(machine: Machine) -> None:
    hosts = [machine.offload(float(value)) for value in range(2)]
    machine.reload(hosts[:1], hosts[1:], True)
    known = machine.compute.known
    (value,) = machine.reload(hosts[1:], [], True)
    assert value.tolist() == [1.0] * 1000
    assert machine.compute.known == known + 2


def test_host_memory_is_used_again_when_nothing_refers_to_it(machine: Machine) -> None:
    for step in range(3):
        hosts = [machine.offload(float(value), numel=700 + step) for value in range(4)]
        view = hosts[0].view(2, -1) if step == 2 else hosts[0].view(1, -1)
        del hosts
        kept = machine.offload(9.0)
        assert view.unique().tolist() == [0.0]
        del view, kept
    # Four at once, and of those three are free when the fifth comes.
    assert machine.num_allocated == 4


def test_pool_hands_out_what_was_asked_for() -> None:
    pool = PinnedPool(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    for numel, dtype in ((0, torch.float32), (1, torch.bool), (1000, torch.bfloat16), (4097, torch.int64)):
        tensor = pool.take(numel, dtype)
        assert tensor.shape == (numel,) and tensor.dtype == dtype
