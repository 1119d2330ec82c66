"""Deployment: proof that a registered version answers as it did when it was evaluated, and then its service."""
