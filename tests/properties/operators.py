"""What the random programs are made of: one line of Python per operator, with holes for what it reads.

``{a}`` and ``{b}`` are floating-point tensors, ``{i}`` integers, ``{c}`` bools, ``{d}`` a dimension, ``{m}`` a tensor
that the step may write: a buffer, an input or an intermediate value; ``{g}`` a buffer or an input. A line that PyTorch
refuses for the shapes that were drawn is left out of the program.
"""

POINTWISE = (
    *("torch.sin({a})", "torch.tanh({a})", "{a}.relu()", "F.gelu({a})", "F.silu({a})", "torch.sigmoid({a})"),
    *("{a}.square()", "{a}.abs()", "F.softplus({a})", "F.elu({a})", "torch.exp(-{a}.square())", "F.mish({a})"),
    *("torch.log1p({a}.abs())", "torch.sqrt({a}.abs() + 1)", "F.hardswish({a})", "{a}.clamp(-1, 1)", "1 - {a}"),
    *("torch.erf({a})", "{a} * 0.5", "{a} + 1", "{a}.float()", "{a}.double()", "{a}.to(torch.bfloat16)"),
    *(
        "torch.cos({a} * {a})",
        "{a} ** 3 * 0.1",
        "F.leaky_relu({a}, 0.1)",
        "{a}.detach()",
        "torch.exp({a}.clamp(max=2))",
    ),
)
SHAPES = (
    *("{a}.transpose(0, -1)", "{a}.flatten()", "{a}.unsqueeze({d})", "{a}[1:]", "{a}[::2]", "{a}[..., 0]", "{a}[0]"),
    *("{a}.unsqueeze(-1).expand(*{a}.shape, 3)", "{a}.flip(0)", "{a}.chunk(2, -1)[0]", "{a}.contiguous()"),
    *("{a}.clone()", "{a}.reshape(-1, {a}.shape[-1])", "F.pad({a}, (1, 0))", "{a}.roll(1, 0)", "torch.tril({a})"),
    *("{a}.movedim(0, -1)", "{a}.narrow(-1, 0, 2)", "{a}.repeat_interleave(2, -1)", "{a}.split(2, -1)[-1]"),
    *("{a}.view(-1)", "torch.diagonal({a}, 0, 0, -1)", "{a}.squeeze({d})", "{a}[:, 1:3]", "{a}.T.contiguous().T"),
)
REDUCTIONS = (
    *("{a}.sum({d})", "{a}.mean(-1, keepdim=True)", "{a}.amax({d})", "{a}.var(-1, correction=0)", "{a}.cumsum({d})"),
    *("torch.logsumexp({a}, {d})", "{a}.softmax({d})", "F.log_softmax({a}, {d})", "F.layer_norm({a}, {a}.shape[-1:])"),
    *("{a}.max({d})[0]", "{a}.sort({d})[0]", "{a}.topk(2, -1)[0]", "{a}.median({d})[0]", "{a}.cummax({d})[0]"),
    *("F.normalize({a} + 2, dim=-1)", "{a}.mean()", "F.rms_norm({a}, {a}.shape[-1:])", "{a}.prod(-1)"),
    *("F.batch_norm({a}, self.mean, self.var, training=True)", "F.max_pool1d({a}.unsqueeze(0), 2)[0]"),
)
PAIRS = (
    *(
        "{a} + {b}",
        "{a} * {b}",
        "{a} - {b}",
        "torch.maximum({a}, {b})",
        "{a} / ({b}.abs() + 1)",
        "torch.lerp({a}, {b}, 0.3)",
    ),
    *("torch.where({a} > 0, {a}, {b})", "torch.where({c}, {a}, {b})", "torch.cat([{a}, {b}], {d})"),
    *("torch.stack([{a}, {b}])", "torch.atan2({a}, {b}.abs() + 1)", "{a} @ {b}", "{a} @ {b}.mT", "{a}.mT @ {b}"),
    *("F.linear({a}, {b})", "F.smooth_l1_loss({a}, {b}, reduction='none')", "{a} @ {b}", "{a} @ {b}", "{a} * {b}"),
    *("torch.cat([{a}, torch.sin({b})], -1)", "{a}.masked_fill({c}, 0.5)", "{a} * {c}", "torch.sin({a} * {b})"),
)
INDEXING = (
    *("{a}[{i} % {a}.shape[0]]", "F.embedding({i} % {a}.shape[0], {a})", "{a}.gather({d}, {a}.argsort({d}))"),
    *("torch.take_along_dim({a}, {a}.argmax({d}, keepdim=True), {d})", "{a}[:, {i} % {a}.shape[1]]"),
    *("{a}.index_add(0, {i} % {a}.shape[0], {b})", "{a} * {i}", "{a}.gather(-1, {a}.topk(2, -1)[1])"),
    *("torch.zeros_like({a}).index_copy(0, {a}.argsort(0)[:, 0], {a})", "{a} + F.one_hot({i} % 4, 4)"),
    *("{a} * {a}.argmax({d}, keepdim=True)", "F.embedding({i} % {a}.shape[0], {a}) * torch.sin({b})"),
)
# What trains is multiplied by larger values made of buffers and data, which a backward would rather compute again.
CONSTANTS = (
    *("(torch.sin({g}.unsqueeze(-1) * {g}.unsqueeze(-2)) * {a}.mean()).sum(-1)", "{a} * torch.sin({g})"),
    *("(torch.tanh({g}.unsqueeze(-1) + torch.arange(6)) * self.p1).sum(-1)", "{a} + torch.cos({g}) * {b}"),
    *("F.embedding({i} % {g}.shape[0], {g}) * {a}.sum()", "(torch.cos({g}[{i} % {g}.shape[0]]) * {a}.mean()).sum(0)"),
    *(
        "{g} @ {a}",
        "torch.where({g} > 0, {a}, {b})",
        "{a} * {g}",
        "F.normalize({g} + 2, dim=-1) * {a}",
        "{g} * {a}.mean()",
    ),
    *("(torch.exp(-({g}.unsqueeze(-1) - {a}.mean()).square())).sum(-1)", "{a} + ({g}.unsqueeze(-1) * self.p1).sum()"),
)
INTEGERS = (
    *("{a}.argmax({d})", "{a}.argsort({d})", "{a}.topk(2, -1)[1]", "{a}.max({d})[1]", "{a}.sort({d})[1]"),
    *("({a} > 0).sum(0)", "{i} + 1", "{i} * 3 // 2", "{a}.clamp(-3, 3).round().long()", "torch.arange({a}.shape[0])"),
    *("{a}.argmin()", "{a}.cummax({d})[1]", "{a}.min({d})[1]", "{i}.cumsum(0)", "{i}[::2]", "{a}.median({d})[1]"),
)
BOOLS = ("{a} > 0", "{a} <= {b}", "~{c}", "{i} % 2 == 0", "{a}.isfinite()")

# Statements; the value keeps its name.
WRITES = (
    *("{m}.mul_(-1)", "{m}.add_(1)", "{m}.add_({a})", "{m}[0] = 0.5", "{m}[..., 0].mul_(2)", "{m}.copy_({a})"),
    *("{m}.transpose(0, -1).mul_(0.5)", "{m}.clamp_(-1, 1)", "{m}[{i} % {m}.shape[0]] = 0.25", "{m}[::2].zero_()"),
    *("{m}.view(-1).sub_(0.5)", "{m}.lerp_({a}, 0.3)", "{m}.index_add_(0, {i} % {m}.shape[0], {a})", "{m}.tanh_()"),
    *("{m}.masked_fill_({c}, 0.5)", "{m}.zero_()", "self.count.add_(1)", "{m}.mul_(self.count)", "{m}.set_({m} * 2)"),
)

# Kind of what a line yields -> its operators, those that come up more often more than once.
FLOATS = (*POINTWISE, *SHAPES, *REDUCTIONS, *PAIRS, *INDEXING)
