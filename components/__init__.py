"""One module per step: a typed Kubeflow component whose body is one call into cappy.

These modules import only kfp and the standard library; the function bodies import cappy when a step runs. So a pipeline
can be compiled without the packages that the steps need.
"""
