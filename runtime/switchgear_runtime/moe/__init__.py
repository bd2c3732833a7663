"""The mixture-of-experts layer: route, remap, dispatch, experts, combine; where each expert lives."""
