"""Matrix products."""

from .fp8 import fp8_gemm, fp8_gemm_reference
from .fp8_recipe import Fp8Recipe, Fp8Scales, Fp8Weight, amax_history_update, fp8_weight
from .fp8_training import fp8_linear, fp8_linear_input_gradient, fp8_linear_weight_gradient
from .grouped import grouped_gemm, grouped_gemm_reference, grouped_gemm_weight_gradient
from .nf4 import nf4_linear, nf4_linear_reference

__all__ = [
    "Fp8Recipe", "Fp8Scales", "Fp8Weight", "amax_history_update", "fp8_gemm", "fp8_gemm_reference",
    "fp8_linear", "fp8_linear_input_gradient", "fp8_linear_weight_gradient", "fp8_weight",
    "grouped_gemm", "grouped_gemm_reference", "grouped_gemm_weight_gradient", "nf4_linear",
    "nf4_linear_reference",
]  # fmt: skip
