"""Preparation: turns data sources into instances, each with a fixed split."""
