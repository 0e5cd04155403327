"""Reports and budgets count what a step holds: several calls of one graph, blocks that share one, layers unfrozen."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile import records, steps
from actcompile._gpt import GPT
from actcompile._saved import saved_by
from actcompile._torch import parameters_in_use

EAGER = {"lowering": "eager"}


def held_nbytes(results: Iterable[Tensor], others: Iterable[Tensor]) -> int:
    """Bytes of all memory that autograd holds for the backward of ``results``, that of ``others`` left out."""
    memory = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in _saved(results)}
    known = {value.untyped_storage().data_ptr() for value in others if type(value) in (Tensor, nn.Parameter)}
    return sum(nbytes for address, nbytes in memory.items() if address not in known)


def _saved(results: Iterable[Tensor]) -> Iterator[Tensor]:
    pending, seen = [value.grad_fn for value in results], set()
    while pending:
        function = pending.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        pending += [above for above, _ in function.next_functions]
        yield from saved_by(function)
        yield from getattr(function, "_tensors_no_vc_check", ())


def layers(*sizes: int) -> nn.Sequential:
    """Linear layers with GELU in between."""
    return nn.Sequential(*(layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())))


def blocks(count: int, **options: object) -> GPT:
    """A GPT of which only the blocks are compiled."""
    model = GPT(layers=count, width=64, vocabulary=64, tokens=32)
    for block in model.blocks:
        block.compile(backend="act", options={**EAGER, **options})
    return model


IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))


def held_by_blocks(model: GPT) -> tuple[Tensor, int]:
    """The loss of ``model``, and what its blocks hold for the backward."""
    inputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, args, out: inputs.extend((*args, out))) for block in model.blocks]
    loss = model(IDS, IDS)
    for hook in hooks:
        hook.remove()
    # What the layers behind the blocks save starts at the output of the last one; the embedding saves the tokens.
    return loss, held_nbytes([inputs[-1]], [IDS, *parameters_in_use(model)])


def test_blocks_that_share_a_graph_all_count() -> None:
    model = blocks(3)
    for _ in range(2):
        loss, held = held_by_blocks(model)
        report = actcompile.report(model)
        assert len(records.finished()) == 1
        assert report.saved_nbytes == sum(actcompile.report(block).saved_nbytes for block in model.blocks)
        assert report.saved_nbytes == held
        loss.backward()
    parts = [actcompile.report(block) for block in model.blocks]
    assert all(part.rows == parts[0].rows != () for part in parts)
    assert actcompile.report(model).baseline_nbytes == 3 * parts[0].baseline_nbytes
    assert actcompile.report().rows == actcompile.report(model).rows
    assert "(x" not in str(actcompile.report(model.blocks[0]))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fully_sharded_blocks(one_rank: None) -> None:
    """Forwards see other parameters than those that FSDP2's modules have in between."""
    from torch.distributed.fsdp import fully_shard

    model = blocks(2)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for _ in range(2):
        loss, held = held_by_blocks(model)
        assert actcompile.report(model).saved_nbytes == held
        loss.backward()
    parts = [actcompile.report(block) for block in model.blocks]
    assert parts[0].rows == parts[1].rows != ()
    assert actcompile.report(model).saved_nbytes == 2 * parts[0].saved_nbytes


@pytest.mark.parametrize("auto", [False, True])
def test_memory_holds_for_all_calls_together(auto: bool) -> None:
    model = blocks(4, memory="450KiB", auto=auto)
    for step in range(3):
        loss, held = held_by_blocks(model)
        report = actcompile.report(model)
        # How many blocks there are, is known once the first step is over.
        assert (report.saved_nbytes <= 450 * 1024) == (step > 0)
        assert report.saved_nbytes == held
        assert not auto or report.saved_nbytes > 0.8 * 450 * 1024
        loss.backward()


