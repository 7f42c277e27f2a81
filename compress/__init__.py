"""Compression: mathematics on tensors, and the job that drives it over modules."""
