"""Files of nets: checkpoints, published weights and exported programs."""
