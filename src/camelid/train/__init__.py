"""Training: objectives, the optimizer, the state and the step that updates it, and where metrics are written."""
