"""A run: its steps, its processes, and how it is resumed, extended and stopped."""
