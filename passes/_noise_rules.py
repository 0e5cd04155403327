"""What operators do to noise in what they read: the tables that say where rounding noise may pass.

Nobody lists what is dangerous. An operator that stands in no table here, and that ``_bounded.py`` cannot show to be
harmless, is taken to do anything.
"""

from collections.abc import Mapping
from typing import Any

import torch

from ._views import ALIAS_LIST_OPS, ALIAS_OPS, VIEW_OPS

aten, prims = torch.ops.aten, torch.ops.prims

# Each result holds elements of the first argument, moved, repeated or left out.
_MOVES = (
    *(VIEW_OPS | ALIAS_OPS | ALIAS_LIST_OPS),
    aten.clone.default,
    aten.repeat.default,
    aten.flip.default,
    aten.roll.default,
    aten.unfold.default,
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_select.default,
    aten.gather.default,
    aten.take.default,
    aten.embedding.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.tril.default,
    aten.triu.default,
    aten.diag_embed.default,
    aten.diagonal_copy.default,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.masked_fill.Scalar,
    aten.real.default,
    aten.imag.default,
    aten.view_as_real.default,
    aten.view_as_complex.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.positive.default,
    aten.lift_fresh_copy.default,
    prims.convert_element_type.default,
    aten._to_copy.default,
)
# Each result is a sum of elements of the first argument with weights that do not depend on it.
_SUMS = (
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.cumsum.default,
    aten.trace.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten._adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool3d.default,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten.upsample_linear1d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_bicubic2d.default,
    aten.upsample_trilinear3d.default,
    aten._upsample_bilinear2d_aa.default,
    aten.im2col.default,
    aten.col2im.default,
    aten._fft_r2c.default,
    aten._fft_c2r.default,
    aten._fft_c2c.default,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
)

# Operator -> positions of the arguments in which its result is linear, the others given.
LINEAR: Mapping[Any, tuple[int, ...]] = {
    **dict.fromkeys((*_MOVES, *_SUMS), (0,)),
    aten.add.Tensor: (0, 1),
    aten.sub.Tensor: (0, 1),
    aten.rsub.Tensor: (0, 1),
    aten.mul.Tensor: (0, 1),
    aten.div.Tensor: (0,),
    aten.where.self: (1, 2),
    aten.where.ScalarSelf: (2,),
    aten.where.ScalarOther: (1,),
    aten.masked_fill.Tensor: (0, 2),
    aten.lerp.Scalar: (0, 1),
    aten.addcmul.default: (0, 1, 2),
    aten.addcdiv.default: (0, 1),
    prims.fma.default: (0, 1, 2),
    aten.cat.default: (0,),
    aten.stack.default: (0,),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (0, 1, 2),
    aten.addmv.default: (0, 1, 2),
    aten.addbmm.default: (0, 1, 2),
    aten.baddbmm.default: (0, 1, 2),
    aten.convolution.default: (0, 1, 2),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.as_strided_scatter.default: (0, 1),
    aten.diagonal_scatter.default: (0, 1),
    aten.scatter.src: (0, 3),
    aten.scatter.value: (0,),
    aten.scatter_add.default: (0, 3),
    aten.index_add.default: (0, 3),
    aten.index_copy.default: (0, 3),
    aten.index_fill.int_Scalar: (0,),
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
    aten.masked_scatter.default: (0, 2),
    # Of two, the larger: an error comes out no larger than it went in, and with its own sign.
    aten.maximum.default: (0, 1),
    aten.minimum.default: (0, 1),
    # Attention: rerun_attention.py runs it again where its backward does, which is its gradient at a point nearby.
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention.default: (0, 1, 2),
    aten._scaled_dot_product_efficient_attention.default: (0, 1, 2, 3),
    aten._scaled_dot_product_cudnn_attention.default: (0, 1, 2, 3),
    # Kinks, with slopes of at most one.
    aten.relu.default: (0,),
    aten.abs.default: (0,),
    aten.clamp.default: (0,),
    aten.clamp_min.default: (0,),
    aten.clamp_max.default: (0,),
    aten.hardtanh.default: (0,),
    aten.leaky_relu.default: (0,),
}

# Of these, elements of one argument meet the same elements of another: what both are made of enters squared.
PRODUCTS = frozenset({aten.mul.Tensor, aten.addcmul.default, prims.fma.default})

# Backward operators -> positions of what the forward computed, in which they are linear, or which they read only the
# shape of. That of attention runs on what its forward makes of the same operands (rerun_attention.py).
LINEAR_BACKWARD: Mapping[Any, tuple[int, ...]] = {
    aten.convolution_backward.default: (1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 2, 3, 4, 5),
    aten._scaled_dot_product_flash_attention_backward.default: (1, 2, 3, 4, 5),
    aten._scaled_dot_product_efficient_attention_backward.default: (1, 2, 3, 4, 5, 6),
    aten._scaled_dot_product_cudnn_attention_backward.default: (1, 2, 3, 4, 5),
    aten.native_layer_norm_backward.default: (1, 5, 6),
    aten.native_group_norm_backward.default: (1, 4),
    aten.native_batch_norm_backward.default: (1, 2),
    aten.cudnn_batch_norm_backward.default: (0, 2),
    aten.miopen_batch_norm_backward.default: (0, 2),
    aten._fused_rms_norm_backward.default: (1, 4),
    aten._softmax_backward_data.default: (1,),
    aten.max_pool2d_with_indices_backward.default: (1,),
    aten.max_pool3d_with_indices_backward.default: (1,),
    aten.adaptive_max_pool2d_backward.default: (1,),
    aten.adaptive_max_pool3d_backward.default: (1,),
    aten.avg_pool2d_backward.default: (1,),
    aten.avg_pool3d_backward.default: (1,),
    aten._adaptive_avg_pool2d_backward.default: (1,),
    aten._adaptive_avg_pool3d_backward.default: (1,),
    aten.reflection_pad1d_backward.default: (1,),
    aten.reflection_pad2d_backward.default: (1,),
    aten.replication_pad2d_backward.default: (1,),
}

# Names of operators that factorize, invert or solve, to begin with.
FACTORIZATIONS = (
    "linalg",
    "cholesky",
    "lu_",
    "triangular_solve",
    "geqrf",
    "ormqr",
    "svd",
    "symeig",
    "inverse",
    "logdet",
)
