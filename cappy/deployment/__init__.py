"""Deployment: checks that a registered version gives the scores of its evaluation, then deploys it."""
