"""Towers on devices, and what the devices exchange."""
