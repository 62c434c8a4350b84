"""Attacks on [0, 1] images: how they are written, made and named."""
