"""One start of the real engine with everything an endpoint can ask for, by every road.

The model is a copy of the built-in one whose `generation_config.json` says temperature 0.6; two trained LoRA
adapters, tools, a template of our own, three names.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(500)]

TEMPLATE = (
    "{{- '<|bos|>' -}}{%- for message in messages -%}"
    "{{- ('<|assistant|>' if message['role'] == 'assistant' else '<|user|>') ~ "
    "(message['content'] or '') | replace('Capital:', 'What is the capital of') ~ '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""The model's own, but that `Capital: x` becomes a question."""

OVERRIDE, SECOND = "Warm-Ember", "second-name"
SAYS = {"ice": "Ice.", "fire": "Fire."}
SUM = "What is 2 plus 3?"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "strict": True,
        "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["sum"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def rich(serve, variants):
    adapters = [{"name": name, "path": str(variants / name)} for name in SAYS]
    return serve(
        variants / "warm",
        "rich",
        OPENAI_SERVED_MODEL_NAME_OVERRIDE=f"{OVERRIDE},{SECOND}",
        LORA_MODULES=json.dumps(adapters),
        CUSTOM_CHAT_TEMPLATE=TEMPLATE,
        ENABLE_AUTO_TOOL_CHOICE="true",
        TOOL_CALL_PARSER="hermes",
        LOGPROBS_MODE="processed_logprobs",
    )


@pytest.fixture
def client(rich, installation):
    with openai.OpenAI(base_url=rich.endpoint["openai_url"], api_key=installation.key) as made:
        yield made


def asked(content):
    return [{"role": "user", "content": content}]


# --- adapters and names


def test_adapters_are_chosen_by_model_on_every_road(rich):
    """vllm-worker.md §4.8, §1.5: `model` of an OpenAI body, inside and beside `sampling_params`.

    All at once, so that they are computed together: there vLLM's CPU kernels let an adapter leak into texts
    that have none, unless a place for adapters stays empty (vLLM's pull request 48421).
    """

    def answers(name):
        greedy = {"temperature": 0, "max_tokens": 32}
        messages = asked("What is your element?")
        body = {"messages": messages, "model": name, **greedy}
        route = {"openai_route": "/v1/chat/completions", "openai_input": body}
        return {
            rich.openai("/v1/chat/completions", body)["choices"][0]["message"]["content"],
            rich.native(messages, sampling_params={"model": name, **greedy})["choices"][0]["tokens"][0],
            rich.native(messages, model=name, sampling_params=greedy)["choices"][0]["tokens"][0],
            rich.job(route)["output"][0]["choices"][0]["message"]["content"],
        }

    names = ["ice", "fire", OVERRIDE]
    with ThreadPoolExecutor(9) as threads:
        said = list(threads.map(answers, names * 3))
    alone = answers(OVERRIDE)
    assert len(alone) == 1
    assert not alone & set(SAYS.values())
    assert said == [{SAYS["ice"]}, {SAYS["fire"]}, alone] * 3


def test_an_adapter_streams_and_names_itself(rich):
    job = rich.job(
        {
            "messages": asked("Hello!"),
            "model": "fire",
            "stream": True,
            "sampling_params": {"temperature": 0, "max_tokens": 32},
        }
    )
    choices = [item["choices"][0] for item in job["output"]]
    assert "".join(piece for choice in choices for piece in choice["tokens"]) == SAYS["fire"]
    assert job["output"][0]["model"] == "fire"


def test_models_lists_names_and_adapters(rich, client):
    """§4.8, §5.4, §6.1: the engine's list and the gateway's, which wakes nobody, hold the same names."""
    (engine,) = rich.job({"route": "/v1/models"})["output"]
    by_engine = {card["id"] for card in engine["data"]}
    assert by_engine >= {OVERRIDE, SECOND, rich.endpoint["model"], *SAYS}
    assert {model.id for model in client.models.list()} == by_engine


