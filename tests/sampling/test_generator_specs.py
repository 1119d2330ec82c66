"""What is said of a generator that names a model without an address, an address without a model, or no folder."""

import pytest
from wording import assert_names, raises_naming

from cappy.errors import ConfigError
from cappy.sampling import load_generator
from cappy.specs import endpoint_form, missing_generator, parse_spec


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("gpt-4o-mini", "openai:gpt-4o-mini@https://api.openai.com/v1"),
        ("o3", "openai:o3@https://api.openai.com/v1"),
        ("claude-sonnet-4-5", "openai:claude-sonnet-4-5@https://api.anthropic.com/v1"),
        ("gemini-2.5-flash", "openai:gemini-2.5-flash@https://generativelanguage.googleapis.com/v1beta/openai"),
        ("llama3", "openai:llama3@URL"),
        ("openai:gpt-4o-mini", "openai:gpt-4o-mini@https://api.openai.com/v1"),
        ("openai:llama3", "openai:llama3@URL"),
        ("openai:", "openai:NAME@URL"),
        ("http://h/v1", "openai:NAME@http://h/v1"),
        ("org/model", "hub:org/model@REVISION"),
        ("vllm:org/model", "hub:org/model@REVISION"),
        ("./folder", "check the path"),
    ],
)
def test_a_generator_that_names_no_folder_gets_the_spec_that_its_name_suggests(text: str, form: str) -> None:
    with raises_naming(ConfigError, text.removeprefix("vllm:"), form):
        load_generator(text)


@pytest.mark.parametrize("name", ["gpt-4o-mini", "claude-x", "gemini-2", "o1"])
def test_a_suggestion_with_an_address_is_a_spec(name: str) -> None:
    spec = parse_spec(endpoint_form(name))
    assert (spec.kind, spec.name) == ("openai", name)


def test_names_that_only_begin_like_a_model_have_no_providers_address() -> None:
    for name in ("gptq-model", "o3000a", "claudette"):
        assert "api." not in endpoint_form(name)
        assert_names(str(missing_generator(name)), name, "URL")


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec("https://user:a-long-password@h/v1")
    assert "a-long-password" not in str(caught.value)
