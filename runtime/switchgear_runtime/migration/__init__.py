"""Bringing experts to a rank while it serves: a paced thread, and a channel to the ranks that have them."""
