"""The disk: atomic files and folders, JSON files, locks, hashes, free space, and the folder of the cache."""
