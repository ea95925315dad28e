"""The models of the library in PyTorch, layer for layer and name for name, and their training.

Imported only where PyTorch is installed. Kernels start as PyTorch's own layers do, not as the
library's: that takes the same time.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional as F  # pyright: ignore[reportMissingImports]

from grouped_conv_jax.models.alexnet import POOL_SIZE, POOL_STRIDE, AlexNetConfig
from grouped_conv_jax.models.convnext import STEM_SIZE
from grouped_conv_jax.models.mobilenet import BLOCKS, STEM_FEATURES
from grouped_conv_jax.models.resnext import EXPANSION


class AlexNet(nn.Module):
    """Both towers on one device; the neighbours in its normalisation may be of the other tower."""

    def __init__(self, config: AlexNetConfig):
        super().__init__()
        self.config = config
        features = config.image_channels
        convolutions = []
        for layer in config.convolutions:
            groups = config.towers if layer.inputs == "own" else 1
            before, after = layer.padding
            padding = before if before == after else 0
            conv = nn.Conv2d(
                features,
                layer.features,
                layer.kernel_size,
                layer.strides,
                padding,
                groups=groups,
            )
            convolutions.append(conv)
            features = layer.features
        self.convolutions = nn.ModuleList(convolutions)
        # PyTorch takes the mean of the squares where the paper takes their sum.
        alpha = config.lrn_size * config.lrn_alpha
        self.normalize = nn.LocalResponseNorm(config.lrn_size, alpha, config.lrn_beta, config.lrn_k)
        widths = (config.pooled_size**2 * features, *config.hidden_units)
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.classes = nn.Linear(widths[-1], config.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for layer, conv in zip(self.config.convolutions, self.convolutions, strict=True):
            before, after = layer.padding
            if before != after:
                x = F.pad(x, (before, after, before, after))
            x = F.relu(conv(x), inplace=True)
            if layer.normalize:
                x = self.normalize(x)
            if layer.pool:
                x = F.max_pool2d(x, POOL_SIZE, POOL_STRIDE)
        x = x.flatten(1)
        for linear in self.hidden:
            x = F.dropout(F.relu(linear(x), inplace=True), self.config.dropout_rate, self.training)
        return self.classes(x)


class ResNeXt(nn.Module):
    """ResNeXt-50 32x4d by default."""

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        stage_sizes: Sequence[int] = (3, 4, 6, 3),
        feature_group_count: int = 32,
        group_features: int = 4,
        stem_features: int = 64,
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, stem_features, 7, 2, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(stem_features)
        features = stem_features
        blocks = []
        for stage, size in enumerate(stage_sizes):
            for i in range(size):
                outputs = EXPANSION * stem_features << stage
                width = feature_group_count * group_features << stage
                strides = 2 if stage and not i else 1
                blocks.append(ResNeXtBlock(features, outputs, width, strides, feature_group_count))
                features = outputs
        self.blocks = nn.ModuleList(blocks)
        self.classes = nn.Linear(features, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem_norm(self.stem(images)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.classes(x.mean((2, 3)))


class ResNeXtBlock(nn.Module):
    """The bottleneck in groups."""

    def __init__(self, inputs: int, outputs: int, width: int, strides: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, strides, 1, groups=groups, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.projects = strides > 1 or inputs != outputs
        if self.projects:
            self.projection = nn.Conv2d(inputs, outputs, 1, strides, bias=False)
            self.projection_norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        y += self.projection_norm(self.projection(x)) if self.projects else x
        return F.relu(y, inplace=True)


class MobileNet(nn.Module):
    """1.0 MobileNet by default."""

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        blocks: Sequence[tuple[int, int]] = BLOCKS,
        width_multiplier: float = 1.0,
    ):
        super().__init__()
        inputs = int(width_multiplier * STEM_FEATURES)
        convolutions = [nn.Conv2d(3, inputs, 3, 2, 1, bias=False)]
        for full_features, strides in blocks:
            features = int(width_multiplier * full_features)
            convolutions += [
                nn.Conv2d(inputs, inputs, 3, strides, 1, groups=inputs, bias=False),
                nn.Conv2d(inputs, features, 1, bias=False),
            ]
            inputs = features
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(layer.out_channels, eps=1e-3, momentum=0.01) for layer in convolutions
        )
        self.classes = nn.Linear(inputs, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for conv, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu6(norm(conv(x)), inplace=True)
        return self.classes(x.mean((2, 3)))


class ConvNeXt(nn.Module):
    """ConvNeXt-T by default."""

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        stage_sizes: Sequence[int] = (3, 3, 9, 3),
        features: Sequence[int] = (96, 192, 384, 768),
        stochastic_depth_rate: float = 0.1,
        layer_scale: float = 1e-6,
    ):
        super().__init__()
        self.stem = nn.Conv2d(3, features[0], STEM_SIZE, STEM_SIZE)
        self.stem_norm = FeatureNorm(features[0], eps=1e-6)
        last = max(sum(stage_sizes) - 1, 1)
        before, inputs = 0, features[0]
        stages = []
        for size, width in zip(stage_sizes, features, strict=True):
            downsampling = []
            if stages:
                downsampling = [FeatureNorm(inputs, eps=1e-6), nn.Conv2d(inputs, width, 2, 2)]
            rates = [stochastic_depth_rate * i / last for i in range(before, before + size)]
            blocks = [ConvNeXtBlock(width, layer_scale, rate) for rate in rates]
            stages.append(nn.Sequential(*downsampling, *blocks))
            before, inputs = before + size, width
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(inputs, eps=1e-6)
        self.classes = nn.Linear(inputs, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return self.classes(self.norm(x.mean((2, 3))))


class FeatureNorm(nn.LayerNorm):
    """Layer normalisation over the features of NCHW."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and two linear layers, left out for some examples."""

    def __init__(self, features: int, layer_scale: float, rate: float):
        super().__init__()
        self.conv = nn.Conv2d(features, features, 7, padding=3, groups=features)
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.expand = nn.Linear(features, 4 * features)
        self.project = nn.Linear(4 * features, features)
        self.scale = nn.Parameter(torch.full((features,), layer_scale))
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        y = y.permute(0, 3, 1, 2)
        if self.training and self.rate:
            kept = torch.empty((len(y), 1, 1, 1), dtype=y.dtype, device=y.device)
            y = y * kept.bernoulli_(1 - self.rate).div_(1 - self.rate)
        return x + y


MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}


class Training:
    """Training steps of one model; a call is one step, and returns when all is computed.

    Args:
      model: to be trained, by stochastic gradient descent.
      images: (N, H, W, 3).
      labels: (N,).
      memory_format: a name of `MEMORY_FORMATS`.
      device: "cpu" or "cuda".
      dtype: "float32", or "bfloat16" for the usual mixed precision.
      learning_rate: of the descent.
      momentum: of the descent.
    """

    compile_seconds = None
    memory = None

    def __init__(
        self,
        model: nn.Module,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        memory_format: str,
        device: str,
        dtype: str,
        learning_rate: float,
        momentum: float,
    ):
        if device == "cuda":
            # As XLA multiplies float32 on a GPU if it is not told otherwise.
            torch.set_float32_matmul_precision("high")
        layout = MEMORY_FORMATS[memory_format]
        self.model = model.to(device).train()
        nn.utils.convert_conv2d_weight_memory_format(self.model, layout)
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.images = nchw.to(device).contiguous(memory_format=layout)
        self.labels = torch.from_numpy(labels).to(device).long()
        self.device = device
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
        self.optimizer = torch.optim.SGD(
            model.parameters(), learning_rate, momentum=momentum, fused=True
        )
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.losses.append(loss.item())
