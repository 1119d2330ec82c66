"""Preparation: where instances come from, and which split each belongs to for life."""
