"""Sends texts to an embedder as fast as its provider takes them."""
