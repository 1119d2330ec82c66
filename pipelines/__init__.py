"""Pipelines of components: `adapt` and `pretrain` train a scorer, `evaluate` and `batch_score` use a registered one.

`definitions` has the four pipelines, `builder` compiles them with kfp, `recipe` reads the user's YAML file, `planning`
turns it into a submission, and `local` and `clients/` run it. Importing the package itself imports none of these.
"""
