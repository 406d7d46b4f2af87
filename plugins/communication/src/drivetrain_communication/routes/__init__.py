"""Ways that collectives take over hosts."""
