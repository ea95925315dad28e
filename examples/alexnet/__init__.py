"""The parts of `train_alexnet.py`."""
