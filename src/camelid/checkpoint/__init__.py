"""Checkpoint files around one parameter tree: foreign formats as tables of rows, and training state."""
