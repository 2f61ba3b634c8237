"""Checkpoints that change another one: PEFT adapters and deltas."""
