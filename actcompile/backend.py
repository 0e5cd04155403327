"""The backend: ``torch.compile(model, backend="act")``.

graph from Dynamo                                     act
  + one more input, the seed of the rounding noise    _torch.add_scalar_input
  -> Inductor, which traces forward and backward      _torch.compile_pair
     -> partition                                     passes/partition.py
     -> rows of what is saved                         analysis.py
     -> plan                                          planner.py, or following.py where one is given
     -> rewritten forward and backward                passes/
  -> Triton or C++ code, or an interpreter            lowering="eager"
  or all of it from torch's caches                    warm_start.py
"""

import functools
import hashlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from . import records, steps
from ._config_checks import without_effect
from ._inductor_options import check_compiles, check_inductor, without_effect_beside
from ._patterns import warn
from ._torch import (
    CustomPartitionerFn,
    Interpret,
    add_scalar_input,
    argument_name,
    belongs_to_module,
    check_cpp_compiler,
    compile_pair,
    count_in_signed_integers,
    get_hash_for_files,
    hands_on,
    interpret_plainly,
    is_fake,
    is_made_inside,
    is_part_of_model,
    mode_options,
    random_settings,
    reentrant_tracing,
    traced_inputs,
    unwrapped,
)
from .analysis import analyze
from .checking import Checked
from .config import Config
from .errors import CompileError, ConfigError
from .following import OutdatedPlanError, check_model, check_rows, follow, settings_anew
from .passes import run_passes
from .passes._naming import call_sites
from .passes.crossing import crossings
from .passes.fuse_weight_grad import fuse_weight_grad
from .passes.lower import Bodies, lower_codecs, start_compiling_bodies
from .passes.partition import baseline, is_region, partition, partition_region
from .passes.weight_operands import is_weight_operand
from .plan import Plan, Role
from .planner import make_plan
from .rng import next_seed
from .sample_pruning import prune_by_samples
from .sensitivity import Probe
from .solving import found_plan, replan, solved_again, solved_plan
from .warm_start import Found, Kept, Traced, load_or_compile

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
    check_inductor(inductor)
    ready = given.pop("config", None)
    config = ready if isinstance(ready, Config) and not given else Config.from_options(given)
    warn([*without_effect(config), *without_effect_beside(config.lowering, mode, inductor)])
    return config.resolved(), {**mode_options(mode), **inductor}


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], config: Config, settings: dict[str, Any]
) -> Callable[..., Any]:
    """Compiles a training graph with compressed activations; a graph without a backward goes to Inductor untouched.

    Where a plan's file was written under another torch, which saved other tensors, the graph is probed again.
    """
    plan = config.plan
    if not isinstance(plan, Plan) or not plan.is_of_another_torch:
        return _compile_graph(graph, inputs, config, settings)
    reenter = reentrant_tracing()
    try:
        return _compile_graph(graph, inputs, config, settings)
    except OutdatedPlanError as reason:
        log.warning(
            "plan was made with torch %s, and under %s %s: this graph is probed again; write the plan anew",
            *(plan.torch, torch.__version__, reason),
        )
    with reenter():
        return _compile_graph(graph, inputs, settings_anew(plan, config), settings)


