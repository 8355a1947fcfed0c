"""Backbones: one file or one row each."""
