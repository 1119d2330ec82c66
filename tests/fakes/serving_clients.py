"""Clients that others wrote ask the service: python serving_clients.py CLIENT ADDRESS prints what one got, as JSON.

It runs in an environment of its own (.venv-servers), with neither the service nor the scorer.
"""

import asyncio
import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUERY, TEXTS = "abc", ["x", "xxxx", "yy"]


def refusal(work: Callable[[], object]) -> str:
    """What the client makes of a refusal."""
    try:
        work()
    except Exception as error:  # noqa: BLE001 (each client has errors of its own)
        return f"{type(error).__name__}: {error}"
    return ""


def cohere_clients(address: str) -> dict[str, Any]:
    """Cohere's SDK, both versions."""
    import cohere

    first = cohere.Client("any-key", base_url=address)
    second = cohere.ClientV2("any-key", base_url=address)
    one = first.rerank(query=QUERY, documents=[TEXTS[0], {"text": TEXTS[1]}], model="cappy", return_documents=True)
    two = second.rerank(model="cappy", query=QUERY, documents=TEXTS, top_n=2)
    return {
        "first": [(result.index, result.relevance_score, result.document.text) for result in one.results],
        "second": [(result.index, result.relevance_score) for result in two.results],
        "tokens": two.meta.billed_units.input_tokens,
        "unknown": refusal(lambda: second.rerank(model="other", query=QUERY, documents=TEXTS)),
        "empty": refusal(lambda: second.rerank(model="cappy", query=QUERY, documents=[])),
    }


def jina_client(address: str) -> dict[str, Any]:
    """Haystack's ranker for Jina."""
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.rankers.jina import JinaRanker

    key = Secret.from_token("any-key")
    ranker = JinaRanker(api_key=key, model="cappy", top_k=2, base_url=f"{address}/v1/rerank")
    result = ranker.run(QUERY, [Document(content=text) for text in TEXTS])
    other = JinaRanker(api_key=key, model="other", base_url=f"{address}/v1/rerank")
    return {
        "ranked": [(document.content, document.score) for document in result["documents"]],
        "meta": result["meta"],
        "unknown": refusal(lambda: other.run(QUERY, [Document(content="x")])),
    }


def tei_client(address: str) -> dict[str, Any]:
    """Haystack's ranker for Text Embeddings Inference."""
    from haystack import Document
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    documents = [Document(content=text) for text in TEXTS]
    ranked = {}
    for raw in (False, True):
        ranker = HuggingFaceTEIRanker(url=address, top_k=2, raw_scores=raw, token=None, max_retries=0)
        result = ranker.run(query=QUERY, documents=documents)["documents"]
        ranked["raw" if raw else "scores"] = [(document.content, document.score) for document in result]
    return ranked


def triton_client(address: str) -> dict[str, Any]:
    """Triton's HTTP client, tensors as binary data and as JSON."""
    import numpy
    import tritonclient.http as triton

    client = triton.InferenceServerClient(address.removeprefix("http://"))
    actual: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready() and client.is_model_ready("cappy"),
        "metadata": client.get_model_metadata("cappy"),
        "server": client.get_server_metadata(),
    }
    for binary in (True, False):
        inputs = []
        for name, texts in (("instruction", [QUERY] * 3), ("response", TEXTS)):
            tensor = triton.InferInput(name, [3, 1], "BYTES")
            array = numpy.array([[text] for text in texts], dtype=object)
            inputs.append(tensor.set_data_from_numpy(array, binary_data=binary))
        wanted = None if binary else [triton.InferRequestedOutput("score")]
        result = client.infer("cappy", inputs, request_id="mine", outputs=wanted)
        actual["binary" if binary else "json"] = result.as_numpy("score").tolist()
    actual["unknown"] = refusal(lambda: client.infer("other", inputs))
    return actual


def kserve_client(address: str) -> dict[str, Any]:
    """KServe's REST client, both versions of its protocol; without the server that its package imports."""
    bare = types.ModuleType("kserve")
    bare.__path__ = [str(next(Path(sys.prefix).glob("lib/python*/site-packages")) / "kserve")]
    sys.modules["kserve"] = bare
    clients = importlib.import_module("kserve.inference_client")
    kinds = importlib.import_module("kserve.protocol.infer_type")

    async def ask() -> dict[str, Any]:
        first = clients.InferenceRESTClient(clients.RESTConfig(protocol="v1"))
        second = clients.InferenceRESTClient(clients.RESTConfig(protocol="v2"))
        instances = {"instances": [{"instruction": QUERY, "response": text} for text in TEXTS]}
        inputs = [
            kinds.InferInput("instruction", [3], "BYTES", [QUERY] * 3),
            kinds.InferInput("response", [3], "BYTES", TEXTS),
        ]
        request = kinds.InferRequest(model_name="cappy", infer_inputs=inputs)
        tensors = await second.infer(address, request, model_name="cappy")
        return {
            "first": await first.infer(address, instances, model_name="cappy"),
            "second": tensors.outputs[0].data,
            "live": await second.is_server_live(address),
            "ready": await second.is_server_ready(address),
            "models": [await client.is_model_ready(address, "cappy") for client in (first, second)],
        }

    return asyncio.run(ask())


CLIENTS = {
    "cohere": cohere_clients,
    "jina": jina_client,
    "tei": tei_client,
    "triton": triton_client,
    "kserve": kserve_client,
}

if __name__ == "__main__":
    print(json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
