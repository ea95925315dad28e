"""The settings of the example, and its packages for data, model files, training and reports."""
