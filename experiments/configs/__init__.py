"""Configurations of the experiments."""