def test_memory_holds_for_all_graphs_of_a_broken_model() -> None:
    first, second = layers(64, 128, 64), layers(64, 256, 64)

    def function(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    step = torch.compile(function, backend="act", options={**EAGER, "memory": "40KiB", "auto": False, "min_numel": 0})
    x = torch.randn(128, 64)
    for _ in range(2):
        step(x).sum().backward()
    step(x)
    report = actcompile.report()
    assert len(report.timelines) == 2 and 20 * 1024 < report.saved_nbytes <= 40 * 1024


def test_two_calls_in_one_step() -> None:
    model = layers(64, 128, 8)
    call = torch.compile(model, backend="act", options={**EAGER, "min_numel": 0})
    x = torch.randn(64, 64)
    once = call(x)
    alone = actcompile.report(model).saved_nbytes
    assert alone == held_nbytes([once], [x, *model.parameters()])
    twice = call(x)
    assert actcompile.report(model).saved_nbytes == held_nbytes([once, twice], [x, *model.parameters()]) == 2 * alone
    (once + twice).sum().backward()
    assert actcompile.report(model).saved_nbytes == 2 * alone
    # Micro-batches whose backwards run in between are held one at a time.
    for _ in range(2):
        call(x).sum().backward()
    assert actcompile.report(model).saved_nbytes == alone


def test_a_result_that_was_dropped_holds_nothing() -> None:
    model = layers(64, 128, 8)
    call = torch.compile(model, backend="act", options=EAGER)
    for _ in range(3):
        call(torch.randn(64, 64))
    assert len(steps.latest()) == 1
    kept = call(torch.randn(64, 64))
    call(torch.randn(64, 64)).sum().backward()
    assert len(steps.latest()) == 2 and kept.requires_grad


def test_unfreezing_shows_the_graph_in_use() -> None:
    model = layers(64, 128, 128, 64)
    model[:4].requires_grad_(False)
    call = torch.compile(model, backend="act", options={**EAGER, "min_numel": 0})
    x = torch.randn(32, 64)
    call(x).sum().backward()
    frozen = actcompile.report(model)
    model.requires_grad_(True)
    result = call(x)
    report = actcompile.report(model)
    assert report.saved_nbytes == held_nbytes([result], [x, *model.parameters()]) > frozen.saved_nbytes
    result.sum().backward()
    model[:4].requires_grad_(False)
    call(x).sum().backward()
    assert actcompile.report(model).rows == frozen.rows


def test_a_model_that_stands_still_keeps_its_report() -> None:
    """As a generator does while the discriminator trains."""
    first, second = layers(32, 64, 64), layers(64, 64, 8)
    make, judge = (torch.compile(model, backend="act", options=EAGER) for model in (first, second))
    judge(make(torch.randn(32, 32))).sum().backward()
    both = actcompile.report()
    with torch.no_grad():
        fake = make(torch.randn(32, 32))
    judge(fake).sum().backward()
    assert actcompile.report(first).rows
    assert len(actcompile.report().timelines) == len(both.timelines) == 2


def test_branches_not_taken_do_not_count() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.ways = layers(64, 64), nn.ModuleList([layers(64, 64), layers(64, 64)])

        def forward(self, x: Tensor, way: int) -> Tensor:
            y = self.stem(x)
            torch._dynamo.graph_break()
            return self.ways[way](y)

    model = Either()
    call = torch.compile(model, backend="act", options={**EAGER, "min_numel": 0})
    for way in (0, 1):
        call(torch.randn(64, 64), way).sum().backward()
        assert len(actcompile.report(model).timelines) == 2


def test_back_razors_rule_counts_every_block() -> None:
    model = blocks(2, pruning="samples", sparsity=0.8)
    for _ in range(2):
        model(IDS, IDS).backward()
    parts = [actcompile.report(block) for block in model.blocks]
    assert all(part.saved_nbytes for part in parts)
    assert actcompile.report(model).saved_nbytes == sum(part.saved_nbytes for part in parts)
