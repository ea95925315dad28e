"""What the axes of a kernel are, said by a string: the layouts of this library and of others.

A layout is a string of letters, as in the dimension numbers of lax, in any order and any case:

    O        outputs; without G those of all groups, the first group's first
    I        inputs of a group
    G        groups, where they have an axis of their own; then O is the outputs of a group
    H, W ... spatial dimensions, by any other letters
    ...      all of the spatial dimensions, in the order D, H, W

With G, O and I may be left out where they are 1: "HWGO" is a depthwise kernel (one input each).

"transposed " before the letters: the kernel, so laid out, of the convolution of which a transposed
convolution is the gradient. What it calls outputs are the inputs of the layer, and its taps run the
other way. `grouped_conv_transpose` takes the layout "OIHW", as `grouped_conv` does, and with
`transpose_kernel=True` "transposed OIHW".

`NAMED` has the layouts of other libraries by name.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grouped_conv_jax.text import shown

NAMED: Mapping[str, str] = MappingProxyType(
    {
        "caffe": "OI...",
        "caffe_transposed": "transposed OI...",
        "equinox": "OI...",
        "equinox_transposed": "OI...",
        "flax": "...IO",
        "flax_transposed": "...IO",
        "haiku": "...IO",
        "haiku_transposed": "...OI",
        "jax": "OI...",
        "jax_transposed": "...IO",
        "keras": "...IO",
        "keras_depthwise": "...GO",
        "keras_transposed": "transposed ...IO",
        "onnx": "OI...",
        "onnx_transposed": "transposed OI...",
        "pytorch": "OI...",
        "pytorch_transposed": "transposed OI...",
        "torch": "OI...",
        "torch_transposed": "transposed OI...",
    }
)
"""Layouts by the libraries that have them.

The transposed kernels of Equinox, Flax, Haiku and JAX are not turned round: those layers, too,
convolve with what they have. That of Flax with `transpose_kernel=True` is "keras_transposed", which
is also TensorFlow's. Those of JAX are what its functions take without dimension numbers."""

_TRANSPOSED = "transposed "
_KNOWN = f"letters such as 'HWIO', 'GOIHW' or 'transposed OI...', or one of: {', '.join(NAMED)}"


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """What the string that was given for an argument says.

    Attributes:
      argument: its name.
      text: the string.
      letters: of the axes, "*" for an ellipsis.
      is_transposed: whether they are those of a kernel that a transposed layer turns round.
    """

    argument: str
    text: str
    letters: str
    is_transposed: bool

    def __str__(self) -> str:
        return f"{self.argument}={shown(self.text)}"

    @property
    def mend(self) -> str:
        """What to say where a layout does not fit: it may be a name that there is not."""
        return (
            "" if self.text.lower() in NAMED else f"; it is none of the names: {', '.join(NAMED)}"
        )

    @property
    def has_ellipsis(self) -> bool:
        return "*" in self.letters

    @property
    def spatial(self) -> str:
        """The spatial letters that are written."""
        return "".join(letter for letter in self.letters if letter not in "GOI*")

    @property
    def rest(self) -> str:
        """The others."""
        return "".join(letter for letter in self.letters if letter in "GOI")

    def axes(self, spatial: str) -> str:
        """A letter for each axis; of an ellipsis those given."""
        return self.letters.replace("*", spatial)


def parsed_layout(argument: str, text: Any) -> KernelLayout:
    """The layout that is given for an argument.

    Raises:
      ValueError, TypeError: it is none; the message says which there are.
    """
    if not isinstance(text, str):
        raise TypeError(f"{argument} must be a string such as 'HWIO', got {shown(text)}")
    letters = NAMED.get(text.lower(), text)
    is_transposed = letters.lower().startswith(_TRANSPOSED)
    letters = letters[len(_TRANSPOSED) if is_transposed else 0 :].upper().replace("...", "*")
    layout = KernelLayout(argument, text, letters, is_transposed)
    if twice := sorted(letter for letter, count in Counter(letters).items() if count > 1):
        raise ValueError(f"{layout} has {', '.join(twice)} more than once; known: {_KNOWN}")
    if not all(letter.isalnum() or letter == "*" for letter in letters):
        raise ValueError(f"{layout} is no layout of a kernel; known: {_KNOWN}")
    if missing := [letter for letter in "OI" if letter not in letters and "G" not in letters]:
        raise ValueError(f"{layout} has no {' and no '.join(missing)}; known: {_KNOWN}")
    if layout.has_ellipsis and layout.spatial:
        raise ValueError(f"{layout} has an ellipsis and {layout.spatial}; write one or the other")
    return layout


def spatial_letters(given: KernelLayout, wanted: KernelLayout, ndim: int) -> str:
    """The spatial letters of both, in the order that an ellipsis stands for.

    Args:
      given: the layout of a kernel of `ndim` dimensions.
      wanted: another one for it, or the same.
      ndim: how many dimensions the kernel has.

    Raises:
      ValueError: they are not layouts of the same kernel, or not of one of `ndim` dimensions.
    """
    rank = ndim - len(given.rest)
    at_least = "at least " if given.has_ellipsis else ""
    if rank < 0 or (not given.has_ellipsis and rank != len(given.spatial)):
        least = len(given.rest) + len(given.spatial)
        raise ValueError(
            f"{given} is a layout of {at_least}{least} dimensions, but the kernel has {ndim}"
            f"{given.mend}"
        )
    written = [layout for layout in (given, wanted) if not layout.has_ellipsis]
    if not written:
        return "".join(chr(ord("a") + i) for i in range(rank))
    letters = written[0].spatial
    if len(wanted.spatial) != rank and not wanted.has_ellipsis:
        raise ValueError(
            f"{wanted} has {len(wanted.spatial)} spatial dimensions, but the kernel has {rank}"
            f"{wanted.mend}"
        )
    if len(written) == 2 and sorted(letters) != sorted(wanted.spatial):
        raise ValueError(
            f"{given} and {wanted} differ in their spatial letters: {letters} and {wanted.spatial}"
        )
    return "".join(sorted(letters, key="DHW".index)) if set(letters) <= set("DHW") else letters
