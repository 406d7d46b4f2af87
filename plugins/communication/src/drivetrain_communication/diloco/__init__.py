"""DiLoCo: replicas that train apart and meet once in many steps, also over slow links."""
