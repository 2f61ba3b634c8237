"""Strings to token ids and back, as the checkpoint's own tokenizer does it."""
