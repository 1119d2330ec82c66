"""Real servers that nobody here wrote: PostgreSQL, an S3 server (moto's), MLflow's own over both.

Each starts on a free port in a folder of its own and ends with the session; where its programs are missing, the tests
skip and say what to install.
"""

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


class MlflowServer(NamedTuple):
    """Its address, its database's, and what the environment of a client needs."""

    address: str
    store: str
    environment: dict[str, str]


def as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


@pytest.fixture(scope="session")
def database() -> Iterator[Callable[[str], str]]:
    """database("name") makes an empty database and gives its address, for SQLAlchemy."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("no PostgreSQL server here; apt-get install postgresql")
    programs = Path(found).resolve().parent
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
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3 server with one empty bucket."""
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
        boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)
        yield address


@pytest.fixture(scope="session", params=["through the server", "straight to the bucket"])
def mlflow_server(
    database: Callable[[str], str], s3: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[MlflowServer]:
    """MLflow over a PostgreSQL database of its own and S3."""
    port = free_port()
    log = tmp_path_factory.mktemp("mlflow") / "log"
    keys = {**S3_KEYS, "MLFLOW_S3_ENDPOINT_URL": s3}
    through = request.param == "through the server"
    store = database("through" if through else "straight")
    places = ["--artifacts-destination", f"s3://{BUCKET}"] if through else ["--no-serve-artifacts"]
    places += [] if through else ["--default-artifact-root", f"s3://{BUCKET}/straight"]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, *places]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    with running(command, log, **keys, **quiet) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield MlflowServer(f"http://127.0.0.1:{port}", store, {} if through else keys)
