"""Settings by name: `--preset NAME`; every option after it is changed as usual.

Where a preset names what it should come to, that is from the publication, and "not yet run" says
that nobody here had the images and the hours.
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
"""Section 5 of the paper, and 4.1 for the images."""

RELEASED_RECIPE = replace(PAPER_RECIPE, bias_rate=2.0, decay_biases=False)
"""What the paper does not say, and the code of 2012 does: biases learn faster and do not decay."""

CAFFE_RECIPE = Recipe(
    batch_size=256,
    learning_rate=0.01,
    warmup_epochs=0.0,
    schedule="steps",
    # Every 100,000 steps, and 450,000 of them.
    drop_epochs=(20.0, 40.0, 60.0, 80.0),
    bias_rate=2.0,
    decay_biases=False,
    normalization="mean",
)

WORK = Work(workers=8, checkpoint_every=1000)

PRESETS: dict[str, TrainConfig] = {
    # On the digits of scikit-learn: above 97 % in one to three minutes on two cores.
    "small": TrainConfig(),
    # Ten photographs, conv1's filters large enough to be looked at: examples/README.md.
    "photos": TrainConfig(
        data="photos",
        net="photos",
        epochs=60,
        recipe=Recipe(batch_size=64, learning_rate=0.02, colour=0.1),
    ),
    # Krizhevsky, Sutskever, Hinton 2012: 40.7 % top-1 and 18.2 % top-5 error. Not yet run.
    "paper": TrainConfig(
        data="folder:imagenet", net="paper", epochs=90, recipe=PAPER_RECIPE, work=WORK
    ),
    # The same on one GPU, half as wide: 1.7 and 1.2 points worse in the paper. Not yet run.
    "one-tower": TrainConfig(
        data="folder:imagenet", net="one-tower", epochs=90, recipe=PAPER_RECIPE, work=WORK
    ),
    # As it was released. Not yet run.
    "cuda-convnet": TrainConfig(
        data="folder:imagenet", net="cuda-convnet", epochs=90, recipe=RELEASED_RECIPE, work=WORK
    ),
    # bvlc_alexnet: 57.1 % top-1 and 80.2 % top-5, of the middle crop. Not yet run.
    "caffe": TrainConfig(
        data="folder:imagenet", net="caffe", epochs=90, recipe=CAFFE_RECIPE, work=WORK
    ),
    # bvlc_reference_caffenet: 57.4 % and 80.4 %. Not yet run.
    "caffenet": TrainConfig(
        data="folder:imagenet", net="caffenet", epochs=90, recipe=CAFFE_RECIPE, work=WORK
    ),
    # Krizhevsky 2014, as torchvision trains it: 56.5 % and 79.1 %. Not yet run.
    "one-weird-trick": TrainConfig(
        data="folder:imagenet",
        net="one-weird-trick",
        epochs=90,
        recipe=Recipe(
            batch_size=256,
            learning_rate=0.01,
            warmup_epochs=0.0,
            schedule="steps",
            drop_epochs=(30.0, 60.0),
            weight_decay=1e-4,
        ),
        work=WORK,
    ),
    # Many devices: LARS (You, Gitman, Ginsburg 2017), warm-up and a cosine. Not yet run, not tuned.
    "large-batch": TrainConfig(
        data="folder:imagenet",
        net="paper",
        epochs=90,
        recipe=replace(
            PAPER_RECIPE,
            batch_size=4096,
            learning_rate=8.0,
            warmup_epochs=5.0,
            schedule="cosine",
            lars=0.001,
            # LARS is for kernels. Biases learn as they do in a batch of 128.
            bias_rate=0.01 / 8,
            decay_biases=False,
            dtype="bfloat16",
            ema=0.999,
        ),
        work=WORK,
    ),
}
