"""Where an LLM is asked, and with whose key."""

from dataclasses import dataclass, field

import httpx2

from cappy.errors import ConfigError, shown
from cappy.sampling.endpoint.client import NO_KEY, api_key, base_address, refuse_secrets
from serving.gateway.ledger import Prices


@dataclass(frozen=True, kw_only=True)
class LLM:
    """Where an LLM is asked: `model` takes the place of the client's where it is set.

    `key` is sent where it is set; else what the client sent as its Authorization, if `passes_key`.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    passes_key: bool = True
    prices: Prices = field(default_factory=Prices)

    def authorization(self, of_client: str) -> str:
        """The header to send, empty for none."""
        return f"Bearer {self.key}" if self.key else of_client if self.passes_key else ""


def llm(url: str, *, model: str = "", key_variable: str = "", passes_key: bool = True, prices: Prices) -> LLM:
    """The LLM at an address, its key from the environment; ConfigError where either is none."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{shown(url)}: an LLM's address is http://host:port/v1")
    refuse_secrets(url)
    try:
        httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{shown(url)}: is no address ({error}); an LLM's is http://host:port/v1") from error
    key = key_of(url, key_variable)
    return LLM(url=base_address(url), model=model, key=key, passes_key=passes_key, prices=prices)


def key_of(url: str, variable: str) -> str:
    """The key of a server in a variable of the environment, empty without a variable; ConfigError if it is not set."""
    key = api_key(variable) if variable else ""
    if key == NO_KEY:
        raise ConfigError(f"{variable} is not set; put the key of {url} there, or leave the flag out")
    return key
