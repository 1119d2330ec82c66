"""One module per step: a typed Kubeflow component whose body is one call into cappy.

These modules import only kfp and the standard library, so that a pipeline compiles on a machine with nothing else.
"""
