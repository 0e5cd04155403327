"""The backend: ``torch.compile(model, backend="act")``.

graph from Dynamo                                     act
  + one more input, the seed of the rounding noise    _torch.add_scalar_input
  -> Inductor, which traces forward and backward      _torch.compile_pair
     -> partition                                     passes/partition.py
     -> rows of what is saved                         analysis.py
     -> plan                                          planner.py, or following.py where one is given
     -> rewritten forward and backward                passes/
  -> Triton or C++ code, or an interpreter            lowering="eager"
"""

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import records
from ._torch import (
    CustomPartitionerFn,
    Interpret,
    add_scalar_input,
    argument_name,
    belongs_to_module,
    check_cpp_compiler,
    compile_pair,
    copied,
    count_in_signed_integers,
    get_hash_for_files,
    interpret_plainly,
    is_fake,
    is_part_of_model,
    mode_options,
    random_settings,
    reentrant_tracing,
    traced_inputs,
    unwrapped,
)
from .analysis import analyze
from .config import Config
from .errors import CompileError, ConfigError
from .following import check_model, follow
from .passes import run_passes
from .passes._naming import call_sites
from .passes.fuse_weight_grad import fuse_weight_grad
from .passes.lower import lower_codecs, start_compiling_bodies
from .passes.partition import baseline, partition
from .plan import Plan, Role
from .planner import make_plan
from .rng import next_seed
from .sample_pruning import prune_by_samples
from .sensitivity import Probe
from .solving import found_plan, solved_again

log = logging.getLogger(__name__)


