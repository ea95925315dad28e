"""Training: the state and its steps, the loop over them, and the processes of a run."""
