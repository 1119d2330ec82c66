"""`cappy pipeline submit`, `status`, `logs`, `cancel` against servers that speak the platforms' REST."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.cloud.aiplatform.utils import resource_manager_utils
from kubeflow_server import Kubeflow, kubeflow_server, pod
from mlflow import MlflowClient
from vertex_scenario import connect
from vertex_server import Vertex, vertex_server
from wording import assert_names

from cappy.cli import remote

Here = Callable[..., subprocess.CompletedProcess[str]]
NOBODY = "http://127.0.0.1:9"
"""Where no MLflow answers."""
PINNED = {"worker": f"worker@sha256:{'a' * 64}", "trainer": f"trainer@sha256:{'b' * 64}"}


@pytest.fixture
def kubeflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubeflow]:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path))
    with kubeflow_server() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path)))
        yield server


@pytest.fixture
def vertex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vertex]:
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    # The SDK asks another service, over gRPC, whose the bucket is; here that would be 40 s of retries.
    monkeypatch.setattr(resource_manager_utils, "get_project_number", lambda *_, **__: "1")
    with vertex_server() as server:
        connect(server)
        yield server


def recipe(tmp_path: Path, **more: Any) -> Path:
    path = tmp_path / "mine.yaml"
    values = {"pipeline": "pretrain", "shards": 3, "tracking_uri": NOBODY, "images": PINNED, **more}
    path.write_text(yaml.safe_dump(values))
    return path


def on_kubeflow(server: Kubeflow) -> tuple[str, ...]:
    return ("--on", "kubeflow", "--endpoint", server.address)


def test_kubeflow_is_sent_a_run_that_it_understands_and_its_page_is_printed(
    here: Here, kubeflow: Kubeflow, tmp_path: Path
) -> None:
    own = {"experiment": "scorers", "service_account": "cappy-steps"}
    done = here("pipeline", "submit", recipe(tmp_path, kubeflow=own), *on_kubeflow(kubeflow))
    assert done.returncode == 0, done.stderr
    assert f"{kubeflow.address}/#/runs/details/run-1" in done.stdout
    assert "Run details" not in done.stdout
    assert_names(done.stderr, "YAML", "MLflow", NOBODY)
    (run,) = kubeflow.runs
    assert [each["display_name"] for each in kubeflow.experiments] == ["scorers"]
    assert (run["experiment_id"], run["service_account"]) == ("e-1", "cappy-steps")
    spec = run["pipeline_spec"]
    assert "kubernetes" in spec["platform_spec"]["platforms"]
    parameters = run["runtime_config"]["parameters"]
    assert parameters["source"] == "builtin"
    assert set(json.loads(parameters["fingerprints"])) >= {"preparation", "sampling 2/3", "gathering", "registration"}


def test_the_yaml_that_was_sent_is_kept_with_the_mlflow_run(
    here: Here, kubeflow: Kubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)  # As this machine reaches it.
    done = here("pipeline", "submit", recipe(tmp_path), *on_kubeflow(kubeflow))
    assert (done.returncode, done.stderr) == (0, "")
    client = MlflowClient(tracking_uri=address)
    experiment = client.get_experiment_by_name("cappy")
    (run,) = client.search_runs([experiment.experiment_id])
    tags = {name: run.data.tags[f"cappy.{name}"] for name in ("run", "platform", "page")}
    assert tags == {
        "run": "run-1",
        "platform": "kubeflow",
        "page": f"{kubeflow.address}/#/runs/details/run-1",
    }
    kept = Path(client.download_artifacts(run.info.run_id, "pipeline.yaml", str(tmp_path)))
    assert "name: cappy-pretrain" in kept.read_text()


def test_images_that_no_digest_pins_are_named(here: Here, kubeflow: Kubeflow, tmp_path: Path) -> None:
    done = here("pipeline", "submit", recipe(tmp_path, images={}), *on_kubeflow(kubeflow))
    assert done.returncode == 0
    assert_names(done.stderr, "cappy-python-worker:0.1.0", "digest")
    assert "digest" not in here("pipeline", "submit", recipe(tmp_path), *on_kubeflow(kubeflow)).stderr


def test_a_server_that_users_share_is_reported_the_namespace(here: Here, kubeflow: Kubeflow, tmp_path: Path) -> None:
    kubeflow.shared = True
    done = here("pipeline", "submit", recipe(tmp_path), *on_kubeflow(kubeflow), "--namespace", "team")
    assert done.returncode == 0, done.stderr
    assert kubeflow.experiments[0]["namespace"] == "team"


def test_status_tells_each_step_and_fails_with_the_failed_ones_words(here: Here, kubeflow: Kubeflow) -> None:
    kubeflow.runs.append({})
    times = {"start_time": "2026-11-26T10:00:00Z", "end_time": "2026-11-26T10:00:42Z"}
    done = {"display_name": "preparation", "state": "SUCCEEDED", **times}
    driver = {"display_name": "preparation-driver", "state": "SUCCEEDED"}
    loop = {"display_name": "for-loop-1", "state": "RUNNING"}
    running = {
        "state": "RUNNING",
        "run_details": {"task_details": [driver, done, loop, {"display_name": "sampling", "state": "RUNNING"}]},
    }
    failed = {"display_name": "sampling", "state": "FAILED", "error": {"code": 1, "message": "out of credit"}}
    over = {"state": "FAILED", "run_details": {"task_details": [done, failed]}}
    kubeflow.states = [running, over]
    kubeflow.pods = [pod("a", "sampling", waiting="ImagePullBackOff")]

    first = here("pipeline", "status", "run-1", *on_kubeflow(kubeflow))
    assert first.returncode == 0
    assert "preparation  done, 42 s" in first.stdout
    assert "sampling     running: ImagePullBackOff: " in first.stdout
    assert "driver" not in first.stdout
    assert "for-loop" not in first.stdout

    second = here("pipeline", "status", "run-1", *on_kubeflow(kubeflow), "--follow")
    assert second.returncode == 1
    assert "sampling: failed: out of credit" in second.stdout
    assert second.stderr.count("\n") == 1
    assert_names(second.stderr, "cappy pipeline: run-1: ", "sampling", "out of credit")


def test_shards_are_counted_by_state_and_reported_when_that_changes_alone(here: Here, kubeflow: Kubeflow) -> None:
    kubeflow.runs.append({})

    def looked(*states: str, over: str = "RUNNING") -> dict[str, Any]:
        tasks = [{"display_name": "scoring", "state": state} for state in states]
        return {"state": over, "run_details": {"task_details": tasks}}

    running = [looked("RUNNING", "SUCCEEDED", "RUNNING"), looked("SUCCEEDED", "RUNNING", "RUNNING")]
    over = looked("SUCCEEDED", "SUCCEEDED", "SUCCEEDED", over="SUCCEEDED")
    kubeflow.states = [*running, running[0], over]
    done = here("pipeline", "status", "run-1", *on_kubeflow(kubeflow), "--follow")
    assert done.stdout.splitlines() == ["scoring: 1 done, 2 running", "scoring: 3 done"]

    kubeflow.pods = [pod("a", "scoring"), pod("b", "scoring-2", waiting="ImagePullBackOff")]
    kubeflow.states = [running[0], over]
    done = here("pipeline", "status", "run-1", *on_kubeflow(kubeflow), "--follow")
    assert done.stdout.startswith("scoring: 1 done, 2 running: ImagePullBackOff: ")
    kubeflow.states = [running[0]]
    done = here("pipeline", "status", "run-1", *on_kubeflow(kubeflow))
    states = [line.split()[1:] for line in done.stdout.splitlines()[1:4]]
    assert (states[0][:2], states[1:]) == (["running:", "ImagePullBackOff:"], [["done"], ["running"]])


def test_logs_come_from_the_pods_each_line_once(here: Here, kubeflow: Kubeflow) -> None:
    kubeflow.runs.append({})
    kubeflow.states = [{"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    kubeflow.pods = [pod("a", "preparation"), pod("b", "sampling"), pod("c", "sampling-2")]
    kubeflow.logs = {"a": "one\ntwo\n", "b": "three\n", "c": "four\n"}
    done = here("pipeline", "logs", "run-1", *on_kubeflow(kubeflow), "--follow")
    assert done.stdout.splitlines() == ["preparation: one", "preparation: two", "sampling: three", "sampling: four"]
    kubeflow.states = [{"state": "SUCCEEDED"}]
    assert here("pipeline", "logs", "run-1", *on_kubeflow(kubeflow), "--step", "preparation").stdout.count("\n") == 2


def test_a_log_that_is_json_is_reported_as_it_was_written(here: Here, kubeflow: Kubeflow) -> None:
    kubeflow.pods = [pod("a", "scoring")]
    kubeflow.logs = {"a": '{"rows": 3, "done": true}\n'}
    done = here("pipeline", "logs", "run-1", *on_kubeflow(kubeflow))
    assert (done.returncode, done.stdout) == (0, 'scoring: {"rows": 3, "done": true}\n')


def test_lines_of_several_pods_of_a_step_are_reported_once_each_while_they_grow(
    here: Here, kubeflow: Kubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeflow.runs.append({})
    kubeflow.states = [{"state": "RUNNING"}, {"state": "RUNNING"}, {"state": "SUCCEEDED"}]
    kubeflow.pods = [pod("a", "sampling"), pod("b", "sampling-2"), pod("c", "sampling-3")]  # c only starts
    kubeflow.logs = {"a": "a1\n", "b": "b1\n"}

    def grow(_: float) -> None:
        kubeflow.logs = {name: text + f"{name}{text.count(chr(10)) + 1}\n" for name, text in kubeflow.logs.items()}

    monkeypatch.setattr("cappy.cli.remote.time.sleep", grow)
    done = here("pipeline", "logs", "run-1", *on_kubeflow(kubeflow), "--follow")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()[1::2]) == ["a1", "a2", "a3", "b1", "b2", "b3"]


def test_what_answers_and_is_no_kubeflow_is_one_line(here: Here, kubeflow: Kubeflow, tmp_path: Path) -> None:
    kubeflow.shared = None  # type: ignore[assignment]
    for words in (("submit", recipe(tmp_path)), ("status", "run-1"), ("cancel", "run-1")):
        done = here("pipeline", *words, *on_kubeflow(kubeflow))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert_names(done.stderr, kubeflow.address, "not Kubeflow Pipelines", "log in")
    done = here("pipeline", "status", "run-1", "--on", "kubeflow", "--endpoint", "127.0.0.1:9")
    assert_names(done.stderr, "127.0.0.1:9", "https://")


def test_the_command_to_follow_with_is_whole(here: Here, kubeflow: Kubeflow, tmp_path: Path) -> None:
    kubeflow.states = [{"state": "SUCCEEDED"}]
    done = here("pipeline", "submit", recipe(tmp_path), *on_kubeflow(kubeflow))
    follow = next(line for line in done.stdout.splitlines() if line.startswith("follow")).split()[2:]
    assert here(*follow).returncode == 0


def test_a_run_is_ended_on_request(here: Here, kubeflow: Kubeflow) -> None:
    assert here("pipeline", "cancel", "run-1", *on_kubeflow(kubeflow)).returncode == 0
    assert kubeflow.ended == ["run-1"]


@pytest.mark.parametrize(
    ("refuse", "remedy"),
    [
        ((401, "token expired"), "log in again"),
        ((403, "not yours"), "right to create runs"),
        ((429, "quota exceeded"), "request more"),
    ],
)
def test_what_kubeflow_refuses_is_one_line_with_a_remedy(
    here: Here, kubeflow: Kubeflow, tmp_path: Path, refuse: tuple[int, str], remedy: str
) -> None:
    kubeflow.refuse = refuse
    done = here("pipeline", "submit", recipe(tmp_path), *on_kubeflow(kubeflow))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    status, words = refuse
    assert re.search(rf"refused \({status}, .*{words}.*\); .*{re.escape(remedy)}", done.stderr), done.stderr
    assert kubeflow.runs == []


def test_an_endpoint_that_is_not_there_is_one_line(here: Here, tmp_path: Path) -> None:
    done = here("pipeline", "submit", recipe(tmp_path), "--on", "kubeflow", "--endpoint", NOBODY)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, f"kubeflow: {NOBODY}: ", "no answer")
    nowhere = here("pipeline", "submit", recipe(tmp_path), "--on", "kubeflow")
    assert_names(nowhere.stderr, "kubeflow.endpoint", "--endpoint")


def test_a_yaml_that_was_looked_at_is_sent_as_it_is_and_a_wrong_one_is_not(
    here: Here, kubeflow: Kubeflow, tmp_path: Path
) -> None:
    mine, seen = recipe(tmp_path), tmp_path / "seen.yaml"
    assert here("pipeline", "compile", mine, "--on", "kubeflow", "--target", seen).returncode == 0
    sent = ("pipeline", "submit", mine, *on_kubeflow(kubeflow), "--compiled", seen)
    assert here(*sent).returncode == 0
    text = seen.read_text()
    for changed, names in (
        (text.replace("sdkVersion: kfp-2.17.0", "sdkVersion: kfp-2.18.1"), ("kfp-2.18.1", "kfp 2.17.0")),
        (text.replace("name: cappy-pretrain", "name: cappy-adapt"), ("'cappy-adapt'",)),
        (text.replace("pretraining_fingerprint", "old_fingerprint"), ("pretraining_fingerprint",)),
        ("a: 1", ("not a compiled pipeline",)),
        ("sdkVersion: kfp-2.17.0\npipelineInfo: x\nroot:", ("not a compiled pipeline",)),
        (text.replace('["0/3", "1/3", "2/3"]', '["0/2", "1/2"]'), ("shards", "recipe's 3")),
        (text.split("\n---")[0], ("another platform", "--on kubeflow")),
        ("a: [", ("cannot be read",)),
    ):
        seen.write_text(changed)
        done = here(*sent)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert_names(done.stderr, str(seen), *names)
        # What it is given is known once the registry was asked, which a dry run does not do.
        if names != ("pretraining_fingerprint",):
            assert_names(here(*sent, "--dry-run").stderr, str(seen), *names)
    assert len(kubeflow.runs) == 1


def test_a_dry_run_sends_nothing_and_says_what_it_would_cost(here: Here, kubeflow: Kubeflow, tmp_path: Path) -> None:
    priced = recipe(tmp_path, prices={"none": 1.0}, resources={"default": {"hours": 2.0}})
    done = here("pipeline", "submit", priced, *on_kubeflow(kubeflow), "--dry-run")
    assert "3 x [sampling -> annotation]" in done.stdout
    assert "at most 22.00" in done.stdout
    assert kubeflow.calls == []
    result = json.loads(here("pipeline", "submit", priced, *on_kubeflow(kubeflow), "--dry-run", "--json").stdout)
    assert result["most_cost"] == 22.0


def on_vertex() -> tuple[str, ...]:
    return ("--on", "vertex", "--project", "my-project", "--bucket", "gs://bucket")


@pytest.mark.parametrize("bucket", ["gs://My-Bucket", "gs://b/", "gs://bucket/folder/", "s3://bucket", "bucket"])
def test_a_bucket_that_is_none_is_one_line_with_the_rule(here: Here, bucket: str) -> None:
    done = here("pipeline", "status", "run-1", "--on", "vertex", "--project", "my-project", "--bucket", bucket)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, f"cappy pipeline: --bucket: '{bucket}' ", "gs://NAME", "lower-case letters", "slash")


def write_recipe(tmp_path: Path, server: Vertex) -> Path:
    own = {"service_account": "cappy@my-project.example", "network": "projects/1/global/networks/mine"}
    return recipe(tmp_path, vertex={"endpoint": server.address, **own})


def test_vertex_is_sent_a_job_that_its_sdk_understands(here: Here, vertex: Vertex, tmp_path: Path) -> None:
    done = here("pipeline", "submit", write_recipe(tmp_path, vertex), *on_vertex())
    assert done.returncode == 0, done.stderr
    (job,) = vertex.jobs.values()
    assert job["serviceAccount"] == "cappy@my-project.example"
    assert job["network"] == "projects/1/global/networks/mine"
    assert job["runtimeConfig"]["gcsOutputDirectory"] == "gs://bucket/pipeline"
    assert job["runtimeConfig"]["parameterValues"]["preparation_settings"]
    run = done.stdout.split()[1]
    assert f"runs/{run}?project=my-project" in done.stdout


def test_a_yaml_for_this_machine_names_its_runs_otherwise_and_is_not_sent_to_vertex(
    here: Here, vertex: Vertex, tmp_path: Path
) -> None:
    mine, seen = write_recipe(tmp_path, vertex), tmp_path / "seen.yaml"
    assert here("pipeline", "compile", mine, "--on", "local", "--target", seen).returncode == 0
    done = here("pipeline", "submit", mine, *on_vertex(), "--compiled", seen)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert_names(done.stderr, f"cappy pipeline: {seen}: ", "another platform", "--on vertex")
    assert vertex.jobs == {}


def test_vertex_tells_steps_logs_and_failures(here: Here, vertex: Vertex, tmp_path: Path) -> None:
    mine = write_recipe(tmp_path, vertex)
    run = here("pipeline", "submit", mine, *on_vertex()).stdout.split()[1]
    (job,) = vertex.jobs.values()
    detail = {"containerDetail": {"mainJob": "projects/1/locations/us-central1/customJobs/77"}}
    job |= {
        "state": "PIPELINE_STATE_FAILED",
        "error": {"code": 9, "message": "the job failed"},
        "jobDetail": {
            "taskDetails": [
                {"taskName": "exit-handler-1", "state": "RUNNING"},
                {
                    "taskName": "sampling-2",
                    "state": "FAILED",
                    "executorDetail": detail,
                    "startTime": "2026-11-26T10:00:00Z",
                    "endTime": "2026-11-26T10:01:00Z",
                    "error": {"code": 8, "message": "quota exceeded"},
                },
            ]
        },
    }
    vertex.entries = [
        {"resource": {"type": "ml_job", "labels": {"job_id": "77"}}, "textPayload": "one"},
        {"resource": {"type": "ml_job", "labels": {"job_id": "77"}}, "jsonPayload": {"message": "two\nthree"}},
    ]
    where = (run, *on_vertex(), "--recipe", mine)
    done = here("pipeline", "status", *where)
    assert done.returncode == 1
    assert "sampling  failed, 60 s: quota exceeded" in done.stdout
    assert "exit-handler" not in done.stdout
    assert done.stderr.count("\n") == 1
    assert_names(done.stderr, f"cappy pipeline: {run}: ", "sampling", "quota exceeded")
    assert here("pipeline", "logs", *where).stdout.splitlines() == ["sampling: one", "sampling: two", "sampling: three"]
    assert here("pipeline", "cancel", *where).returncode == 0
    assert vertex.calls[-1].endswith(f"{run}:cancel")


def test_vertex_tells_what_came_from_the_cache_and_what_was_not_called_for(
    here: Here, vertex: Vertex, tmp_path: Path
) -> None:
    mine = write_recipe(tmp_path, vertex)
    run = here("pipeline", "submit", mine, *on_vertex()).stdout.split()[1]
    (job,) = vertex.jobs.values()
    states = {"preparation": "SKIPPED", "deployment": "NOT_TRIGGERED"}
    details = [{"taskName": name, "state": state} for name, state in states.items()]
    job |= {"state": "PIPELINE_STATE_SUCCEEDED", "jobDetail": {"taskDetails": details}}
    done = here("pipeline", "status", run, *on_vertex(), "--recipe", mine)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:3] == ["  preparation  cached", "  deployment   skipped"]


def test_what_vertex_refuses_is_one_line_with_a_remedy(here: Here, vertex: Vertex, tmp_path: Path) -> None:
    vertex.refuse = (429, "Quota exceeded for custom_model_training_nvidia_l4_gpus")
    done = here("pipeline", "submit", write_recipe(tmp_path, vertex), *on_vertex())
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert_names(done.stderr, "Quota exceeded", "request more")
    lacking = here("pipeline", "submit", recipe(tmp_path), "--on", "vertex")
    assert_names(lacking.stderr, "vertex.project", "vertex.bucket")


@pytest.mark.timeout(60)  # The SDK's own retries go on for two minutes.
def test_a_vertex_that_is_not_there_is_one_line_within_seconds(here: Here, vertex: Vertex, tmp_path: Path) -> None:
    nowhere = recipe(tmp_path, vertex={"endpoint": NOBODY})
    for words in (("submit", nowhere), ("status", "run-1", "--recipe", nowhere)):
        done = here("pipeline", *words, *on_vertex())
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert_names(done.stderr, "127.0.0.1: Connection refused", "network")
    assert vertex.jobs == {}


def test_a_run_on_this_machine_is_checked_as_a_submission_is(here: Here, tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"instruction": "Add 1 and 1.", "responses": ["2"]}\n')
    words = (
        "pipeline",
        "run",
        "batch_score",
        "--set",
        f"preparation.source={asked}",
        "--set",
        "scoring.scorer=builtin:tiny",
    )
    for setting, names in (
        ("scoring.target=mine", ("scoring: --target", "leave it out")),
        ("preparation.source=missing.jsonl", ("preparation: --source: missing.jsonl: ",)),
    ):
        done = here(*words, "--set", setting)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert_names(done.stderr, *names)
    assert not Path(".cappy/runs").exists()
