"""What the Flax layers, of nnx and of linen, have in common. Those only make the parameters.

A layer is a window (`window`), what is computed with it (`convolution`, `transposed`, `local`,
`causal`), and what all have around it: batch dimensions, mask, dtypes and bias (`call`). Layers
of both kinds have settings of the same names, which is where these modules read them.
"""

from grouped_conv_jax.layers.convolution import Convolution

__all__ = ["Convolution"]
