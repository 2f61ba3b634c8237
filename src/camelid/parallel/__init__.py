"""Where arrays live: the mesh, the rules that cut arrays over it, and the processes that share it."""
