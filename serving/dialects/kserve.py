"""KServe's version 1: POST /v1/models/NAME:predict, instances and predictions as Vertex AI has them."""

from dataclasses import replace

from serving.dialects.vertex import VERTEX

KSERVE = replace(VERTEX, name="kserve", paths=("/v1/models/{model}:predict",))
