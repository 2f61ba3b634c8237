"""From records to a store of tokens and loss weights."""
