"""Arrays, geometry, networks and windows: the ground floor (torch, numpy, einops, safetensors)."""