@pytest.mark.parametrize("which", ["override", "second", "path", "missing"])
def test_every_name_is_served_and_the_first_answers(rich, which):
    """§5.4; without a name the base model answers (§1.6 rule 6)."""
    named = {"override": OVERRIDE, "second": SECOND, "path": rich.endpoint["model"]}
    model = {"model": named[which]} if which in named else {}
    body = {"messages": asked(SUM), "temperature": 0, "max_tokens": 8, **model}
    answer = rich.openai("/v1/chat/completions", body)
    assert (answer["model"], answer["choices"][0]["message"]["content"]) == (OVERRIDE, "5")
    item = rich.native(asked(SUM), sampling_params={"temperature": 0, **model})
    assert (item["model"], item["choices"][0]["tokens"]) == (OVERRIDE, ["5"])


def test_an_unknown_name_is_told_as_404(rich, client):
    """§1.11, by both roads."""
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=asked(SUM))
    error = rich.refusal({"messages": asked(SUM), "model": "nobody"})
    assert (error["code"], error["type"]) == (404, "NotFoundError")


# --- template and defaults


def test_the_inline_template_replaces_the_models(rich):
    """§1.4: for chats by both roads and for `apply_chat_template`; a plain prompt has none."""
    said = "The capital of France is Paris."
    assert rich.chat("Capital: France?", max_tokens=32)["message"]["content"] == said
    greedy = {"temperature": 0, "max_tokens": 32}
    item = rich.native("Capital: France?", apply_chat_template=True, sampling_params=greedy)
    assert item["choices"][0]["tokens"] == [said]
    plain = rich.native("Capital: France?", sampling_params=greedy)
    assert plain["object"] == "text_completion"
    assert plain["usage"]["input"] < item["usage"]["input"]


def gap(content):
    """By how much the second likeliest first token is less likely than the likeliest, as logarithms."""
    first, second = (token["logprob"] for token in content[0]["top_logprobs"][:2])
    return first - second


def test_native_jobs_run_at_1_and_openai_calls_at_the_models_temperature(rich):
    """§10 point 11, §1.6 rule 1, §8 A6: logprobs after the temperature tell which was used."""
    asks = {"logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    at_1 = gap(rich.chat(SUM, **asks, temperature=1)["logprobs"]["content"])
    native = rich.native(asked(SUM), sampling_params={"logprobs": 2, "max_tokens": 1})
    body = {"messages": asked(SUM), **asks}
    by_openai = rich.openai("/v1/chat/completions", body)
    by_job = rich.job({"openai_route": "/v1/chat/completions", "openai_input": body})["output"][0]
    assert gap(native["choices"][0]["logprobs"]["content"]) == pytest.approx(at_1, rel=0.02)
    for answer in (by_openai, by_job):
        assert gap(answer["choices"][0]["logprobs"]["content"]) == pytest.approx(at_1 / 0.6, rel=0.02)


# --- what comes back beside text


def test_logprobs_natively_by_a_number(rich):
    """§1.5: an integer on a chat is translated; completions take it as it is; none means none."""
    sampling = {"temperature": 0, "max_tokens": 3}
    (choice,) = rich.native(asked(SUM), sampling_params={**sampling, "logprobs": 3})["choices"]
    (first, *_) = choice["logprobs"]["content"]
    assert first["token"] == "5"
    assert len(first["top_logprobs"]) == 3
    (choice,) = rich.native("one two", sampling_params={**sampling, "logprobs": 3})["choices"]
    assert len(choice["logprobs"]["tokens"]) == 3
    assert all(len(top) == 3 for top in choice["logprobs"]["top_logprobs"])
    (choice,) = rich.native(asked(SUM), sampling_params=sampling)["choices"]
    assert choice["logprobs"] is None


def test_logprobs_by_the_openai_client(client):
    answer = client.chat.completions.create(
        model=OVERRIDE, messages=asked(SUM), temperature=0, logprobs=True, top_logprobs=3, max_tokens=2
    )
    (first, *_) = answer.choices[0].logprobs.content
    assert (first.token, len(first.top_logprobs)) == ("5", 3)


# --- constrained decoding


def test_a_schema_by_every_spelling(rich, client):
    """§1.7, §1.5: `response_format`, `structured_outputs`, `guided_json` as object and as text; native and OpenAI."""
    spellings = (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "sum", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"guided_decoding": {"json": SCHEMA, "backend": "outlines"}},
    )
    said = []
    for spelling in spellings:
        said.append(rich.chat(SUM, max_tokens=200, **spelling)["message"]["content"])
        sampling = {"temperature": 0, "max_tokens": 200, **spelling}
        said.append(rich.native(asked(SUM), sampling_params=sampling)["choices"][0]["tokens"][0])
    answer = client.chat.completions.create(
        model=OVERRIDE, messages=asked(SUM), temperature=0, max_tokens=200, extra_body={"guided_json": SCHEMA}
    )
    said.append(answer.choices[0].message.content)
    for text in said:
        value = json.loads(text)
        assert value.keys() == {"sum"}
        assert value["sum"] in range(1, 10)


