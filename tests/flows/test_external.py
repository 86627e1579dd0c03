"""Prefect and MLflow on PostgreSQL, artifacts and DVC's remote on S3: the servers as they are installed, on loopback."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.services import HOST, MLFLOW_PORT
from tests.flows.serving import easyref, make_project, run, serving

POSTGRES = next((str(path.parent) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None)
KEY = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
pytestmark = pytest.mark.long


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """The port of a new cluster with the databases `prefect` and `mlflow`. PostgreSQL refuses to run as root."""
    folder = Path("/tmp") / f"easyref-postgres-{os.getpid()}"  # a short path: sockets have a limit, and pytest's folders are private
    folder.mkdir()
    prefix = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
    port, data = free_port(), folder / "data"

    def call(*words: str) -> None:
        done = subprocess.run([*prefix, *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    call(f"{POSTGRES}/initdb", "-D", str(data), "-U", "easyref", "-A", "trust")
    options = f"-p {port} -c listen_addresses={HOST} -c unix_socket_directories={folder}"
    call(f"{POSTGRES}/pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        for name in ("prefect", "mlflow"):
            call(f"{POSTGRES}/createdb", "-h", HOST, "-p", str(port), "-U", "easyref", name)
        yield port
    finally:
        call(f"{POSTGRES}/pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of an S3 server (moto)."""
    import boto3

    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEY.items():
            patch.setenv(name, value)
        for _ in range(240):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    break
            time.sleep(0.25)
        made = boto3.resource("s3", endpoint_url=f"http://{HOST}:{port}").Bucket("easyref")
        made.create()
        try:
            yield made
        finally:
            server.kill()
            server.wait()


@pytest.mark.skipif(POSTGRES is None, reason="PostgreSQL is not installed (apt install postgresql)")
def test_a_release_goes_through_postgres_and_s3(postgres: int, bucket: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    import psycopg2

    place, home, elsewhere = (tmp_path_factory.mktemp(name) for name in ("project", "home", "elsewhere"))
    make_project(place)
    endpoint = bucket.meta.client.meta.endpoint_url
    stores = {
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://easyref@{HOST}:{postgres}/prefect",
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://easyref@{HOST}:{postgres}/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://easyref/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": endpoint,
    }
    with serving(place, home, **stores):
        run_stages = ["prefect", "deployment", "run", "easyref/full", "--watch", "--watch-timeout", "900", "--param", "release=false"]
        done = run(run_stages, elsewhere)
        assert done.returncode == 0 and "Completed" in done.stdout, done.stdout + done.stderr
        os.environ["MLFLOW_TRACKING_URI"] = f"http://{HOST}:{MLFLOW_PORT}"
        try:
            assert "version 1 is champion" in easyref(place, "release")
            assert easyref(place, "pull", "models:/easyref@champion", str(elsewhere / "model")) == f"{elsewhere / 'model'}: version 1\n"
        finally:
            del os.environ["MLFLOW_TRACKING_URI"]
    weights = elsewhere / "model" / "checkpoint" / "easyref.safetensors"
    assert weights.read_bytes() == (place / "models" / "finetune_multi" / "easyref.safetensors").read_bytes()
    assert not (place / "mlruns").exists() and not (place / "mlflow.db").exists() and not list((place / ".prefect").iterdir())
    stored = {item.key.rsplit("/", 1)[-1] for item in bucket.objects.filter(Prefix="mlflow/")}
    assert {"easyref.safetensors", "manifest.json", "grid.png"} <= stored
    for database, query, expected in (
        ("prefect", "SELECT state_type::text FROM flow_run", "COMPLETED"),
        ("mlflow", "SELECT name FROM registered_models", "easyref"),
    ):
        connection = psycopg2.connect(host=HOST, port=postgres, user="easyref", dbname=database)
        with connection, connection.cursor() as cursor:
            cursor.execute(query)
            assert cursor.fetchall() == [(expected,)]
        connection.close()


def test_dvc_keeps_its_files_on_s3(bucket: Any, tmp_path: Path) -> None:
    make_project(tmp_path)

    def dvc(*words: str) -> None:
        done = run([sys.executable, "-m", "dvc", *words], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    dvc("remote", "add", "--default", "bucket", "s3://easyref/dvc")
    dvc("remote", "modify", "bucket", "endpointurl", bucket.meta.client.meta.endpoint_url)
    dvc("repro", "counter")
    made = (tmp_path / "counter").read_bytes()
    dvc("push")
    shutil.rmtree(tmp_path / ".dvc" / "cache")
    (tmp_path / "counter").unlink()
    dvc("pull", "counter")
    assert (tmp_path / "counter").read_bytes() == made
    assert list(bucket.objects.filter(Prefix="dvc/"))
