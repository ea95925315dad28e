"""Which implementation computes a contraction, for the platform and the shapes at hand."""

from grouped_conv_jax.algorithms import TABLE, unsupported
from grouped_conv_jax.spec import Contraction, ConvSpec


def choose(contraction: Contraction, spec: ConvSpec, platform: str) -> str:
    """The automatic choice.

    - `"xla"` for everything: `"vmap"` becomes the same convolutions, by a longer way.
    """
    return "xla"


def resolve(
    implementation: str | None, contraction: Contraction, spec: ConvSpec, platform: str
) -> str:
    """The name of the implementation to run: the one asked for, or the automatic choice.

    Raises:
      NotImplementedError: the implementation that was asked for does not do this.
    """
    if implementation is None:
        return choose(contraction, spec, platform)
    if reason := unsupported(implementation, contraction, spec, platform):
        others = [n for n in TABLE if unsupported(n, contraction, spec, platform) is None]
        raise NotImplementedError(
            f"implementation {implementation!r} does not compute this {contraction} on "
            f"{platform}: {reason}; these do: {', '.join(others)}"
        )
    return implementation
