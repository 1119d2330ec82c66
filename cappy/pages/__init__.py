"""Shared parts of all reports: style of pages and plots, and formatting of numbers."""
