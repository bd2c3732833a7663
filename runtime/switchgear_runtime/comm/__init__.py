"""Bytes between ranks: the `Transport` protocol and its backends, one file each."""
