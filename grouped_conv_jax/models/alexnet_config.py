"""The nets of AlexNet's family, as figures: their layers, their presets and what follows of them.

The sources of the figures: Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks", NeurIPS 2012; the code of 2012 as the Computer History Museum has
released it; the models bvlc_alexnet and bvlc_reference_caffenet of Caffe; torchvision's alexnet.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, get_args

from grouped_conv_jax.operations.arguments import check_divides

POOL_SIZE, POOL_STRIDE = 3, 2
"""Windows of 3 every 2 pixels: overlapping pooling (section 3.4 of the paper)."""

Step = Literal["relu", "lrn", "spatial lrn", "pool"]
"""What may follow a convolution: ReLU, local response normalisation over neighbouring features,
the same over neighbouring pixels, and max-pooling."""

RELU: tuple[Step, ...] = ("relu",)
RELU_POOL: tuple[Step, ...] = ("relu", "pool")
RELU_LRN_POOL: tuple[Step, ...] = ("relu", "lrn", "pool")
RELU_POOL_LRN: tuple[Step, ...] = ("relu", "pool", "lrn")


@dataclasses.dataclass(frozen=True)
class ConvLayer:
    """One convolution and the steps that follow it, in their order.

    `inputs` says what a tower's filters see: the "image", "all" towers' features, or the "own".
    The kernel starts with the deviation `kernel_std`, or None for that of the net.
    """

    features: int
    kernel_size: int
    inputs: Literal["image", "all", "own"]
    strides: int = 1
    padding: tuple[int, int] = (0, 0)
    bias: float = 0.0
    steps: tuple[Step, ...] = RELU
    kernel_std: float | None = None

    def positions(self, edge: int) -> int:
        """Along an edge of what the convolution makes of `edge` pixels."""
        return (edge + sum(self.padding) - self.kernel_size) // self.strides + 1

    @property
    def normalize(self) -> bool:
        """Whether neighbouring features are normalised."""
        return "lrn" in self.steps

    @property
    def pool(self) -> bool:
        return "pool" in self.steps


@dataclasses.dataclass(frozen=True)
class AlexNetConfig:
    """Everything that makes one net of the family; features and units are of all towers together.

    The presets are class methods, and by name in `ALEXNETS`. Each takes the number of towers (None
    for its own), of classes and of the image's channels.

    Attributes:
      kernel_std: kernels start as N(0, kernel_std²), as in the paper; with None the variance is
        2 / inputs of the kernel instead, which suits a narrower net.
      hidden_std: the same of the hidden layers, where it is another one.
      dropout_on: whether dropout falls on what the hidden layers put out or on what they see.
      lrn_size, lrn_alpha, lrn_beta, lrn_k: x / (k + alpha * the sum of x² over `size`)^beta.
      lrn_across_towers: whether the features of another tower are neighbours too.
      spatial_lrn_alpha, spatial_lrn_k: of the step "spatial lrn", over size x size pixels.
    """

    convolutions: tuple[ConvLayer, ...]
    hidden_units: tuple[int, ...]
    num_classes: int
    image_size: int
    image_channels: int = 3
    towers: int = 2
    kernel_std: float | None = 0.01
    hidden_std: float | None = None
    hidden_bias: float = 1.0
    dropout_rate: float = 0.5
    dropout_on: Literal["outputs", "inputs"] = "outputs"
    lrn_size: int = 5
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    lrn_k: float = 2.0
    lrn_across_towers: bool = False
    spatial_lrn_alpha: float = 1e-3 / 25
    spatial_lrn_k: float = 1.0

    @classmethod
    def paper(
        cls, *, towers: int | None = None, num_classes: int = 1000, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The net of 2012: 224-pixel images, 60,965,224 parameters with two towers."""
        return cls(
            convolutions=(
                # Padding (0, 3) gives 55 positions, as the original does by rounding up.
                ConvLayer(96, 11, "image", 4, (0, 3), steps=RELU_LRN_POOL),
                ConvLayer(256, 5, "own", 1, (2, 2), bias=1.0, steps=RELU_LRN_POOL),
                ConvLayer(384, 3, "all", 1, (1, 1)),
                ConvLayer(384, 3, "own", 1, (1, 1), bias=1.0),
                ConvLayer(256, 3, "own", 1, (1, 1), bias=1.0, steps=RELU_POOL),
            ),
            hidden_units=(4096, 4096),
            num_classes=num_classes,
            image_size=224,
            image_channels=image_channels,
            towers=2 if towers is None else towers,
        )

    @classmethod
    def small(
        cls, *, towers: int | None = None, num_classes: int = 10, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The same net for 32-pixel images, narrow enough to train on a laptop in minutes."""
        return cls(
            convolutions=(
                ConvLayer(32, 5, "image", 1, (2, 2), steps=RELU_LRN_POOL),
                ConvLayer(64, 5, "own", 1, (2, 2), steps=RELU_LRN_POOL),
                ConvLayer(96, 3, "all", 1, (1, 1)),
                ConvLayer(96, 3, "own", 1, (1, 1)),
                ConvLayer(64, 3, "own", 1, (1, 1), steps=RELU_POOL),
            ),
            hidden_units=(256, 256),
            num_classes=num_classes,
            image_size=32,
            image_channels=image_channels,
            towers=2 if towers is None else towers,
            kernel_std=None,
            hidden_bias=0.0,
        )

    @classmethod
    def photos(
        cls, *, towers: int | None = None, num_classes: int = 10, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The same net for 64-pixel photographs, conv1's filters large enough to be looked at.

        They start as in the paper, so small that what they have learned is what is seen of them.
        """
        return cls(
            convolutions=(
                ConvLayer(48, 9, "image", 2, (4, 4), steps=RELU_LRN_POOL, kernel_std=0.01),
                ConvLayer(128, 5, "own", 1, (2, 2), steps=RELU_LRN_POOL),
                ConvLayer(192, 3, "all", 1, (1, 1)),
                ConvLayer(192, 3, "own", 1, (1, 1)),
                ConvLayer(128, 3, "own", 1, (1, 1), steps=RELU_POOL),
            ),
            hidden_units=(512, 512),
            num_classes=num_classes,
            image_size=64,
            image_channels=image_channels,
            towers=2 if towers is None else towers,
            kernel_std=None,
            hidden_bias=0.0,
        )

    @classmethod
    def cuda_convnet(
        cls, *, towers: int | None = None, num_classes: int = 1000, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The net of 2012 as its code was released, which is not quite that of the paper.

        From layers/layers-145.cfg and layer-params-145.cfg of computerhistory/AlexNet-Source-Code,
        which note 40.7 % top-1 and 18.2 % top-5 error, the paper's result: normalisation before
        the ReLU in conv1; a second one, over neighbouring pixels, after that of conv2; the
        alpha of both divided by the size of the window (5, and 5 x 5); the deviation 0.03 in conv3
        to conv5.
        Biases, k = 2 and the deviation 0.01 elsewhere are the paper's.

        The kernels that do the normalising are not in that release. That the window over pixels is
        centred, cut off at the edges, and has k = 1, is how the later cuda-convnet2 does it.
        """
        paper = cls.paper(towers=towers, num_classes=num_classes, image_channels=image_channels)
        steps: tuple[tuple[Step, ...], ...] = (
            ("lrn", "pool", "relu"),
            ("relu", "lrn", "spatial lrn", "pool"),
            ("relu",),
            ("relu",),
            ("pool", "relu"),
        )
        return dataclasses.replace(
            paper,
            convolutions=tuple(
                dataclasses.replace(layer, steps=own_steps, kernel_std=0.03 if i >= 2 else None)
                for i, (layer, own_steps) in enumerate(zip(paper.convolutions, steps, strict=True))
            ),
            lrn_alpha=1e-4 / 5,
        )

    @classmethod
    def caffe(
        cls,
        *,
        towers: int | None = None,
        num_classes: int = 1000,
        image_channels: int = 3,
        caffenet: bool = False,
    ) -> "AlexNetConfig":
        """Caffe's bvlc_alexnet, or its bvlc_reference_caffenet: crops of 227, no padding in conv1.

        Towers are the groups of a net for one device: normalisation sees the features of both, so
        that they talk there too when they are on several. Alpha is divided by the size of the
        window, and k is 1. CaffeNet normalises after pooling, and its biases are 1 instead of 0.1.
        """
        paper = cls.paper(towers=towers, num_classes=num_classes, image_channels=image_channels)
        bias, lrn = (1.0, RELU_POOL_LRN) if caffenet else (0.1, RELU_LRN_POOL)
        conv1, *others = (
            dataclasses.replace(
                layer,
                bias=bias if layer.bias else 0.0,
                steps=lrn if layer.normalize else layer.steps,
            )
            for layer in paper.convolutions
        )
        return dataclasses.replace(
            paper,
            convolutions=(dataclasses.replace(conv1, padding=(0, 0)), *others),
            image_size=227,
            hidden_std=0.005,
            hidden_bias=bias,
            lrn_alpha=1e-4 / 5,
            lrn_k=1.0,
            lrn_across_towers=True,
        )

    @classmethod
    def one_weird_trick(
        cls, *, towers: int | None = None, num_classes: int = 1000, image_channels: int = 3
    ) -> "AlexNetConfig":
        """The net of Krizhevsky 2014, "One weird trick", as torchvision has it: 61,100,840.

        No groups and no normalisation; dropout on what fc6 and fc7 see. The initial values are not
        torchvision's: kernels are normal with variance 2 / inputs, biases 0.

        Raises:
          ValueError: more towers than one, which would be another net.
        """
        return cls(
            convolutions=(
                ConvLayer(64, 11, "image", 4, (2, 2), steps=RELU_POOL),
                ConvLayer(192, 5, "all", 1, (2, 2), steps=RELU_POOL),
                ConvLayer(384, 3, "all", 1, (1, 1)),
                ConvLayer(256, 3, "all", 1, (1, 1)),
                ConvLayer(256, 3, "all", 1, (1, 1), steps=RELU_POOL),
            ),
            hidden_units=(4096, 4096),
            num_classes=num_classes,
            image_size=224,
            image_channels=image_channels,
            towers=_one_tower("one-weird-trick", towers),
            kernel_std=None,
            hidden_bias=0.0,
            dropout_on="inputs",
        )

    @classmethod
    def one_tower(
        cls, *, towers: int | None = None, num_classes: int = 1000, image_channels: int = 3
    ) -> "AlexNetConfig":
        """What the paper compares its two towers with: half as wide, but for conv5 and fc6 to fc8.

        That conv5 has all 256 features is also in layers/layers-145-half.cfg of the code of 2012.

        Raises:
          ValueError: more towers than one, which would be another net.
        """
        paper = cls.paper(
            towers=_one_tower("one-tower", towers),
            num_classes=num_classes,
            image_channels=image_channels,
        )
        *halved, conv5 = paper.convolutions
        halved = (dataclasses.replace(conv, features=conv.features // 2) for conv in halved)
        return dataclasses.replace(paper, convolutions=(*halved, conv5))

    def check(self) -> None:
        """Raises ValueError where the towers do not divide the features, the steps after a
        convolution are not ones that there are, or the image is too small.
        """
        if self.towers < 1:
            raise ValueError(f"towers must be at least 1, got {self.towers}")
        widths = (*(conv.features for conv in self.convolutions), *self.hidden_units)
        names = self.convolution_names + self.dense_names[:-1]
        for layer, width in zip(names, widths, strict=True):
            check_divides("towers", self.towers, f"the features of {layer}", width)
        for name, conv in zip(self.convolution_names, self.convolutions, strict=True):
            if not set(conv.steps) <= set(get_args(Step)):
                known = ", ".join(map(repr, get_args(Step)))
                raise ValueError(f"the steps of {name} must be among {known}, got {conv.steps}")
            if len(set(conv.steps)) < len(conv.steps):
                raise ValueError(f"the steps of {name} must differ, got {conv.steps}")
        if self.pooled_size < 1:
            raise ValueError(f"image_size={self.image_size} leaves nothing after the last pooling")

    @property
    def convolution_names(self) -> tuple[str, ...]:
        """conv1, conv2, ..., as the paper numbers the layers."""
        return tuple(f"conv{i}" for i, _ in enumerate(self.convolutions, 1))

    @property
    def dense_names(self) -> tuple[str, ...]:
        """fc6, fc7 and fc8: the hidden layers, and the one that gives the logits."""
        first = len(self.convolutions) + 1
        return tuple(f"fc{first + i}" for i in range(len(self.hidden_units) + 1))

    @property
    def edges(self) -> tuple[int, ...]:
        """Pixels along an edge of what each convolution sees, then the first hidden layer."""
        edges = [self.image_size]
        for conv in self.convolutions:
            size = conv.positions(edges[-1])
            edges.append((size - POOL_SIZE) // POOL_STRIDE + 1 if conv.pool else size)
        return tuple(edges)

    @property
    def pooled_size(self) -> int:
        """Pixels along an edge of what the first fully connected layer sees."""
        return self.edges[-1]

    @property
    def stored_size(self) -> int:
        """Pixels along an edge that images are scaled to before crops are taken of them.

        256 for crops of 224, as in the paper, and for Caffe's of 227.
        """
        return 256 if self.image_size == 227 else self.image_size * 8 // 7


ALEXNETS: dict[str, Callable[..., AlexNetConfig]] = {
    "small": AlexNetConfig.small,
    "photos": AlexNetConfig.photos,
    "paper": AlexNetConfig.paper,
    "cuda-convnet": AlexNetConfig.cuda_convnet,
    "caffe": AlexNetConfig.caffe,
    "caffenet": functools.partial(AlexNetConfig.caffe, caffenet=True),
    "one-weird-trick": AlexNetConfig.one_weird_trick,
    "one-tower": AlexNetConfig.one_tower,
}
"""The presets by name, each called with `towers`, `num_classes` and `image_channels`."""


def _one_tower(name: str, towers: int | None) -> int:
    if towers not in (None, 1):
        raise ValueError(
            f"towers must be 1 in the net {name!r}, got {towers}: cut into towers it would be "
            "another net; take 'paper', whose towers are any number that divides its features"
        )
    return 1
