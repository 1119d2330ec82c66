"""MLflow's webhooks: told by a signed request that an alias moved, the service looks at its own alias.

Nothing that a request names is ever fetched. The signature is that of MLflow 3: HMAC-SHA256 over the delivery's id, its
time and its body, in base64 behind "v1,".
"""

import base64
import hashlib
import hmac
import os
from collections.abc import Mapping

from pydantic_core import from_json

from cappy.errors import ConfigError
from cappy.specs import parse_spec
from serving.keys import SHORTEST

VARIABLE = "CAPPY_WEBHOOK_SECRET"
ID, TIMESTAMP, SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
ENTITY = "model_version_alias"
FRESH_SECONDS = 300
"""How far a delivery's time may be from ours; older ones are somebody's replay."""


def read_secret() -> str:
    """The secret from CAPPY_WEBHOOK_SECRET, empty if there is none; ConfigError for a short one."""
    secret = os.environ.get(VARIABLE, "").strip()
    if secret and len(secret) < SHORTEST:
        remedy = "make one with: openssl rand -hex 24"
        raise ConfigError(f"{VARIABLE}: is shorter than {SHORTEST} characters; {remedy}")
    return secret


def signed(secret: str, headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether who knows the secret sent this body within five minutes of `now`, in seconds since 1970."""
    identity, time, given = (headers.get(name, "") for name in (ID, TIMESTAMP, SIGNATURE))
    if not time.isascii() or not time.isdigit() or len(time) > 12 or abs(now - int(time)) > FRESH_SECONDS:
        return False
    content = f"{identity}.{time}.".encode("utf-8", "surrogatepass") + body
    digest = hmac.new(secret.encode(), content, hashlib.sha256).digest()
    wanted = f"v1,{base64.b64encode(digest).decode()}"
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), wanted.encode())


def about(alias: str, body: bytes) -> bool:
    """Whether an event says that the alias of this spec was set or deleted."""
    try:
        event = from_json(body)
    except ValueError:
        return False
    if not isinstance(event, Mapping) or event.get("entity") != ENTITY:
        return False
    data, spec = event.get("data"), parse_spec(alias)
    return isinstance(data, Mapping) and (data.get("name"), data.get("alias")) == (spec.name, spec.revision)
