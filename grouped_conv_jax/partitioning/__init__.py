"""How a contraction is divided among the devices of a mesh."""