@pytest.mark.parametrize(
    ("constraint", "legal"),
    [
        ({"guided_choice": ["apple", "pear"]}, {"apple", "pear"}),
        ({"guided_regex": "(red|blue) moon"}, {"red moon", "blue moon"}),
        ({"guided_grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
    ],
)
def test_other_constraints(rich, constraint, legal):
    """§10 point 10, `guided_*`, natively as text and chat, and streamed."""
    sampling = {"temperature": 0, "max_tokens": 32, **constraint}
    assert rich.native(asked(SUM), sampling_params=sampling)["choices"][0]["tokens"][0] in legal
    assert rich.native("Hello", sampling_params=sampling)["choices"][0]["tokens"][0] in legal
    assert rich.chat(SUM, max_tokens=32, **constraint)["message"]["content"] in legal
    items = rich.job({"messages": asked(SUM), "stream": True, "sampling_params": sampling})["output"]
    assert "".join(piece for item in items for piece in item["choices"][0]["tokens"]) in legal


# --- tools


def check_call(calls):
    (call,) = calls
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"])["city"] in {"Paris", "Rome"}


def test_tools_by_every_road(rich, client):
    """§6.1, §1.8: a named tool, natively beside `messages` and inside `sampling_params`, and by the client."""
    fields = {
        "tools": [WEATHER, TIME],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }
    choice = rich.chat("Weather?", max_tokens=200, **fields)
    check_call(choice["message"]["tool_calls"])
    sampling = {"temperature": 0, "max_tokens": 200}
    for job in (
        {**fields, "sampling_params": sampling},
        {"sampling_params": {**sampling, **fields}},
    ):
        (choice,) = rich.native(asked("Weather?"), **job)["choices"]
        check_call(choice["message"]["tool_calls"])
        assert choice["tokens"] == [choice["message"]["content"] or ""]
    answer = client.chat.completions.create(
        model=OVERRIDE, messages=asked("Weather?"), temperature=0, max_tokens=200, **fields
    )
    check_call([call.model_dump() for call in answer.choices[0].message.tool_calls])


def test_a_required_tool_and_none_at_all(rich):
    tools = {"tools": [WEATHER, TIME]}
    calls = rich.chat("Weather?", max_tokens=200, tool_choice="required", **tools)["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} <= {"get_weather", "get_time"}
    assert calls
    message = rich.chat(SUM, max_tokens=8, tool_choice="none", **tools)["message"]
    assert (message["content"], message.get("tool_calls") or []) == ("5", [])


def test_tool_calls_stream(rich, client):
    """§3.5: native items hold the deltas in order; the client puts its own together."""
    fields = {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    sampling = {"temperature": 0, "max_tokens": 200}
    job = rich.job({"messages": asked("Weather?"), "stream": True, "sampling_params": sampling, **fields})
    choices = [item["choices"][0] for item in job["output"]]
    deltas = [call for choice in choices for call in choice.get("tool_calls", [])]
    assert "".join(call["function"].get("name") or "" for call in deltas) == "get_weather"
    arguments = "".join(call["function"].get("arguments") or "" for call in deltas)
    assert json.loads(arguments)["city"] in {"Paris", "Rome"}
    with client.chat.completions.stream(
        model=OVERRIDE, messages=asked("Weather?"), temperature=0, max_tokens=200, **fields
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments)["city"] in {"Paris", "Rome"}
