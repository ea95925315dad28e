"""The collectives of compiled programs."""

from grouped_conv_jax.parallel.collectives import Collective, collectives

__all__ = ["Collective", "collectives"]
