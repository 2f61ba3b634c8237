"""Containers: how files hold named tensors, whatever the model."""
