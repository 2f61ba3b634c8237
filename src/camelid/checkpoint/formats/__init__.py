"""Formats: how each system names, shapes and splits the tensors of a model."""
