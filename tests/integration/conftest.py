"""Real servers that nobody here wrote: PostgreSQL, buckets (moto's S3, gcp-storage-emulator), MLflow's own over them.

Each starts on a free port in a folder of its own and ends with the session; where its programs are missing, the tests
skip and say what to install.
"""

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import BUCKET, S3_KEYS, free_port, running, wait_for

SERVERS = Path(__file__).parents[2] / ".venv-servers" / "bin"


class Bucket(NamedTuple):
    """Its address, what the environment needs of a program that reaches it, and its objects, past MLflow."""

    address: str
    environment: dict[str, str]
    names: Callable[[], list[str]]
    read: Callable[[str], bytes]
    write: Callable[[str, bytes], object]


class MlflowServer(NamedTuple):
    """Its address, its database's, the bucket of its artifacts, and what the environment of a client needs."""

    address: str
    store: str
    bucket: Bucket
    environment: dict[str, str]


def as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


@pytest.fixture(scope="session")
def database() -> Iterator[Callable[[str], str]]:
    """database("name") makes an empty database and gives its address, for SQLAlchemy."""
    result = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if result is None:
        pytest.skip("no PostgreSQL server here; apt-get install postgresql")
    programs = Path(result).resolve().parent
    # Its own user must reach the folder, which pytest's are closed to.
    folder = Path(
        subprocess.run(as_postgres(["mktemp", "-d"]), capture_output=True, text=True, check=True).stdout.strip()
    )
    port = str(free_port())
    control = as_postgres([str(programs / "pg_ctl"), "-D", str(folder / "data"), "-w"])
    try:
        initdb = [str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "cappy"]
        subprocess.run(as_postgres(initdb), check=True, capture_output=True)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        subprocess.run([*control, "-o", options, "-l", str(folder / "log"), "start"], check=True, capture_output=True)

        def make(name: str) -> str:
            address = ["-h", "127.0.0.1", "-p", port, "-U", "cappy"]
            subprocess.run([str(programs / "createdb"), *address, name], check=True, capture_output=True)
            return f"postgresql+psycopg2://cappy@127.0.0.1:{port}/{name}"

        yield make
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """An empty bucket of an S3 server."""
    program = SERVERS / "moto_server"
    if not program.exists():
        pytest.skip("no S3 server here; make integration installs one")
    import boto3

    port = free_port()
    log = tmp_path_factory.mktemp("s3") / "log"
    with running([str(program), "-H", "127.0.0.1", "-p", str(port)], log) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/moto-api/", process, log)
        keys = {name.lower(): value for name, value in S3_KEYS.items() if name != "AWS_DEFAULT_REGION"}
        client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=BUCKET)
        yield Bucket(
            f"s3://{BUCKET}",
            {**S3_KEYS, "MLFLOW_S3_ENDPOINT_URL": address},
            lambda: [result["Key"] for result in client.list_objects_v2(Bucket=BUCKET)["Contents"]],
            lambda name: client.get_object(Bucket=BUCKET, Key=name)["Body"].read(),
            lambda name, data: client.put_object(Bucket=BUCKET, Key=name, Body=data),
        )


@pytest.fixture(scope="session")
def gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """An empty bucket of a server that speaks Google Cloud Storage's JSON API."""
    program = SERVERS / "gcp-storage-emulator"
    if not program.exists():
        pytest.skip("no server of Google's storage API here; make integration installs one")
    from google.auth.credentials import AnonymousCredentials

    storage = importlib.import_module("google.cloud.storage")

    port = free_port()
    log = tmp_path_factory.mktemp("gcs") / "log"
    command = [str(program), "start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--quiet"]
    with running([*command, "--default-bucket", BUCKET], log) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process, log)
        reached = {"credentials": AnonymousCredentials(), "client_options": {"api_endpoint": address}}
        bucket = storage.Client(project="test", **reached).bucket(BUCKET)
        yield Bucket(
            f"gs://{BUCKET}",
            {"STORAGE_EMULATOR_HOST": address},
            lambda: [result.name for result in bucket.list_blobs()],
            lambda name: bucket.blob(name).download_as_bytes(),
            lambda name, data: bucket.blob(name).upload_from_string(data, "application/octet-stream"),
        )


@pytest.fixture(
    scope="session",
    params=[("s3", "through"), ("s3", "straight"), ("gcs", "through"), ("gcs", "straight")],
    ids=["S3 through the server", "straight to S3", "GCS through the server", "straight to GCS"],
)
def mlflow_server(
    database: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[MlflowServer]:
    """MLflow over a PostgreSQL database of its own and a bucket."""
    kind, way = request.param
    bucket: Bucket = request.getfixturevalue(kind)
    port = free_port()
    log = tmp_path_factory.mktemp("mlflow") / "log"
    store = database(f"{kind}_{way}")
    places = ["--artifacts-destination", bucket.address] if way == "through" else ["--no-serve-artifacts"]
    places += [] if way == "through" else ["--default-artifact-root", f"{bucket.address}/straight"]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, *places]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with running(command, log, **bucket.environment, **quiet) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", process, log)
        yield MlflowServer(address, store, bucket, {} if way == "through" else bucket.environment)
