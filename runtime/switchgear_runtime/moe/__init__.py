"""The mixture-of-experts layer: route, remap, dispatch, experts, combine; and where each expert lives (`expert_map`)."""