def act(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles one graph of Dynamo's; registered as the backend "act".

    Args:
        graph: The model's operators, parameters lifted to inputs.
        inputs: Fake tensors and sizes, one per placeholder.
        mode: A mode of torch.compile, handed on to Inductor.
        options: Fields of ``Config``; "mode" as above; "inductor", a dict of Inductor's settings.

    Raises:
        ConfigError: For options that are no settings, or a plan of another model.
        CompileError: When the machine lacks what the lowering needs.
    """
    try:
        config, settings = read_options(mode, options)
        return compile_graph(graph, inputs, config, settings)
    except (ConfigError, CompileError) as error:
        raise unwrapped(error) from error.__cause__


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
    """The settings of this package and those of Inductor."""
    given = dict(options or {})
    mode, inductor = given.pop("mode", mode), given.pop("inductor", {})
    if not isinstance(inductor, dict):
        raise ConfigError(f"inductor must be a dict of Inductor's settings, got {inductor!r}")
    ready = given.pop("config", None)
    config = ready if isinstance(ready, Config) and not given else Config.from_options(given)
    return config.resolved(), {**mode_options(mode), **inductor}


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], config: Config, settings: dict[str, Any]
) -> Callable[..., Any]:
    """Compiles a training graph with compressed activations; a graph without a backward goes to Inductor untouched."""
    interpret = interpret_plainly if config.lowering == "eager" else None
    # What is interpreted before it is compiled, has to save the same tensors.
    settings = {**random_settings(config.lowering), **settings}
    device = _device(inputs)
    if interpret is None and device.type == "cpu":
        check_cpp_compiler()
    if not torch.is_grad_enabled() or not any(_requires_grad(value) for value in inputs):
        return compile_pair(graph, inputs, partitioner=None, interpret=interpret, settings=settings)
    roles = [
        input_role(node, value, config.padding)
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    _check_padding(config, roles)
    sites = call_sites(graph.graph)
    if isinstance(config.plan, Plan):
        check_model(config.plan, sites, is_part_of_model())
    record = records.add(config, roles, sites, settings)
    if config.pruning == "samples":
        return prune_by_samples(graph, inputs, config, record)
    seeded, fake_seed = add_scalar_input(graph, "actcompile_seed", torch.zeros((), dtype=torch.int64, device=device))
    roles = [*roles, Role.SEED]
    # What Dynamo made of the inputs is there once only; later they would be traced with dynamic shapes.
    values = traced_inputs(seeded, [*inputs, fake_seed])

    def compile_with(plan: Plan | None, interpret: Interpret | None) -> Callable[..., Any]:
        partitioner = Partitioner(config, roles, record, plan, lowered=interpret is None)
        return compile_pair(copied(seeded), values, partitioner=partitioner, interpret=interpret, settings=settings)

    compiled = Probed(record, compile_with, interpret) if config.automatic else compile_with(None, interpret)

    def run(*args: Any) -> Any:
        record.see_parameters(args)
        # Where DDP cuts a model into parts, each is called with fake tensors first: that is no step.
        traced = next((value for value in args if is_fake(value)), None)
        seed = (
            next_seed(config.seed, device) if traced is None else traced.new_zeros((), dtype=torch.int64, device=device)
        )
        return compiled(*args, seed)

    return run


class Probed:
    """A graph that is interpreted until its first backward was probed, and then compiled with the plan solved.

    Forwards before that backward, of validation too, are interpreted as well. Where the same code was probed at other
    sizes, its plan is there at the first call, and nothing is interpreted. With ``profile_every`` the interpreted graph
    takes its turn again, and the code stays as it is unless another plan is worth compiling it again.
    """

    def __init__(
        self,
        record: records.GraphRecord,
        compile_with: Callable[[Plan | None, Interpret | None], Callable[..., Any]],
        interpret: Interpret | None,
    ) -> None:
        config = record.config
        self._probe = record.probe = Probe(
            record.roles, prunings=config.prunings, rows=config.rows, is_choosy=config.prunes_seldom
        )
        self._record = record
        self._reenter = reentrant_tracing()
        self._interpreted = compile_with(None, self._probe.interpret)
        self._compile: Callable[[Plan], Callable[..., Any]] = lambda plan: compile_with(plan, interpret)
        self._compiled: Callable[..., Any] | None = None
        self._plan = Plan()
        self._is_probing = True
        self._num_steps = 0

    def __call__(self, *args: Any) -> Any:
        if self._is_probing:
            self._finish_probing()
        elif self._num_steps == self._record.config.profile_every:
            self._probe.arm()
            self._is_probing = True
        if self._compiled is None or self._is_probing:
            return self._interpreted(*args)
        self._num_steps += 1
        return self._compiled(*args)

    def _finish_probing(self) -> None:
        """Once a backward was probed, compiles the plan that this leads to, unless it is there already."""
        if self._compiled is None:
            plan = found_plan(self._record)
            if plan is None:
                return
        elif self._probe.is_armed:
            return
        else:
            plan = solved_again(self._record, self._plan, self._num_steps)
        if plan is not None:
            with self._reenter():
                self._compiled = self._compile(plan)
            self._plan = plan
        self._is_probing, self._num_steps = False, 0


class Partitioner(CustomPartitionerFn):  # type: ignore[misc]
    """Splits a joint graph and rewrites the two halves by the plan of ``config``."""

    def __init__(
        self,
        config: Config,
        roles: Sequence[Role],
        record: records.GraphRecord,
        plan: Plan | None = None,
        lowered: bool = True,
    ) -> None:
        self.config = config
        self.roles = roles
        self.record = record
        self.plan = plan
        self.lowered = lowered

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Called by AOTAutograd with the joint graph."""
        if not self.lowered:
            count_in_signed_integers(gm)
        self.record.count_baseline = baseline(gm, joint_inputs, **kwargs)
        pair = partition(
            gm,
            joint_inputs,
            recompute=self.config.partition_mode,
            lossy=self.config.lossy,
            input_roles=self.roles,
            **kwargs,
        )
        rows = analyze(pair)
        given = self.config.plan if self.plan is None else self.plan
        if isinstance(given, Plan):
            plan = follow(given, rows, self.config)
        else:
            plan = make_plan(rows, self.config, self.record.budget_nbytes())
        run_passes(pair, plan)
        if self.lowered:
            lower_codecs(pair, plan)
            fuse_weight_grad(pair, plan)
            start_compiling_bodies(pair)
        self.record.finish(rows, plan, pair)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", self.record.summary())
        return pair.forward, pair.backward

    def __reduce__(self) -> tuple[Callable[[object], object], tuple[object]]:
        """Copies and pickles are the uuid: Inductor's cache makes them of all its settings, and keeps them."""
        return _identity, (self.uuid(),)

    def uuid(self) -> object:
        """What the compiled code depends on besides the graph: this package's sources and the settings."""
        return get_hash_for_files(_sources(), repr((self.config, self.plan)))


def _identity(value: object) -> object:
    return value


@functools.cache
def _sources() -> tuple[str, ...]:
    packages = (sys.modules[f"actcompile{name}"] for name in ("", ".passes", ".triton_kernels"))
    folders = (Path(path) for package in packages for path in package.__path__)
    return tuple(sorted(str(source) for folder in folders for source in folder.glob("*.py")))


def input_role(placeholder: fx.Node, value: Any, padding: str | None = None) -> Role:
    """Who holds a graph input besides the graph; ``padding`` names the model's argument that marks padding."""
    example = placeholder.meta.get("example_value", value)
    if not isinstance(example, torch.Tensor):
        return Role.INPUT
    if isinstance(example, torch.nn.Parameter) or getattr(example, "_is_param", False):
        return Role.PARAMETER
    if example.requires_grad:
        return Role.PARAMETER if example.is_leaf else Role.BOUNDARY
    if padding is not None and argument_name(placeholder) == padding:
        return Role.PADDING
    return Role.BUFFER if belongs_to_module(placeholder) else Role.INPUT


def _check_padding(config: Config, roles: Sequence[Role]) -> None:
    """Raises ConfigError where no input marks padding, unless other graphs come before this one and may have it."""
    if config.padding is None or Role.PADDING in roles:
        return
    rule = f"padding must name an argument of the model that marks padding, got padding={config.padding!r}"
    if Role.BOUNDARY not in roles:
        raise ConfigError(f"{rule}, which no input of the graph has: name one of the model's arguments")
    log.warning("%s, which a later part of the model does not read: there, rows of padding are sampled as others", rule)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _device(inputs: Sequence[Any]) -> torch.device:
    """The device of the graph: that of its first input on an accelerator, else the CPU."""
    devices = [value.device for value in inputs if isinstance(value, torch.Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
