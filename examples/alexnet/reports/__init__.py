"""What a run shows and writes down: progress, metrics, pictures."""
