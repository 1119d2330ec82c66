"""Following an alias: nothing is lost in a swap, nothing bad ever serves, and the way back is short."""

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scoring_function import FakeEngine, lengths, model, until_ready
from waiting import wait_until
from wording import raises_naming

from cappy.errors import ConfigError, RegistryError, UnreachableError
from cappy.registry import Version
from serving.admin import read_secret
from serving.app import Options, create_app
from serving.config import ServeConfig
from serving.engine import Model, Models
from serving.following import Follower
from serving.guards import Keys

ALIAS = "models:/cappy@champion"
KEY = {"Authorization": "Bearer some-key"}
SECRET = "a-secret-of-mlflow"


def version(number: int) -> Version:
    return Version(name="cappy", number=number, source="", tags={"cappy.manifest": f"{number:064x}"})


def engine(number: int, **settings: Any) -> FakeEngine:
    """Its scores tell which version gave them."""
    return FakeEngine(score=lambda pair: 1000 * number + lengths(pair), **settings)


def name_of(number: int) -> str:
    return f"{number:012x}"


@dataclass
class Registry:
    """An alias that tests move, and models that are made of numbers; what is in `wrong` raises instead."""

    number: int = 1
    away: Exception | None = None
    odd: Any = None
    """What the alias is said to name, where it is not a version."""
    wrong: dict[int, Exception] = field(default_factory=dict)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    loaded: list[int] = field(default_factory=list)
    looks: int = 0
    gate: threading.Event | None = None

    def find(self) -> Version:
        self.looks += 1
        if self.away is not None:
            raise self.away
        if self.odd is not None:
            return self.odd
        return version(self.number)

    def load(self, result: Version) -> Model:
        self.loaded.append(result.number)
        if self.gate is not None:
            assert self.gate.wait(20)
        if result.number in self.wrong:
            raise self.wrong[result.number]
        return self.model(result.number)

    def model(self, number: int) -> Model:
        facts: dict[str, Any] = {"engine": engine(number, delay=0.001), "version": name_of(number), "spec": ALIAS}
        return model(**(facts | {"registered": version(number)} | self.facts.get(number, {})))

    def follower(self, models: Models, **settings: Any) -> Follower:
        return Follower(models=models, alias=ALIAS, read_alias=self.find, load=self.load, **settings)


