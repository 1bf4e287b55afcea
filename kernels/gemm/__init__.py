"""Matrix products."""

from .grouped import grouped_gemm, grouped_gemm_reference, grouped_gemm_weight_gradient

__all__ = ["grouped_gemm", "grouped_gemm_reference", "grouped_gemm_weight_gradient"]
