"""Remote training: submits a Kubeflow TrainJob or a Vertex AI CustomJob and follows it.

    run.py        the entry point: locks the work folder, stages the input, follows the job, publishes its output
    following.py  follows a job on any platform: submit, poll, resubmit, cancel
    kubeflow.py   TrainJobs with the Kubeflow Trainer SDK, and the status and logs of their pods
    vertex.py     CustomJobs with the Vertex AI SDK

Importing this package imports no SDK: only the modules of the platforms do.
"""
