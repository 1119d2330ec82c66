"""Pipelines of components: `adapt` and `pretrain` train a scorer, `evaluate` and `batch_score` use a registered one.

`definitions` has the four pipelines, `builder` compiles them with kfp, `recipe` reads the user's YAML file, `planning`
makes a submission of it, and `local` and `clients/` run it. Importing this package alone is light.
"""
