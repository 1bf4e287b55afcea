"""What a result is compared with."""

from .baselines import Baseline, NGrams, ngram_baselines, xz_baseline

__all__ = ["Baseline", "NGrams", "ngram_baselines", "xz_baseline"]
