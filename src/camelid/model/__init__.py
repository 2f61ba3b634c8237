"""What the network is: its description, its parameters, and the functions that run it."""