def _compile_graph(
    graph: fx.GraphModule, inputs: Sequence[Any], config: Config, settings: dict[str, Any]
) -> Callable[..., Any]:
    interpret = interpret_plainly if config.lowering == "eager" else None
    # What is interpreted before it is compiled, has to save the same tensors.
    settings = {**random_settings(config.lowering), **settings}
    device = _device(inputs)
    if interpret is None and device.type == "cpu":
        check_cpp_compiler()
    if not torch.is_grad_enabled() or not any(_requires_grad(value) for value in inputs):
        records.note_inference()
        return compile_pair(graph, inputs, partitioner=None, interpret=interpret, settings=settings)
    check_compiles(settings)
    roles = [
        input_role(node, value, config.padding)
        for node, value in zip(graph.graph.find_nodes(op="placeholder"), inputs, strict=True)
    ]
    _check_padding(config, roles)
    sites = call_sites(graph.graph)
    if isinstance(config.plan, Plan):
        check_model(config.plan, sites, is_part_of_model())
    record, is_part = records.add(config, roles, sites, settings), hands_on(graph)
    tensors = [pair for pair in zip(roles, inputs, strict=True) if isinstance(pair[1], torch.Tensor)]
    record.need_gradients = tuple((role, value.requires_grad) for role, value in tensors)
    if config.pruning == "samples":
        return prune_by_samples(graph, inputs, config, record)
    seeded, fake_seed = add_scalar_input(graph, "actcompile_seed", torch.zeros((), dtype=torch.int64, device=device))
    roles = [*roles, Role.SEED]
    # What Dynamo made of the inputs is there once only; later they would be traced with dynamic shapes.
    values = traced_inputs(seeded, [*inputs, fake_seed])

    traced = Traced(seeded, values, settings)

    def compile_with(plan: Plan | None, interpret: Interpret | None) -> Callable[..., Any]:
        partitioner = Partitioner(config, roles, record, plan, interpret is None, is_part, traced)
        return load_or_compile(traced, partitioner, interpret)

    def finish(plan: Plan | None) -> Callable[..., Any]:
        return Checked(record, compile_with, interpret, plan) if config.check else compile_with(plan, interpret)

    compiled: Callable[..., Any]
    if config.automatic:
        compiled = Probed(record, compile_with, finish)
    elif isinstance(config.memory, int | str):
        compiled = Uniform(record, finish)
    else:
        compiled = finish(None)

    def run(*args: Any) -> Any:
        record.see_parameters(args)
        # Where DDP cuts a model into parts, each is called with fake tensors first: that is no step.
        traced = next((value for value in args if is_fake(value)), None)
        seed = (
            next_seed(config.seed, device) if traced is None else traced.new_zeros((), dtype=torch.int64, device=device)
        )
        steps.begin()
        outputs = compiled(*args, seed)
        steps.note(record, args, outputs)
        return outputs

    return run


class Uniform:
    """A graph that is compiled at once; and again where the calls of a step take more than ``memory`` together, as is
    known once the first step is complete.
    """

    def __init__(self, record: records.GraphRecord, finish: Callable[[Plan | None], Callable[..., Any]]) -> None:
        self._record = record
        self._reenter = reentrant_tracing()
        self._compile = finish
        self._compiled = finish(None)
        self._plan, self._companions = record.solved, record.companions

    def __call__(self, *args: Any) -> Any:
        if self._record.companions != self._companions:
            self._companions = self._record.companions
            replan(self._record)
        if self._record.solved is not self._plan:
            self._plan = self._record.solved
            assert self._plan is not None
            with self._reenter():
                self._compiled = self._compile(self._plan)
        return self._compiled(*args)


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
        finish: Callable[[Plan | None], Callable[..., Any]],
    ) -> None:
        config = record.config
        self._probe = record.probe = Probe(
            record.roles, prunings=config.prunings, rows=config.rows, is_choosy=config.prunes_seldom
        )
        self._record = record
        self._reenter = reentrant_tracing()
        self._interpreted = compile_with(None, self._probe.interpret)
        self._compile = finish
        self._compiled: Callable[..., Any] | None = None
        self._plan = Plan()
        self._is_probing = True
        self._num_steps = 0
        self._companions = record.companions

    def __call__(self, *args: Any) -> Any:
        if self._compiled is not None and self._record.companions != self._companions:
            self._companions = self._record.companions
            replan(self._record)
        if self._is_probing:
            self._finish_probing()
        elif self._record.solved is None and self._record.own_profile is not None:
            self._follow(solved_plan(self._record))
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
            self._follow(plan)
        self._is_probing, self._num_steps = False, 0

    def _follow(self, plan: Plan) -> None:
        with self._reenter():
            self._compiled = self._compile(plan)
        self._plan, self._companions = plan, self._record.companions


