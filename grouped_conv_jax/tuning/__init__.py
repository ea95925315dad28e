"""Measured times of implementations, and explanations of what is chosen."""
