"""Back Razor's rule in Dynamo's graph: which calls are replaced, and that gradients are those of the rule."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from actcompile.passes._naming import called
from actcompile.passes._sample_operators import SampleOperators
from actcompile.passes.prune_samples import prune_samples

from . import back_razor_rule as rule


def compiled(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    options = {"pruning": "samples", "sparsity": rule.SPARSITY, "lowering": "eager", **options}
    return torch.compile(function, backend="act", options=options)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Those of the inputs that require one, along a fixed direction."""
    output = function(*inputs)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return torch.autograd.grad((output * direction).sum(), [value for value in inputs if value.requires_grad])


def assert_follows_rule(
    function: Callable[..., Tensor], by_rule: Callable[..., Tensor], inputs: list[Tensor], exact: set[int]
) -> None:
    """Gradients of float64 are those of the rule to rounding; ``exact`` are the only ones that eager has as well."""
    got, expected, dense = (gradients(call, inputs) for call in (compiled(function), by_rule, function))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(got, dense, strict=True)]
    assert {index for index, error in enumerate(errors) if error < 1e-11} == exact
    assert all(error > 1e-2 for index, error in enumerate(errors) if index not in exact)
    torch.testing.assert_close(compiled(function)(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(16, 12), (4, 6, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(shape: tuple[int, ...], has_bias: bool) -> None:
    inputs = [leaf(*shape), weight(10, 12), *([weight(10)] if has_bias else [])]
    assert_follows_rule(F.linear, rule.linear, inputs, exact={0, 2} if has_bias else {0})


def test_linear_in_float32_to_the_bit() -> None:
    """The input's gradient is that of eager, the weight's one product with the pruned input."""
    x, w, b = (
        torch.randn(4, 6, 12, requires_grad=True),
        nn.Parameter(torch.randn(10, 12)),
        nn.Parameter(torch.randn(10)),
    )
    grad = torch.randn(4, 6, 10)
    got = torch.autograd.grad(compiled(F.linear)(x, w, b), (x, w, b), grad)
    dense = torch.autograd.grad(F.linear(x, w, b), (x, w, b), grad)
    assert torch.equal(got[0], dense[0])
    assert torch.equal(got[1], grad.flatten(0, 1).t() @ rule.largest(x).flatten(0, 1))
    assert torch.equal(got[2], dense[2])


@pytest.mark.parametrize(
    ("function", "by_rule"),
    [
        (lambda x, w, b: x @ w + b, lambda x, w, b: rule.linear(x, w.t()) + b),
        (lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), lambda x, w, b: rule.linear(x.flatten(0, 1), w.t(), b)),
        (lambda x, w, b: x.matmul(w.t().contiguous().T) + b, lambda x, w, b: rule.linear(x, w.t()) + b),
    ],
)
def test_products_with_a_weight_are_linear_layers(
    function: Callable[..., Tensor], by_rule: Callable[..., Tensor]
) -> None:
    assert_follows_rule(function, by_rule, [leaf(4, 6, 12), weight(12, 10), weight(10)], exact={0, 2})


def test_layer_norm() -> None:
    for shape in ((12,), (6, 12)):
        inputs = [leaf(4, 6, 12), weight(*shape), weight(*shape)]
        assert_follows_rule(
            lambda x, w, b, shape=shape: F.layer_norm(x, shape, w, b),
            lambda x, w, b, shape=shape: rule.layer_norm(x, shape, w, b),
            inputs,
            exact={2},
        )


def test_gelu() -> None:
    """Exact at the input rounded to float16: close to eager, and not equal."""
    x = leaf(4, 64)
    got, expected, dense = (gradients(call, [x])[0] for call in (compiled(F.gelu), rule.gelu, F.gelu))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert 1e-6 < float((got - dense).norm() / dense.norm()) < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": (1, 2)},
        {"padding": (2, 0), "groups": 2},
    ],
)
def test_convolution(settings: dict[str, object]) -> None:
    inputs = [leaf(4, 4, 9, 9), weight(6, 4 // settings.get("groups", 1), 3, 3), weight(6)]  # type: ignore[operator]
    assert_follows_rule(
        lambda x, w, b: F.conv2d(x, w, b, **settings),
        lambda x, w, b: rule.conv2d(x, w, b, **settings),
        inputs,
        exact={0, 2},
    )


def heads(tokens: int = 7, batch: int = 3) -> list[Tensor]:
    return [leaf(batch, 2, tokens, 8) for _ in range(3)]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1)).div(8**0.5).softmax(dim=-1) @ v


