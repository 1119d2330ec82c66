"""What holds of every dialect: nothing that is sent makes it fail, and a refusal is a sentence in its own shape."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_function import model, until_ready

from serving.app import create_app
from serving.dialects import DIALECTS
from serving.engine import Models

Serve = Callable[..., TestClient]
Body = dict[str, Any]
HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dialect, a right body, where a list of many responses stands in it, and where a refusal has its sentence."""

    name: str
    body: Body
    many: Callable[[int], Body]
    sentence: tuple[str, ...]
    names_model: bool = False
    path: str = ""


def tensor(name: str, texts: list[str]) -> Body:
    return {"name": name, "datatype": "BYTES", "shape": [len(texts)], "data": texts}


def tensors(count: int) -> Body:
    return {"inputs": [tensor(name, [name] * count) for name in ("instruction", "response")]}


def instances(count: int) -> Body:
    return {"instances": [["a", "b"]] * count}


def split(count: int) -> Body:
    return {"dataframe_split": {"columns": ["instruction", "response"], "data": [["a", "b"]] * count}}


def case(name: str, many: Callable[[int], Body], *sentence: str, **settings: Any) -> Case:
    return Case(name=name, body=many(2), many=many, sentence=sentence, **settings)


CASES = [
    case("score", lambda count: {"pairs": [["a", "b"]] * count}, "detail"),
    case("select", lambda count: {"instruction": "a", "responses": ["b"] * count}, "detail"),
    case("cohere", lambda count: {"query": "a", "documents": ["b"] * count}, "message", names_model=True),
    case("rerank", lambda count: {"query": "a", "documents": ["b"] * count}, "message", names_model=True),
    case("tei_rerank", lambda count: {"query": "a", "texts": ["b"] * count}, "error"),
    case("tei_predict", lambda count: {"inputs": [["a", "b"]] * count}, "error"),
    case("vllm", lambda count: {"text_1": "a", "text_2": ["b"] * count}, "error", "message", names_model=True),
    case("vertex", instances, "error"),
    case("kserve", instances, "error", path="/v1/models/cappy:predict"),
    case("open_inference", tensors, "error", path="/v2/models/cappy/infer"),
    case("mlflow", split, "message"),
    case("openrlhf", lambda count: {"query": ["ab"] * count, "prompts": ["a"] * count}, "detail"),
]
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def path(case: Case) -> str:
    return case.path or next(dialect.paths[0] for dialect in DIALECTS if dialect.name == case.name)


def error_text(case: Case, body: Any) -> str:
    """The sentence of a refusal."""
    for key in case.sentence:
        body = body[key]
    assert isinstance(body, str)
    return body


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(Models(model()))) as client:
        until_ready(client)
        yield client


@pytest.fixture(scope="module")
def document(client: TestClient) -> Body:
    body: Body = client.get("/openapi.json").json()
    return body


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*place, key)
        yield from places(one, (*place, key))


def changed(body: Body, place: tuple[Any, ...], value: Any) -> Body:
    copy: Body = json.loads(json.dumps(body))
    at: Any = copy
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    return copy


def lists(body: Body) -> list[tuple[Any, ...]]:
    return [place for place in places(body) if isinstance(at(body, place), list)]


