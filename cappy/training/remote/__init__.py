"""Training that runs elsewhere: a Kubeflow TrainJob or a Vertex AI CustomJob, followed by the step that submitted it.

    run.py         the door: stages the input, holds the work, follows the job, publishes what it wrote
    following.py   the loop over any platform: submit, look, tell, submit again, cancel
    cancelling.py  when the step that follows is itself told to end
    kubeflow.py    TrainJobs, by the Kubeflow Trainer SDK; pods.py reads what their pods say
    vertex.py      CustomJobs, by the Vertex AI SDK
    settings.py    where a step trains, as settings

Importing this package alone is light: the SDKs load with the platform that is asked for.
"""
