"""From stores to the rows of each batch."""
