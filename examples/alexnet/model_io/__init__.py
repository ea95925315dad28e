"""Parameters in files: checkpoints, weights of other libraries, exported programs."""
