"""The decoder: what a checkpoint says (`spec`, `names`, `checkpoint`) and what computes it (`weights`, `decoder`)."""
