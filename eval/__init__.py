"""Evaluation of adapters and bundles: tasks, backends, intervals, a gate, and serving measured."""