def at(body: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        body = body[key]
    return body


def refused(case: Case, client: TestClient, body: Any, *statuses: int) -> None:
    """The body gets one of the statuses and a sentence; the next one is scored as ever."""
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    answer = client.post(path(case), content=content, headers=HEADERS)
    assert answer.status_code in statuses, f"{answer.status_code} {answer.text[:200]} for {content[:200]!r}"
    sentence = error_text(case, answer.json())
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert client.post(path(case), json=case.body).status_code == 200


def test_the_table_has_every_dialect() -> None:
    assert [case.name for case in CASES] == [case.name for case in CASES if path(case)]
    assert {case.name for case in CASES} == {dialect.name for dialect in DIALECTS}


@each
def test_a_list_may_not_be_empty(case: Case, client: TestClient) -> None:
    for place in lists(case.body):
        refused(case, client, changed(case.body, place, []), 400, 422)


@each
def test_a_list_is_no_text_and_a_text_no_list(case: Case, client: TestClient) -> None:
    if case.name != "vllm":  # where one response is a text, and may be empty
        refused(case, client, changed(case.body, lists(case.body)[0], ""), 400, 422)
    for place in places(case.body):
        if isinstance(at(case.body, place), str):
            refused(case, client, changed(case.body, place, ["a", "b", "c"]), 400, 422)


@each
@pytest.mark.parametrize("value", [1, 1.5, True, {"a": 1}, float("nan"), float("-inf"), 10**400])
def test_values_of_other_types_are_refused_wherever_they_stand(case: Case, client: TestClient, value: Any) -> None:
    for place in places(case.body):
        if place[-1] != "shape" and "shape" not in place[:-1]:
            refused(case, client, changed(case.body, place, value), 400, 422)


@each
def test_fields_that_a_dialect_does_not_have_are_refused_by_name(case: Case, client: TestClient) -> None:
    for value in (1, float("nan"), None):
        answer = client.post(path(case), content=json.dumps({**case.body, "temperature": value}), headers=HEADERS)
        assert answer.status_code in (400, 422)
        assert error_text(case, answer.json()).startswith("temperature: ")


@each
def test_a_text_of_10_megabytes_and_100_000_responses_are_413(case: Case, client: TestClient) -> None:
    refused(case, client, changed(case.body, lists(case.body)[0], ["x" * 10_000_000]), 413)
    refused(case, client, case.many(100_000), 413)


@each
def test_a_million_values_are_413_before_they_are_looked_at_one_by_one(case: Case, client: TestClient) -> None:
    for place in lists(case.body):
        refused(case, client, changed(case.body, place, [1] * 1_000_000), 413)
    refused(case, client, {**case.body, **dict.fromkeys(map(str, range(100_000)), 1)}, 413)


@each
def test_half_of_a_surrogate_pair_is_no_text(case: Case, client: TestClient) -> None:
    for place in places(case.body):
        if isinstance(at(case.body, place), str):
            refused(case, client, json.dumps(changed(case.body, place, "@")).replace("@", "\\ud800"), 400)


@each
@pytest.mark.parametrize("body", ["", "{", "nan", "[" * 100_000, b"\xff\xfe", "null", "[]", "1", '"a"', "{}"])
def test_what_is_no_object_of_a_dialect_is_refused(case: Case, client: TestClient, body: Any) -> None:
    answer = client.post(path(case), content=body, headers=HEADERS)
    assert answer.status_code in (400, 422)
    assert answer.json()


@each
def test_a_model_that_is_not_served_is_404_and_one_that_is_may_be_named(case: Case, client: TestClient) -> None:
    if case.names_model:
        refused(case, client, {**case.body, "model": "other"}, 404)
        for name in ("cappy", "abc", None):
            assert client.post(path(case), json={**case.body, "model": name}).status_code == 200
    elif "models" in path(case):
        answer = client.post(path(case).replace("cappy", "other"), json=case.body)
        assert (answer.status_code, error_text(case, answer.json())[:8]) == (404, "no model")
    else:
        refused(case, client, {**case.body, "model": "other"}, 400, 422)


@each
def test_an_instruction_may_not_be_empty_and_a_response_may(case: Case, client: TestClient) -> None:
    text = json.dumps(case.body)
    empty = {"openrlhf": '"ab"', "open_inference": '"response", "response"'}.get(case.name, '"b"')
    shorter = {"openrlhf": '"a"', "open_inference": '"", ""'}.get(case.name, '""')
    assert empty in text
    assert client.post(path(case), content=text.replace(empty, shorter), headers=HEADERS).status_code == 200
    if case.name not in ("score", "select"):
        without = text.replace('"instruction", "instruction"', '"", ""').replace('"a"', '""')
        refused(case, client, without, 400, 422)


def conforms(document: Body, place: str, answer: Any) -> None:
    """The status and the body are those that the document has for the path."""
    described = document["paths"][place]["post"]["responses"][str(answer.status_code)]
    schema = described["content"]["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document["components"]}, answer.json())


texts = st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@each
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_body_makes_a_dialect_fail_and_every_answer_is_as_documented(
    case: Case, client: TestClient, document: Body, data: st.DataObject
) -> None:
    body: Any = case.body
    if data.draw(st.booleans()):
        body = data.draw(values)
    else:
        for _ in range(data.draw(st.integers(0, 3))):
            place = data.draw(st.sampled_from(list(places(body))))
            body = changed(body, place, data.draw(values | st.just(at(body, place))))
        properties = schema(document, case)["properties"]
        for name in data.draw(st.lists(st.sampled_from(sorted(properties)), max_size=2)):
            body = {**body, name: data.draw(values)}
    content = json.dumps(body).encode("utf-8", "replace")
    answer = client.post(path(case), content=content, headers=HEADERS)
    assert answer.status_code in (200, 400, 404, 413, 422), answer.text
    dialect = next(dialect for dialect in DIALECTS if dialect.name == case.name)
    place = next(one for one in dialect.paths if one.split("{")[0] == path(case).split("cappy")[0])
    conforms(document, place, answer)


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=60), head=st.integers(-1, 60) | st.text(alphabet="0123456789-+ ", max_size=4))
def test_no_binary_tensors_make_open_inference_fail(client: TestClient, body: bytes, head: int | str) -> None:
    headers = {"Inference-Header-Content-Length": str(head)}
    assert client.post("/v2/models/cappy/infer", content=body, headers=headers).status_code == 400
    prefix = json.dumps({"inputs": [{"name": "response", "parameters": {"binary_data_size": head}}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(prefix))}
    assert client.post("/v2/models/cappy/infer", content=prefix + body, headers=headers).status_code == 400


def schema(document: Body, case: Case) -> Mapping[str, Any]:
    dialect = next(dialect for dialect in DIALECTS if dialect.name == case.name)
    result: Mapping[str, Any] = document["components"]["schemas"][dialect.request.__name__]
    return result
