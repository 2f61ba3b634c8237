"""The mesh, the rules by which arrays are sharded over it, and the processes that share it."""
