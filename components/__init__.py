"""One module per step: a typed Kubeflow contract, and one call into cappy in its body.

Modules here import kfp and the standard library only, so that a pipeline compiles on a machine with nothing else.
"""
