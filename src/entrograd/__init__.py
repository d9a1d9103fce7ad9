"""entrograd: entropy-weighted GRPO as a reproducible pipeline."""

__version__ = "0.1.0"
