"""Components chained: `adapt` makes a scorer for a task, `pretrain` a general one; others measure and use one.

`definitions` has the four pipelines, `builder` makes kfp of them, `recipe` is what a person writes, `planning` turns it
into a submission, `local` and `clients/` run it. Importing this package alone is light.
"""
