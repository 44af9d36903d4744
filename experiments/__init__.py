"""Runnable studies, one module a paper."""
