"""Settings by name: `--preset NAME`. Options on the command line change them as usual.

The accuracy that a preset names is that of its publication. "Not yet run" says that nobody here had
the images and the hours.
"""

from dataclasses import replace

from alexnet.config import Recipe, TrainConfig, Work

PAPER_RECIPE = Recipe(
    batch_size=128,
    learning_rate=0.01,
    warmup_epochs=0.0,
    schedule="plateau",
    normalization="mean",
    colour=0.1,
    ten_crop=True,
)
"""Sections 4.1 and 5 of the paper."""

RELEASED_RECIPE = replace(PAPER_RECIPE, bias_rate=2.0, decay_biases=False)
"""The code of 2012: other than in the paper, biases learn faster and do not decay."""

CAFFE_RECIPE = Recipe(
    batch_size=256,
    learning_rate=0.01,
    warmup_epochs=0.0,
    schedule="steps",
    drop_epochs=(20.0, 40.0, 60.0, 80.0),  # Every 100,000 of 450,000 steps.
    bias_rate=2.0,
    decay_biases=False,
    normalization="mean",
)

TORCHVISION_RECIPE = Recipe(
    batch_size=256,
    learning_rate=0.01,
    warmup_epochs=0.0,
    schedule="steps",
    drop_epochs=(30.0, 60.0),
    weight_decay=1e-4,
)

LARGE_BATCH_RECIPE = replace(
    PAPER_RECIPE,
    batch_size=4096,
    learning_rate=8.0,
    warmup_epochs=5.0,
    schedule="cosine",
    lars=0.001,
    bias_rate=0.01 / 8,  # LARS is for kernels. Biases learn as they do in a batch of 128.
    decay_biases=False,
    dtype="bfloat16",
    ema=0.999,
)


def imagenet(net: str, recipe: Recipe) -> TrainConfig:
    """Returns the settings of a run of 90 epochs on ImageNet."""
    work = Work(workers=8, checkpoint_every=1000)
    return TrainConfig(data="folder:imagenet", net=net, epochs=90, recipe=recipe, work=work)


PRESETS: dict[str, TrainConfig] = {
    # The digits of scikit-learn: above 97 % in one to three minutes on two cores.
    "small": TrainConfig(),
    # Ten photographs, with filters of conv1 that are large enough to look at: examples/README.md.
    "photos": TrainConfig(data="photos", net="photos", epochs=60, recipe=Recipe(colour=0.1)),
    # Krizhevsky, Sutskever, Hinton 2012: 40.7 % top-1 and 18.2 % top-5 error. Not yet run.
    "paper": imagenet("paper", PAPER_RECIPE),
    # The same on one GPU, half as wide: 1.7 and 1.2 points worse in the paper. Not yet run.
    "one-tower": imagenet("one-tower", PAPER_RECIPE),
    # The net as it was released. Not yet run.
    "cuda-convnet": imagenet("cuda-convnet", RELEASED_RECIPE),
    # bvlc_alexnet: 57.1 % top-1 and 80.2 % top-5 accuracy, middle crop. Not yet run.
    "caffe": imagenet("caffe", CAFFE_RECIPE),
    # bvlc_reference_caffenet: 57.4 % and 80.4 %. Not yet run.
    "caffenet": imagenet("caffenet", CAFFE_RECIPE),
    # Krizhevsky 2014, as torchvision trains it: 56.5 % and 79.1 %. Not yet run.
    "one-weird-trick": imagenet("one-weird-trick", TORCHVISION_RECIPE),
    # Many devices: LARS (You, Gitman, Ginsburg 2017), warm-up and a cosine. Not yet run, not tuned.
    "large-batch": imagenet("paper", LARGE_BATCH_RECIPE),
}