def attention_by_rule(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    return rule.attend(rule.matmul(q, k.mT) * 8**-0.5 + bias, v)


def test_attention_of_single_steps() -> None:
    assert_follows_rule(attention, attention_by_rule, heads(), exact=set())


def test_attention_of_single_steps_with_masks_and_casts() -> None:
    """As Hugging Face writes it: an additive mask, softmax in a type of its own, dropout that drops nothing."""
    bias = torch.zeros(3, 1, 7, 7, dtype=torch.float64)
    bias[1, :, :, 5:] = -1e9

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * 8**-0.5 + bias
        p = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
        return torch.matmul(F.dropout(p, p=0.1, training=False), v)

    inputs = heads()
    assert_follows_rule(function, lambda *qkv: attention_by_rule(*qkv, bias), inputs, exact=set())


def test_attention_by_batched_products() -> None:
    """A head of a sample is a sample then."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * 8**-0.5, -1), v)

    assert_follows_rule(
        function, lambda *qkv: attention_by_rule(*(part.flatten(0, 1) for part in qkv)), heads(), exact=set()
    )


def test_probabilities_that_are_read_twice() -> None:
    """They are stored twice, and gradients are the same."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = F.softmax(q @ k.mT, -1)
        return p @ v + p.sum(-1, keepdim=True) * p.amax(-1, keepdim=True)

    def by_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = rule.softmax(rule.matmul(q, k.mT))
        return rule.matmul(p, v) + p.sum(-1, keepdim=True) * p.amax(-1, keepdim=True)

    assert_follows_rule(function, by_rule, heads(), exact=set())


CAUSAL = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
SEEN = torch.arange(7) < 5
BIAS = torch.linspace(-1, 1, 49, dtype=torch.float64).view(7, 7)


@pytest.mark.parametrize(
    ("settings", "bias"),
    [
        ({}, 0.0),
        ({"is_causal": True}, CAUSAL),
        ({"attn_mask": SEEN.expand(7, 7)}, torch.zeros(7, 7, dtype=torch.float64).masked_fill(~SEEN, -torch.inf)),
        ({"attn_mask": BIAS}, BIAS),
        ({"scale": 8**-0.5}, 0.0),
    ],
    ids=["plain", "causal", "mask", "bias", "scale"],
)
def test_fused_attention(settings: dict[str, object], bias: Tensor | float) -> None:
    assert_follows_rule(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **settings),
        lambda q, k, v: attention_by_rule(q, k, v, bias),
        heads(),
        exact=set(),
    )


def test_fused_attention_of_grouped_heads() -> None:
    inputs = [leaf(3, 4, 7, 8), leaf(3, 2, 7, 8), leaf(3, 2, 7, 8)]
    assert_follows_rule(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        lambda q, k, v: attention_by_rule(q, *(part.repeat_interleave(2, 1) for part in (k, v))),
        inputs,
        exact=set(),
    )


def test_queries_that_see_nothing_get_zeros() -> None:
    """As in torch: neither the result nor a gradient is nan."""
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    step = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask))
    inputs = heads()
    torch.testing.assert_close(step(*inputs), F.scaled_dot_product_attention(*inputs, mask))
    found = gradients(step, inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in found)
    assert not found[0][:, :, 3].any()


