"""Evaluation of adapters and bundles (arrives with its own issue)."""
