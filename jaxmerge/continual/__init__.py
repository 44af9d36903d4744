"""Continual learning by merging: streams, replay, strategies, metrics."""
