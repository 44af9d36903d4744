"""Continual learning: streams of tasks, and what is measured on them."""
