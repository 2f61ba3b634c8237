"""Text files to packed rows of tokens, in numpy on the host."""