Start = Callable[..., tuple[TestClient, Registry]]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(seconds) -> a client of a service that follows an alias, and the registry of that alias."""
    with ExitStack() as stack:

        def started(seconds: float = 0.02, **options: Any) -> tuple[TestClient, Registry]:
            registry = Registry()
            models = Models(registry.model(1))
            settings = Options(keys=Keys(["some-key"]), **options)
            app = create_app(models, settings, follower=registry.follower(models, seconds=seconds))
            client = stack.enter_context(TestClient(app))
            client.headers.update(KEY)
            until_ready(client)
            return client, registry

        yield started


def until(condition: Callable[[], object], what: str) -> None:
    wait_until(condition, what, seconds=20, pause=0.01)


def wait_for_version(client: TestClient, number: int) -> None:
    until(lambda: client.get("/ready").json()["version"] == name_of(number), f"version {number}")


def metric(client: TestClient, name: str) -> float:
    return next(float(line.split()[1]) for line in client.get("/metrics").text.splitlines() if line.startswith(name))


def test_swaps_under_load_lose_no_request_and_every_answer_names_the_version_that_gave_its_scores(start: Start) -> None:
    client, registry = start()
    ended = threading.Event()

    def ask(client_number: int) -> list[int]:
        result, asked = [], 0
        while not ended.is_set() or asked < 5:
            asked += 1
            pairs = [["a" * (client_number + 1), "b" * (asked % 7)], ["a", "b" * client_number]]
            answer = client.post("/score", json={"pairs": pairs})
            assert answer.status_code == 200, answer.text
            actual = answer.json()
            number = int(actual["version"], 16)
            assert actual["scores"] == [1000 * number + lengths((one, other)) for one, other in pairs]
            assert answer.headers["X-Cappy-Version"] == actual["version"]
            result.append(number)
        return result

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, number) for number in range(8)]
        try:
            for number in (2, 3, 2, 4):
                registry.number = number
                wait_for_version(client, number)
        finally:
            ended.set()
        numbers = [number for one in asking for number in one.result()]
    assert set(numbers) == {1, 2, 3, 4}
    assert registry.loaded == [2, 3, 4], "the one before is still loaded"
    assert metric(client, "cappy_swap_total") == 4


def test_scores_are_given_and_health_answers_while_a_version_is_loaded(start: Start) -> None:
    client, registry = start()
    registry.gate, registry.number = threading.Event(), 2
    until(lambda: registry.loaded, "a version to be loaded")
    for _ in range(5):
        assert client.post("/score", json={"pairs": [["a", "b"]]}).json()["version"] == name_of(1)
    assert client.get("/health").status_code == 200
    registry.gate.set()
    wait_for_version(client, 2)


def damaged() -> Exception:
    return RegistryError("models:/cappy/2: model.safetensors: is damaged; register the scorer again")


@pytest.mark.parametrize(
    ("wrong", "facts", "said"),
    [
        (damaged(), {}, "model.safetensors: is damaged"),
        (RuntimeError("out of memory\nstack"), {}, "'RuntimeError: out of memory stack'"),
        (None, {"engine": FakeEngine(score=lambda pair: float("nan"))}, "[nan]"),
        (
            None,
            {"engine": FakeEngine(score=lambda pair: 0.5205), "probes": [(("a", "b"), 0.5)]},
            "0.5205 for a probe pair that scored 0.5000",
        ),
    ],
    ids=["hash", "load", "no number", "probe"],
)
def test_a_bad_version_never_serves_is_loaded_once_and_is_reported_in_a_line(
    start: Start, caplog: pytest.LogCaptureFixture, wrong: Exception | None, facts: dict[str, Any], said: str
) -> None:
    client, registry = start()
    registry.wrong = {2: wrong} if wrong else {}
    registry.facts[2] = facts
    registry.number = 2
    until(lambda: client.get("/model").json()["refused"], "a refused version")
    looks = registry.looks
    until(lambda: registry.looks > looks + 5, "5 more looks")
    assert registry.loaded == [2]
    state = client.get("/model").json()
    assert said in state["refused"]["models:/cappy/2"]
    assert (state["current"]["version"], state["former"]) == (name_of(1), None)
    assert client.post("/score", json={"pairs": [["a", "b"]]}).json()["version"] == name_of(1)
    assert client.get("/ready").status_code == 200
    assert metric(client, "cappy_swap_refused_total") == 1
    lines = [record for record in caplog.records if "models:/cappy/2 is refused" in record.message]
    assert len(lines) == 1
    assert "\n" not in lines[0].message
    registry.number = 3
    wait_for_version(client, 3)


def test_a_version_may_answer_its_stored_pairs_in_another_precision(start: Start) -> None:
    client, registry = start()
    registry.facts[2] = {"engine": FakeEngine(score=lambda pair: 0.5195), "probes": [(("a", "b"), 0.5)]}
    registry.number = 2
    wait_for_version(client, 2)


def test_a_version_that_was_mended_gets_another_chance_when_somebody_asks(start: Start) -> None:
    client, registry = start(seconds=60)
    registry.wrong, registry.number = {2: damaged()}, 2
    assert client.post("/admin/refresh").json() == {"looks": True}
    until(lambda: client.get("/model").json()["refused"], "a refused version")
    registry.wrong = {}
    client.post("/admin/refresh")
    wait_for_version(client, 2)
    assert client.get("/model").json()["refused"] == {}


def test_a_version_whose_files_cannot_be_reached_is_fetched_three_times_and_then_refused(start: Start) -> None:
    client, registry = start()
    registry.wrong, registry.number = {2: UnreachableError("its files cannot be had")}, 2
    until(lambda: client.get("/model").json()["refused"], "a refused version")
    looks = registry.looks
    until(lambda: registry.looks > looks + 5, "5 more looks")
    assert registry.loaded == [2, 2, 2]


def test_a_version_whose_files_can_be_reached_again_serves(start: Start) -> None:
    client, registry = start()
    registry.wrong, registry.number = {2: UnreachableError("its files cannot be had")}, 2
    until(lambda: registry.loaded, "a version to be loaded")
    registry.wrong = {}
    wait_for_version(client, 2)


@pytest.mark.parametrize("away", [UnreachableError("MLflow does not answer"), RegistryError("no such version")])
def test_a_registry_that_is_away_is_warned_of_once_and_the_model_goes_on(
    start: Start, caplog: pytest.LogCaptureFixture, away: Exception
) -> None:
    client, registry = start()
    caplog.set_level(logging.INFO, "serving")
    registry.away = away
    looks = registry.looks
    until(lambda: registry.looks > looks + 5, "5 more looks")
    assert client.get("/model").json()["trouble"] == str(away)
    assert client.post("/score", json={"pairs": [["a", "b"]]}).json()["version"] == name_of(1)
    assert client.get("/ready").status_code == 200
    assert sum("cannot be read" in record.message for record in caplog.records) == 1
    registry.away, registry.number = None, 2
    wait_for_version(client, 2)
    assert client.get("/model").json()["trouble"] == ""
    assert sum("can be read again" in record.message for record in caplog.records) == 1


def test_after_a_defect_the_model_goes_on_its_trouble_is_reported_and_the_next_sound_look_ends_it(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    client, registry = start()
    registry.odd = object()
    until(lambda: client.get("/model").json()["trouble"], "trouble")
    assert "AttributeError" in client.get("/model").json()["trouble"]
    assert f"following {ALIAS} failed" in caplog.text
    assert client.post("/score", json={"pairs": [["a", "b"]]}).json()["version"] == name_of(1)
    registry.number, registry.odd = 2, None
    wait_for_version(client, 2)
    assert client.get("/model").json()["trouble"] == ""


def test_a_rollback_by_hand_loads_nothing_and_holds_until_the_alias_moves(start: Start) -> None:
    client, registry = start()
    assert client.post("/admin/rollback").status_code == 409
    registry.number = 2
    wait_for_version(client, 2)
    assert client.post("/admin/rollback").json()["current"]["registered"] == "models:/cappy/1"
    looks = registry.looks
    until(lambda: registry.looks > looks + 5, "5 more looks")
    assert client.get("/ready").json()["version"] == name_of(1), "the alias still names version 2"
    registry.number = 1
    looks = registry.looks
    until(lambda: registry.looks > looks + 2, "2 more looks")
    registry.number = 2
    wait_for_version(client, 2)
    assert registry.loaded == [2]


def test_the_alias_moving_back_while_a_version_is_loaded_keeps_that_version_out(start: Start) -> None:
    client, registry = start()
    registry.gate, registry.number = threading.Event(), 2
    until(lambda: registry.loaded, "a version to be loaded")
    registry.number = 1
    looks = registry.looks
    registry.gate.set()
    until(lambda: registry.looks > looks + 3, "3 more looks")
    assert metric(client, "cappy_swap_total") == 0
    assert client.get("/model").json()["former"] is None


def test_the_former_version_can_be_asked_for_and_no_other(start: Start) -> None:
    client, registry = start()
    body = {"pairs": [["a", "b"]]}
    for number in (2, 3):
        registry.number = number
        wait_for_version(client, number)
    for number in (2, 3):
        answer = client.post("/score", json={**body, "version": name_of(number)})
        assert answer.json()["version"] == answer.headers["X-Cappy-Version"] == name_of(number)
        assert answer.json()["scores"] == [1000 * number + 1.001]
    assert client.post("/score", json=body).json()["version"] == name_of(3)
    assert client.post("/score", json={**body, "version": name_of(1)}).status_code == 404
    assert client.post("/score", json={**body, "version": name_of(2)[:6]}).status_code == 404


def test_at_most_two_models_stay_and_what_was_replaced_is_freed(start: Start) -> None:
    import gc
    import weakref

    client, registry = start()
    kept: list[weakref.ref[FakeEngine]] = []
    for number in (2, 3, 4):
        made = engine(number)
        kept.append(weakref.ref(made))
        registry.facts[number] = {"engine": made}
        del made
        registry.number = number
        wait_for_version(client, number)
        client.post("/score", json={"pairs": [["a", "b"]]})
        registry.facts.clear()
    gc.collect()
    until(lambda: [one() is not None for one in kept] == [False, True, True], "the oldest version to be let go")


def test_the_moves_need_a_key_and_without_keys_there_are_none(start: Start) -> None:
    client, _ = start()
    for path in ("/admin/refresh", "/admin/rollback"):
        answer = client.post(path, headers={"Authorization": "Bearer another"})
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert client.get("/model", headers={"Authorization": ""}).status_code == 401
    registry = Registry()
    models = Models(registry.model(1))
    with TestClient(create_app(models, follower=registry.follower(models))) as open_client:
        for path in ("/admin/refresh", "/admin/rollback", "/webhooks/mlflow"):
            assert open_client.post(path).status_code == 404
        assert open_client.get("/model").json()["follows"] == ALIAS


JSON = {"Content-Type": "application/json"}


def event(action: str = "created", **data: str) -> bytes:
    named = {"name": "cappy", "alias": "champion", "version": "2"} | data
    return json.dumps({"entity": "model_version_alias", "action": action, "timestamp": "now", "data": named}).encode()


def signature(body: bytes, at: float | None = None, secret: str = SECRET, sent: bytes | None = None) -> dict[str, str]:
    """Headers as MLflow sends them with `body`, whose signature is of `sent`."""
    stamp = str(int(time.time() if at is None else at))
    content = f"an-id.{stamp}.".encode() + (body if sent is None else sent)
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    given = f"v1,{base64.b64encode(digest).decode()}"
    return {**JSON, "X-MLflow-Delivery-Id": "an-id", "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": given}


@pytest.mark.parametrize("action", ["created", "deleted"])
def test_a_signed_event_about_the_alias_has_it_looked_at_once(start: Start, action: str) -> None:
    client, registry = start(seconds=600, webhook_secret=SECRET)
    registry.number = 2
    body = event(action, version="77", source="s3://elsewhere")
    answer = client.post("/webhooks/mlflow", content=body, headers=signature(body))
    assert (answer.status_code, answer.json()) == (202, {"looks": True})
    wait_for_version(client, 2)
    assert registry.loaded == [2], "what the event names is not fetched"


def test_an_event_about_something_else_is_taken_and_nothing_is_done(start: Start) -> None:
    client, registry = start(seconds=600, webhook_secret=SECRET)
    other = {"entity": "registered_model", "action": "created", "data": {"name": "cappy", "alias": "champion"}}
    bodies = (event(name="other"), event(alias="challenger"), json.dumps(other).encode(), b"[]", b"{", b'{"data":1}')
    for body in bodies:
        answer = client.post("/webhooks/mlflow", content=body, headers=signature(body))
        assert (answer.status_code, answer.json()) == (202, {"looks": False})
    assert registry.looks == 0


def test_an_event_that_is_not_signed_with_the_secret_is_401(start: Start) -> None:
    client, registry = start(seconds=600, webhook_secret=SECRET)
    body = event()
    good = signature(body)
    for headers in (
        JSON,
        signature(body, secret="another-secret"),
        signature(body, sent=event(version="3")),
        signature(body, at=time.time() - 400),
        signature(body, at=time.time() + 400),
        {**good, "X-MLflow-Delivery-Id": "another"},
        {**good, "X-MLflow-Timestamp": str(int(good["X-MLflow-Timestamp"]) + 1)},
        {**good, "X-MLflow-Timestamp": "-1"},
        {**good, "X-MLflow-Signature": good["X-MLflow-Signature"][3:]},
        {**good, "X-MLflow-Signature": "v1,"},
    ):
        answer = client.post("/webhooks/mlflow", content=body, headers=headers)
        assert answer.status_code == 401, headers
        assert SECRET not in answer.text
    assert client.post("/webhooks/mlflow", content=b"x" * 70_000, headers=good).status_code == 413
    assert registry.looks == 0


def test_the_signature_is_the_one_that_mlflow_computes() -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    body = event()
    headers = signature(body)
    stamp = headers["X-MLflow-Timestamp"]
    assert _generate_hmac_signature(SECRET, "an-id", stamp, body.decode()) == headers["X-MLflow-Signature"]


@pytest.mark.parametrize("spec", ["builtin", "some/folder", "models:/cappy/3", "hub:org/name@0123456"])
def test_what_is_no_alias_is_not_followed(spec: str) -> None:
    assert [ServeConfig(scorer=spec, follow_seconds=asked).follow_interval for asked in (None, 0)] == [0, 0]
    with raises_naming(ConfigError, "--follow-seconds 5", spec, "models:/name@"):
        ServeConfig(scorer=spec, follow_seconds=5)


def test_an_alias_is_followed_every_30_seconds_unless_reported_otherwise() -> None:
    intervals = [ServeConfig(scorer=ALIAS, follow_seconds=asked).follow_interval for asked in (None, 0, 2.5)]
    assert intervals == [30, 0, 2.5]


def test_a_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_secret() == ""
    monkeypatch.setenv("CAPPY_WEBHOOK_SECRET", SECRET)
    assert read_secret() == SECRET
    monkeypatch.setenv("CAPPY_WEBHOOK_SECRET", "short")
    with raises_naming(ConfigError, "CAPPY_WEBHOOK_SECRET: ", "8") as error:
        read_secret()
    assert "short;" not in str(error.value)
