"""The disk: files and folders that appear complete or not at all, locks, hashes, and where the cache is."""
