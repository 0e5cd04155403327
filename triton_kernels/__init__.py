"""Storage formats: reference, operator and kernels of each. Importing this package defines the operators."""

from . import host_copy, pack_bool, quantize, rows, sparse_weight_grad, topk, weight_grad

__all__ = ["host_copy", "pack_bool", "quantize", "rows", "sparse_weight_grad", "topk", "weight_grad"]
