"""The parts of `draw_convolutions.py`."""