class Partitioner(CustomPartitionerFn):  # type: ignore[misc]
    """Splits a joint graph and rewrites the two halves by the plan of ``config``."""

    def __init__(
        self,
        config: Config,
        roles: Sequence[Role],
        record: records.GraphRecord,
        plan: Plan | None = None,
        lowered: bool = True,
        is_part: bool = False,
        traced: Traced | None = None,
    ) -> None:
        self.config = config
        self.roles = roles
        self.record = record
        self.plan = plan
        self.lowered = lowered
        self.is_part = is_part
        self.traced = traced
        self.kept = Kept()

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Called by AOTAutograd with the joint graph, after those of regions inside of it."""
        if not self.lowered:
            count_in_signed_integers(gm)
        if is_region(gm, self.roles):
            return partition_region(gm, joint_inputs, **kwargs)
        self.record.count_baseline = baseline(gm, joint_inputs, self.roles, **kwargs)
        if self.record.check is not None:
            inputs = [] if self.traced is None else self.traced.graph.graph.find_nodes(op="placeholder")
            names = [node.name for node in inputs]
            self.record.check.see_joint(gm, kwargs["num_fwd_outputs"], self.roles, names)
        pair = partition(
            gm,
            joint_inputs,
            recompute=self.config.partition_mode,
            lossy=self.config.lossy,
            input_roles=self.roles,
            is_part=self.is_part,
            **kwargs,
        )
        rows, self.record.crossings = analyze(pair), crossings(pair)
        given = self.config.plan if self.plan is None else self.plan
        if isinstance(given, Plan):
            check_rows(given, rows)
            plan = follow(given, rows, self.config)
        else:
            plan = make_plan(rows, self.config, self.record.budget_nbytes())
        run_passes(pair, plan)
        if self.lowered:
            lower_codecs(pair, plan)
            fuse_weight_grad(pair, plan)
            start_compiling_bodies(pair)
        self.record.finish(rows, plan, pair)
        if self.traced is not None:
            self.kept.hang_on(pair.backward, Found.by(self.record, Bodies.of(pair), self.traced.names))
        if log.isEnabledFor(logging.INFO):
            log.info("%s", self.record.summary())
        return pair.forward, pair.backward

    def for_record(self, record: records.GraphRecord) -> "Partitioner":
        """The same, filling in another record."""
        return Partitioner(self.config, self.roles, record, self.plan, self.lowered, self.is_part, self.traced)

    def __reduce__(self) -> tuple[Callable[[object], object], tuple[object]]:
        """Copies and pickles are the uuid: Inductor's cache makes them of all its settings, and keeps them."""
        return _identity, (self.uuid(),)

    def uuid(self) -> object:
        """What the compiled code depends on besides the graph: this package's sources and the settings.

        Dynamo's graph becomes the two that are compiled by the roles, names and sizes of its tensors; those two hold
        what came of these.
        """
        known: list[object] = [_sources(), self.config, self.plan]
        if self.traced is not None and self.kept.found is None:
            known += [self.roles, self.is_part, self.record.num_calls]
            known += [self.traced.names.key(), self.traced.sizes]
        return hashlib.sha256(repr(known).encode()).digest()


def _identity(value: object) -> object:
    return value


@functools.cache
def _sources() -> bytes:
    """A hash of all files of this package, sources of kernels and tables of measured times among them."""
    packages = (sys.modules[f"actcompile{name}"] for name in ("", ".passes", ".triton_kernels"))
    folders = (Path(path) for package in packages for path in package.__path__)
    paths = sorted(str(path) for folder in folders for path in folder.iterdir() if path.is_file())
    return get_hash_for_files(tuple(paths))


def input_role(placeholder: fx.Node, value: Any, padding: str | None = None) -> Role:
    """Who holds a graph input besides the graph; ``padding`` names the model's argument that marks padding.

    1. A parameter is one by its type, as part of a module that needs a gradient (FSDP and functional_call put views of
       other tensors there), or where operators read it as their weight alone. A buffer is any other part of a module.
    2. A leaf that needs a gradient, or a view of one, is held by autograd until the gradient is there: an input.
    3. What else needs a gradient is an activation of an earlier graph, or of the caller's: a boundary.
    4. What needs none is a boundary where the compiled call itself computed it, in an earlier graph or between two; an
       argument of the call is an input.
    """
    example = placeholder.meta.get("example_value", value)
    if not isinstance(example, torch.Tensor):
        return Role.INPUT
    if isinstance(example, torch.nn.Parameter) or getattr(example, "_is_param", False):
        return Role.PARAMETER
    if belongs_to_module(placeholder):
        return Role.PARAMETER if example.requires_grad else Role.BUFFER
    if is_weight_operand(placeholder):
        return Role.PARAMETER if example.requires_grad else Role.BUFFER
    if example.requires_grad:
        return Role.INPUT if _is_held_by_autograd(example) else Role.BOUNDARY
    if padding is not None and argument_name(placeholder) == padding:
        return Role.PADDING
    return Role.BOUNDARY if is_made_inside(placeholder) else Role.INPUT


def _is_held_by_autograd(value: torch.Tensor) -> bool:
    """Whether a tensor that needs a gradient is a leaf, or lies in the memory of one."""
    base = value._base if value._is_view() else value  # type: ignore[no-untyped-call]
    return base is not None and base.is_leaf and base.requires_grad


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
