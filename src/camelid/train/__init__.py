"""From a recipe to trained parameters: loss, optimizer, step, loop."""
