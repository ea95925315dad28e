"""The primitive's entries in the tables of JAX's less common transformations.

`primitive` registers the rules of differentiation, batching and lowering. Here are the others that
lax's convolution has, so that a program behaves the same with either:

- `checkify`: a NaN that a convolution makes is an error under `float_checks`.
- `jet`: Taylor coefficients, by the rule of bilinear functions.
- `roofline`: FLOPs of the pairs of an input and a tap that meet, and bytes of the three arrays.
- `jax.checkpoint`: `convs_saveable` is a policy that saves convolutions.

`jax.experimental.sparse.sparsify` has no entry. JAX's own is for one dimension, one feature and one
group only. Without one, `sparsify` says that there is no rule for "grouped_conv".
"""

from typing import Any

import numpy as np

from grouped_conv_jax import jax_compat
from grouped_conv_jax.primitive import grouped_conv_p
from grouped_conv_jax.spec import ConvSpec


def convs_saveable(primitive: jax_compat.Primitive, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint` that saves the results of convolutions.

    JAX's own `dots_saveable` saves those of matrix products and of lax's convolutions. It does not
    know this library's, which would be computed a second time in the gradient. Combine the two
    with `jax.checkpoint_policies.save_from_both_policies`.

    Returns:
      Whether the primitive is a convolution, of this library or of lax.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grouped_conv_jax import convs_saveable, grouped_conv
      >>> policy = jax.checkpoint_policies.save_from_both_policies(
      ...     jax.checkpoint_policies.dots_saveable, convs_saveable
      ... )
      >>> def block(x, w):
      ...     return jnp.sin(grouped_conv(x, w, (1, 1), "SAME", feature_group_count=2)).sum()
      >>> x, w = jnp.ones((2, 4, 8, 8)), jnp.ones((4, 2, 3, 3))
      >>> jax.grad(jax.checkpoint(block, policy=policy))(x, w).shape
      (2, 4, 8, 8)
    """
    return primitive in (grouped_conv_p, jax_compat.conv_general_dilated_p)


jax_compat.set_error_check(grouped_conv_p)
jax_compat.set_bilinear_taylor_rule(grouped_conv_p)
jax_compat.set_rematerialization(grouped_conv_p)


@jax_compat.register_roofline(grouped_conv_p)
def _roofline(
    ctx: jax_compat.RooflineRuleContext, *args: Any, spec: ConvSpec, **kw: Any
) -> jax_compat.RooflineResult:
    arrays: list[Any] = [*ctx.avals_in, *ctx.avals_out]
    return jax_compat.RooflineResult(
        unfused_flops=2 * _products(spec.merged()),
        unfused_hbm_bytes=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _products(spec: ConvSpec) -> int:
    """Returns the number of multiplications, without those with padding or with gaps."""
    batch, features = (spec.out_shape[d] for d in spec.layout("out")[:2])
    inputs, _ = spec.group_width
    meeting = 1
    for i, (outputs, taps, size) in enumerate(
        zip(*(spec.spatial_shape(role) for role in ("out", "rhs", "lhs")), strict=True)
    ):
        reads = np.arange(outputs)[:, None] * spec.window_strides[i] - spec.padding[i][0]
        reads = reads + np.arange(taps) * spec.rhs_dilation[i]
        rows, gaps = np.divmod(reads, spec.lhs_dilation[i])
        meeting *= int(np.sum((gaps == 0) & (rows >= 0) & (rows < size)))
    return batch * features * inputs * meeting
