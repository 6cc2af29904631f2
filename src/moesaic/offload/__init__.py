"""Experts that live on disk, and an optimizer whose state exists only for experts that were active."""
