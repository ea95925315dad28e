"""The AlexNet of torchvision, with random parameters."""

import pytest

from grouped_conv_jax.models import AlexNetConfig


def torch_alexnet(config: AlexNetConfig):
    """As torchvision builds it, with the widths of a config."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    conv1, conv2, conv3, conv4, conv5 = (conv.features for conv in config.convolutions)
    fc6, fc7 = config.hidden_units

    class AlexNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, conv1, 11, 4, 2),
                nn.ReLU(),
                nn.MaxPool2d(3, 2),
                nn.Conv2d(conv1, conv2, 5, 1, 2),
                nn.ReLU(),
                nn.MaxPool2d(3, 2),
                nn.Conv2d(conv2, conv3, 3, 1, 1),
                nn.ReLU(),
                nn.Conv2d(conv3, conv4, 3, 1, 1),
                nn.ReLU(),
                nn.Conv2d(conv4, conv5, 3, 1, 1),
                nn.ReLU(),
                nn.MaxPool2d(3, 2),
            )
            self.classifier = nn.Sequential(
                nn.Dropout(),
                nn.Linear(config.pooled_size**2 * conv5, fc6),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(fc6, fc7),
                nn.ReLU(),
                nn.Linear(fc7, config.num_classes),
            )

        def forward(self, x):
            return self.classifier(self.features(x).flatten(1))

    torch.manual_seed(0)
    return AlexNet().eval()
