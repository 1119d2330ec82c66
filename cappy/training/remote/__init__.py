"""Training that runs elsewhere: a Kubeflow TrainJob or a Vertex AI CustomJob, followed by the step that submitted it.

    run.py        the door: stages the input, holds the work, follows the job, publishes what it wrote
    following.py  the loop over any platform: submit, look, submit again, cancel
    kubeflow.py   TrainJobs, by the Kubeflow Trainer SDK, and what their pods say
    vertex.py     CustomJobs, by the Vertex AI SDK

Importing this package alone is light: the SDKs load with the platform that is asked for.
"""
