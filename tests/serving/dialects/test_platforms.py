"""Vertex AI, KServe, Open Inference, MLflow and OpenRLHF: the shapes of their requests and answers."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import pandas as pd  # type: ignore[import-untyped]
import pytest
from calibrations import straight
from fastapi.testclient import TestClient
from scoring_function import lengths, model, until_ready
from wording import assert_names

from serving.app import create_app
from serving.engine import Models

Serve = Callable[..., TestClient]
PAIRS = [("ab", "x"), ("abc", ""), ("ab", "x")]
SCORES = [2.001, 3.0, 2.001]
OBJECTS = [{"instruction": instruction, "response": response} for instruction, response in PAIRS]
COLUMNS = {"instruction": [pair[0] for pair in PAIRS], "response": [pair[1] for pair in PAIRS]}


@pytest.mark.parametrize("path", ["/predict", "/v1/models/cappy:predict", "/v1/models/abc:predict"])
@pytest.mark.parametrize("instances", [OBJECTS, PAIRS, [OBJECTS[0], PAIRS[1], OBJECTS[2]]])
def test_vertex_and_kserve_predict_instances_in_order(serve: Serve, path: str, instances: list[Any]) -> None:
    answer = serve().post(path, json={"instances": instances})
    assert answer.json() == {"predictions": [{"score": score} for score in SCORES]}
    calibrated = serve(calibration=straight({1: 1.0, 3: 0.5}, score=10.0))
    predictions = calibrated.post(path, json={"instances": instances, "parameters": {}}).json()["predictions"]
    assert predictions[1] == {"score": 3.0, "expected": pytest.approx(0.3)}


def test_parameters_that_scoring_does_not_know_are_refused(serve: Serve) -> None:
    answer = serve().post("/predict", json={"instances": PAIRS, "parameters": {"temperature": 1}})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("parameters.temperature: ")


def test_kserve_and_vllm_list_the_model_by_its_name(serve: Serve) -> None:
    client = serve()
    body = client.get("/v1/models").json()
    assert body["models"] == ["cappy"]
    assert [model["id"] for model in body["data"]] == ["cappy"]
    assert client.get("/v1/models/cappy").json() == {"name": "cappy", "ready": True}
    assert client.get("/v1/models/other").status_code == 404


def tensor(name: str, texts: list[Any], shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": shape, "data": texts}


def tensors(shape: list[int] | None = None) -> list[dict[str, Any]]:
    return [tensor(name, texts, shape or [len(texts)]) for name, texts in COLUMNS.items()]


@pytest.mark.parametrize("path", ["/v2/models/cappy/infer", "/v2/models/cappy/versions/abc/infer"])
def test_open_inference_takes_two_tensors_and_gives_one_of_their_shape(serve: Serve, path: str) -> None:
    client = serve()
    nested = [[[text] for text in texts] for texts in COLUMNS.values()]
    for shape, inputs in (
        ([3], tensors()),
        ([3, 1], tensors([3, 1])),
        ([3], tensors()[::-1]),
        ([3, 1], [tensor(name, texts, [3, 1]) for name, texts in zip(COLUMNS, nested, strict=True)]),
    ):
        body = client.post(path, json={"id": "mine", "inputs": inputs, "outputs": [{"name": "score"}]}).json()
        assert body == {
            "model_name": "cappy",
            "model_version": "abc",
            "id": "mine",
            "outputs": [{"name": "score", "datatype": "FP64", "shape": shape, "data": SCORES}],
        }


def binary(*columns: list[bytes], extra: bytes = b"", head: int = 0, size: int = 0) -> tuple[bytes, dict[str, str]]:
    """A body of the extension for binary data, and its headers."""
    raw = [b"".join(len(one).to_bytes(4, "little") + one for one in column) for column in columns]
    inputs = [
        {
            "name": name,
            "datatype": "BYTES",
            "shape": [len(column)],
            "parameters": {"binary_data_size": len(data) + size},
        }
        for name, column, data in zip(("instruction", "response"), columns, raw, strict=False)
    ]
    text = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return text + b"".join(raw) + extra, {"Inference-Header-Content-Length": str(len(text) + head)}


def test_open_inference_reads_tensors_that_follow_the_json_as_bytes(serve: Serve) -> None:
    columns = [[text.encode() for text in texts] for texts in COLUMNS.values()]
    body, headers = binary(*columns)
    answer = serve().post("/v2/models/cappy/infer", content=body, headers=headers)
    assert answer.json()["outputs"][0]["data"] == SCORES
    accents, headers = binary(["é".encode()], ["ü€".encode()])
    answer = serve().post("/v2/models/cappy/infer", content=accents, headers=headers)
    assert answer.json()["outputs"][0]["data"] == [1.002]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (binary([b"a"], [b"b"], extra=b"cc"), ["2 bytes", "tensors"]),
        (binary([b"a"], [b"b"], head=10**6), ["inference-header-content-length"]),
        (binary([b"a"], [b"b"], size=1), ["tensor", "exceeds the size"]),
        (binary([b"\xff"], [b"b"]), ["utf-8"]),
        (binary([b"a", b"b"], [b"b"]), ["instruction", "response", "equal shapes"]),
        (binary([b"a"]), ["inputs: ", "2"]),
    ],
)
def test_binary_tensors_whose_sizes_do_not_hold_are_refused(
    serve: Serve, body: tuple[bytes, dict[str, str]], named: list[str]
) -> None:
    answer = serve().post("/v2/models/cappy/infer", content=body[0], headers=body[1])
    assert answer.status_code == 400
    assert_names(answer.json()["error"], *named)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (tensors([2]), ["instruction", "3 texts", "2"]),
        ([tensors()[0], tensors()[0]], ["instruction and response"]),
        ([tensors()[0], tensor("response", ["a"], [1])], ["equal shapes"]),
        ([tensors()[0], tensor("response", ["a", 1, "b"], [3])], ["data", "strings"]),
        ([tensor("instruction", [""], [1]), tensor("response", ["a"], [1])], ["instruction", "empty"]),
        ([{**tensors()[0], "datatype": "FP32"}, tensors()[1]], ["'BYTES'"]),
    ],
)
def test_tensors_that_are_no_pairs_are_refused(serve: Serve, inputs: list[Any], named: list[str]) -> None:
    answer = serve().post("/v2/models/cappy/infer", json={"inputs": inputs})
    assert answer.status_code == 400
    assert_names(answer.json()["error"], *named)


def test_open_inference_says_what_is_served(serve: Serve) -> None:
    client = serve()
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    for place in ("/v2/models/cappy", "/v2/models/cappy/versions/abc"):
        body = client.get(place).json()
        assert body["versions"] == ["abc"]
        assert [(one["name"], one["datatype"], one["shape"]) for one in body["inputs"]] == [
            ("instruction", "BYTES", [-1]),
            ("response", "BYTES", [-1]),
        ]
        assert [(one["name"], one["datatype"]) for one in body["outputs"]] == [("score", "FP64")]
        assert client.get(f"{place}/ready").json() == {"name": "cappy", "ready": True}
    for place in ("/v2/models/other", "/v2/models/cappy/versions/9", "/v2/models/cappy/versions/9/ready"):
        assert client.get(place).status_code == 404
    assert client.post("/v2/models/cappy/versions/9/infer", json={"inputs": tensors()}).status_code == 404
    named = {name: {"inputs": tensors(), "model_name": name} for name in ("cappy", "other")}
    assert client.post("/v2/models/cappy/infer", json=named["cappy"]).status_code == 200
    assert client.post("/v2/models/cappy/infer", json=named["other"]).status_code == 404


def test_what_cannot_score_yet_or_any_more_says_so_to_every_platform() -> None:
    served = Models(model())
    with TestClient(create_app(served)) as client:
        until_ready(client)
        served.not_loaded_reason = "the service is shutting down"
        for path in ("/v2/health/ready", "/v2/models/cappy/ready", "/v1/models/cappy", "/ping"):
            assert client.get(path).status_code == 503
        assert client.get("/v2/health/live").status_code == 200


FORMS: list[dict[str, Any]] = [
    {"dataframe_split": {"columns": ["response", "instruction"], "data": [pair[::-1] for pair in PAIRS]}},
    {"dataframe_split": {"columns": ["instruction", "response"], "index": [7, 8, 9], "data": PAIRS}},
    {"dataframe_records": OBJECTS},
    {"instances": OBJECTS},
    {"inputs": COLUMNS},
    {"instances": COLUMNS},
]


class Loaded:
    """What MLflow's server asks of a loaded model, with the service's function for scores."""

    class metadata:  # noqa: N801 (MLflow's name)
        @staticmethod
        def get_input_schema() -> None:
            return None

    def predict(self, data: Any) -> list[float]:
        table = pd.DataFrame(data)
        return [lengths(pair) for pair in zip(table["instruction"], table["response"], strict=True)]


@pytest.fixture(scope="module")
def mlflow_server() -> TestClient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints
        from mlflow.pyfunc import scoring_server

    return TestClient(scoring_server.init(Loaded()))


@pytest.mark.parametrize("form", FORMS)
def test_invocations_are_answered_as_mlflows_own_server_answers_them(
    serve: Serve, mlflow_server: TestClient, form: dict[str, Any]
) -> None:
    headers = {"content-type": "application/json"}
    expected = mlflow_server.post("/invocations", content=json.dumps(form), headers=headers)
    answer = serve().post("/invocations", content=json.dumps(form), headers=headers)
    assert expected.status_code == answer.status_code == 200, expected.text
    assert answer.json() == expected.json() == {"predictions": SCORES}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, ["dataframe_split, dataframe_records, instances, inputs"]),
        ({"inputs": COLUMNS, "instances": OBJECTS}, ["dataframe_split, dataframe_records, instances, inputs"]),
        ({"dataframe_split": {"columns": ["instruction"], "data": [["a"]]}}, ["no column", "response"]),
        ({"dataframe_split": {"columns": ["instruction", "response"], "data": [["a"]]}}, ["row", "2 values"]),
        ({"dataframe_split": {"columns": ["instruction", "response"], "data": [["a", 1]]}}, ["row 0", "strings"]),
        ({"inputs": {"instruction": ["a", "b"], "response": ["c"]}}, ["2 instructions", "1 responses"]),
        ({"inputs": OBJECTS, "params": {"a": 1}}, ["params.a"]),
    ],
)
def test_invocations_without_a_table_of_pairs_are_refused(serve: Serve, body: dict[str, Any], named: list[str]) -> None:
    answer = serve().post("/invocations", json=body)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "BAD_REQUEST")
    assert_names(answer.json()["message"], *named)


def test_inputs_may_be_rows_too(serve: Serve) -> None:
    assert serve().post("/invocations", json={"inputs": OBJECTS}).json() == {"predictions": SCORES}


def test_mlflow_is_reported_that_the_service_lives(serve: Serve) -> None:
    client = serve()
    assert (client.get("/ping").status_code, client.get("/ping").text) == (200, "\n")
    assert client.get("/version").status_code == 200


def test_a_reward_is_that_of_what_follows_the_prompt(serve: Serve) -> None:
    body = {"query": ["<s>abx", "abcab", "ab"], "prompts": ["ab", "abc", "ab"], "labels": ["r", None, ""]}
    answer = serve().post("/get_reward", json=body).json()
    assert answer["rewards"] == answer["scores"] == [2.001, 3.002, 2.0]
    assert answer["extra_logs"]["logits"] == pytest.approx([20.01, 30.02, 20.0])


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"query": ["ab"]}, ["prompts: ", "missing"]),
        ({"query": ["ab"], "prompts": ["a", "b"]}, ["1 queries", "2 prompts"]),
        ({"query": ["ab", "ab"], "prompts": ["a", "c"]}, ["query 1", "prompt"]),
    ],
)
def test_a_query_whose_response_cannot_be_reported_is_refused(
    serve: Serve, body: dict[str, Any], named: list[str]
) -> None:
    answer = serve().post("/get_reward", json=body)
    assert answer.status_code == 422
    assert_names(answer.json()["detail"], *named)
