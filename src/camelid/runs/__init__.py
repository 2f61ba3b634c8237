"""A training run: its recipe, its folder and the loop that it describes."""
