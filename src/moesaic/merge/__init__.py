"""Fuse fine-tuned dense models into one mixture of experts of a stock architecture."""
