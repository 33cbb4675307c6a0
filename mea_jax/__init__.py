"""mea_jax: Multi-head Explicit Attention (arXiv 2601.19611) in JAX and Flax, from laptop to pod."""

__version__ = "0.1.0"
