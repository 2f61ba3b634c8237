"""From token ids to more of them."""
