"""C10: the answer of a model that reasons is separated from its reasoning by markup alone."""

import time

import pytest

from cappy.reasoning import has_reasoning, strip_reasoning

HARMONY = "<|channel|>analysis<|message|>It could be Rome.<|end|><|start|>assistant<|channel|>final<|message|>Paris"


@pytest.mark.parametrize(
    "text",
    [
        "<think>It could be Rome.</think>Paris",
        "<think>\n\n</think>\n\nParis",
        "<THINK>It could be Rome.</THINK> Paris",
        "<thinking>It could be Rome.</thinking>\nParis\n",
        "<reasoning effort='high'>It could be Rome.</reasoning>Paris",
        "<thought>Rome?</thought>Paris",
        "<seed:think>Rome?</seed:think>Paris",
        "<antThinking>Rome?</antThinking>Paris",
        "[THINK]It could be Rome.[/THINK]Paris",
        "◁think▷It could be Rome.◁/think▷Paris",
        "<|begin_of_thought|>Rome?<|end_of_thought|>\n<|begin_of_solution|>Paris<|end_of_solution|>",
        "<|START_THINKING|>Rome?<|END_THINKING|><|START_RESPONSE|>Paris<|END_RESPONSE|>",
        "It could be Rome.\n</think>\n\nParis",
        "<think>a<think>b</think>c</think>Paris",
        "<think>the tag <think> opens it</think>Paris",
        "<think>```\nan open fence</think>Paris",
        "<think>`</think>Paris",
        "<think>one</think><think>two</think>Paris",
        HARMONY,
        f"{HARMONY}<|return|>",
        "<|start|>assistant<|channel|>final<|message|>Paris<|end|>",
        f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{}}<|call|><|start|>assistant{HARMONY}",
        "analysisThe user asks for a capital.assistantfinalParis",
        "<reflection>Was it Rome?</reflection>Paris",
        "<thinking>Rome.<reflection>No, not Rome.</reflection>It is in France.</thinking>\nParis",
        "<unused94>thought\nThe user asks for a capital.<unused95>Paris",
        "The user asks for a capital.<unused95>Paris",
        "<|channel>thought\nThe user asks for a capital.<channel|>Paris",
        "analysisA capital.assistantcommentary to=f {}assistantanalysisOf France.assistantfinalParis",
        "I shall look.assistantanalysisThe user asks for a capital.assistantfinalParis",
        "I shall look\nassistantanalysisThe user asks for a capital.\nassistantfinal\nParis",
        "The user asks for a capital.assistantfinalParis",
        "analysisThe user asks.assistant finalParis",
        "analysisThe user asks.assistantfinalParisassistantanalysisThe user said nothing more",
        "assistantanalysisThe user asks.assistantfinalRome?assistantanalysisNo.assistantfinalParis",
    ],
)
def test_reasoning_is_removed_and_the_answer_stays(text: str) -> None:
    assert strip_reasoning(text) == "Paris"
    assert has_reasoning(text)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>It could be Rome", ""),
        ("  <think>", ""),
        ("<think>one</think><think>two", ""),
        ("Let me see.\n<think>It could be Rome", "Let me see."),
        ("<|channel|>analysis<|message|>It could be", ""),
        ("[THINK]It could be", ""),
        ("analysisThe user asks for", ""),
        ("<think>It could be Rome.</think>", ""),
        ("<unused94>thought\nIt could be", ""),
        ("<|channel>thought\nIt could be", ""),
        ("<reflection>It could be", ""),
        ("I shall look.assistantanalysisThe user asks for", ""),
        ("Answer: <think>Rome?</think>Paris", "Answer: Paris"),
    ],
)
def test_reasoning_that_never_ended_leaves_no_answer_of_it(text: str, answer: str) -> None:
    assert strip_reasoning(text) == answer
    assert has_reasoning(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "I think it is Paris",
        "Thinking: it is Paris",
        "Write `<think>` before and `</think>` after it.",
        "An example:\n```xml\n<think>hm</think>\n```\nThat is all.",
        "The tag <think> opens a block.",
        "analysis of variance, a method",
        "An analysisThe typo stays",
        "<thinker>no tag of ours</thinker>",
        "a <|channel|> without a message",
        "a reflection on <reflections>",
        "Light of <unused93> and a channel of thought",
        "The words `assistantanalysis` and `assistantfinal` are left of the tokens.",
        'The words "assistantanalysis" and "assistantfinal" are left.',
        "Some servers write\n```\nanalysisHm.assistantfinalParis\n```\ninstead.",
        "An assistantanalysis is not a word, and assistantfinal none either.",
        "The assistant final exam follows the assistant analysis.",
        "set my_assistantfinal = 3; assistantfinal = 4",
        "obj.assistantfinal = 4 and obj.assistantanalysis()",
    ],
)
def test_a_text_without_reasoning_is_left_as_it_is(text: str) -> None:
    assert strip_reasoning(text) == text
    assert not has_reasoning(text)


def test_a_million_characters_of_tags_take_no_time() -> None:
    began = time.monotonic()
    for piece in (
        "<think>",
        "</think>",
        "```\n",
        "`<think>",
        "<think ",
        "<|channel|>a",
        "think<",
        ".assistantfinalA",
        "assistantanalysisA",
        "<unused94>",
        "`assistantfinal",
    ):
        strip_reasoning(piece * (1_000_000 // len(piece)))
    assert time.monotonic() - began < 20
