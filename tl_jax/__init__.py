"""tl_jax: a transfer-learning laboratory in JAX."""

__version__ = "0.1.0"