@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_with_dropout(is_fused: bool) -> None:
    """Drops after the softmax, and what is dropped is what the product with the values prunes."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if is_fused:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        return F.dropout(F.softmax(q @ k.mT * 8**-0.5, -1), 0.5) @ v

    def by_rule(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rule.matmul(F.dropout(rule.softmax(rule.matmul(q, k.mT) * 8**-0.5), 0.5), v)

    inputs, found = heads(), []
    for call in (compiled(function), by_rule):
        torch.manual_seed(3)
        found.append(gradients(call, inputs))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", ["none", "keys", "causal", "heads"])
def test_multi_head_attention(mask: str) -> None:
    """As of torch's own layer, with samples first whatever the order of its dimensions."""
    model = nn.MultiheadAttention(16, 2, batch_first=True).double()
    nn.init.normal_(model.in_proj_bias)
    hidden = {
        "none": {},
        "keys": {"key_padding_mask": torch.arange(6).expand(4, 6) > torch.tensor([[2], [3], [4], [5]])},
        "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
        "heads": {"attn_mask": torch.randn(8, 6, 6, dtype=torch.float64)},
    }[mask]
    bias: Tensor | float = 0.0
    if mask == "heads":
        bias = hidden["attn_mask"].view(4, 2, 6, 6)
    elif hidden:
        shape = (4, 1, 1, 6) if mask == "keys" else (6, 6)
        bias = torch.zeros(shape, dtype=torch.float64).masked_fill(next(iter(hidden.values())).view(shape), -torch.inf)

    def by_rule(x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = model.in_proj_weight.chunk(3), model.in_proj_bias.chunk(3)
        q, k, v = (
            rule.linear(x, w, b).unflatten(-1, (2, 8)).transpose(1, 2) for w, b in zip(weights, biases, strict=True)
        )
        return _linear(model.out_proj, attention_by_rule(q, k, v, bias).transpose(1, 2).flatten(2))

    inputs = [leaf(4, 6, 16), *model.parameters()]
    assert_follows_rule(
        lambda x, *parameters: model(x, x, x, need_weights=False, **hidden)[0], by_rule, inputs, exact={4}
    )


class Block(nn.Module):
    """A pre-norm transformer block, and the same by the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(part) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def by_rule(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(part) for part in _linear(self.qkv, _norm(self.norm1, x)).chunk(3, -1))
        y = attention_by_rule(q, k, v, torch.full((6, 6), -torch.inf, dtype=x.dtype).triu(1))
        x = x + _linear(self.out, y.transpose(1, 2).flatten(2))
        return x + _linear(self.down, rule.gelu(_linear(self.up, _norm(self.norm2, x))))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, 8)).transpose(1, 2)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return rule.linear(x, layer.weight, layer.bias)


def _norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return rule.layer_norm(x, (16,), layer.weight, layer.bias)


def test_transformer_block_over_several_steps() -> None:
    """Every parameter's gradient, at weights that change, from one graph."""
    model = Block().double()
    step = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        x, found = torch.randn(4, 6, 16, dtype=torch.float64), []
        for call in (model, model.by_rule, step):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            found.append(
                {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
            )
        dense, expected, got = found
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        errors = {name: float((got[name] - exact).norm() / exact.norm()) for name, exact in dense.items()}
        assert all(error > 0.01 for name, error in errors.items() if name.endswith("weight")), errors
        assert errors["down.bias"] < 1e-12
        optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def graph_of(function: Callable[..., object], *inputs: object) -> fx.Graph:
    """What Dynamo makes of a call."""
    found = []

    def backend(graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.append(graph.graph)
        return graph.forward

    torch.compile(function, backend=backend)(*inputs)
    return found[0]


def calls(graph: fx.Graph) -> list[str]:
    """Names of what is called, ours marked."""
    nodes = [node for node in graph.nodes if node.op.startswith("call")]
    ours = [isinstance(getattr(node.target, "__self__", None), SampleOperators) for node in nodes]
    return [("pruned " if own else "") + called(node) for node, own in zip(nodes, ours, strict=True)]


def test_rewritten_graph() -> None:
    graph = graph_of(lambda *qkv: F.layer_norm(attention(*qkv), (8,)), *heads())
    operators = SampleOperators(0.8)
    for _ in range(2):
        # A second time changes nothing.
        prune_samples(graph, operators)
        assert calls(graph) == ["transpose", "pruned matmul", "div", "pruned attend", "pruned layer_norm"]


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: (a @ b).relu(), [(3, 4, 5), (3, 5, 4)]),
        (lambda a, b: F.softmax(a, -1) * b, [(3, 4), (3, 4)]),
        (lambda a, b: torch.einsum("bij,bjk->bik", a, b), [(3, 4, 5), (3, 5, 4)]),
        (lambda a, b: F.conv2d(a, b), [(4, 9, 9), (6, 4, 3, 3)]),
        (lambda a, b: F.conv2d(a, b, padding="same"), [(2, 4, 9, 9), (6, 4, 2, 2)]),
        (lambda a, b: F.softmax(a.detach() @ b.detach(), -1) @ b.detach() + a.sum(), [(3, 4, 4), (3, 4, 4)]),
    ],
)
def test_other_graphs_stay_as_they_are(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    graph = graph_of(function, *(leaf(*shape) for shape in shapes))
    before = str(graph)
    prune_samples(graph, SampleOperators(0.8))
    assert str(graph) == before


def test_skipped_modules_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    graph = graph_of(model, torch.randn(4, 8))
    prune_samples(graph, SampleOperators(0.8), skip=("1",))
    assert calls(graph) == ["pruned linear", "linear"]
