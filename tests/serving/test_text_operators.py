"""What an operator of the text endpoint has: metrics, ids, a log of requests, a name, a template, and a key."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from ibnorm_export.errors import ConfigError
from ibnorm_export.generation.sampling import Sampling
from ibnorm_export.generation.text_model import open_folder
from ibnorm_export.serving.options import ReadyServer
from ibnorm_export.serving.text.metrics import Metrics
from ibnorm_export.serving.text_settings import TextSettings, read_api_key
from tests.support.running_server import PATIENCE_S, Running, running

KEY = "sk-a-key-of-the-test"
TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def operated(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An endpoint with everything that an operator can set; the key comes from a file."""
    folder = tmp_path_factory.mktemp("operated")
    (folder / "key").write_text(f"{KEY}\n")
    (folder / "chat.jinja").write_text(TEMPLATE)
    settings = ["--model-name", "house/noise", "--chat-template", folder / "chat.jinja"]
    with running(noise, *settings, "--api-key-file", folder / "key", "--log-requests") as server:
        yield server


def client_of(server: Running, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{server.http}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)


def fetched(server: Running, path: str, **headers: str) -> tuple[int, Any, str]:
    """Status, headers and text of an answer."""
    request = urllib.request.Request(f"http://{server.http}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def figures(server: Running) -> dict[str, float]:
    status, headers, text = fetched(server, "/metrics", Authorization=f"Bearer {KEY}")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def logged(server: Running, name: str) -> dict[str, Any]:
    """The line of the log about the request with this id; lines before it are read over."""
    assert server.process.stderr is not None
    while line := server.process.stderr.readline():
        if line.startswith("{") and json.loads(line)["id"] == name:
            found: dict[str, Any] = json.loads(line)
            return found
    raise AssertionError(f"no line about {name}")


def test_the_name_and_the_template_are_the_operators(operated: Running, noise: Path) -> None:
    client = client_of(operated)
    assert [model.id for model in client.models.list()] == ["house/noise"]
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model="house/noise", messages=messages, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == open_folder(noise).generate("[Hello]", Sampling(8, 0.0)).text


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nowhere"])
def test_without_the_key_everything_but_health_is_refused(
    operated: Running, path: str, headers: dict[str, str]
) -> None:
    status, answered, text = fetched(operated, path, **headers)
    assert status == 401
    assert answered["www-authenticate"] == "Bearer"
    error = json.loads(text)["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert KEY not in text
    assert fetched(operated, "/health", **headers)[0] == 200


def test_the_client_raises_its_own_error_without_the_key(operated: Running) -> None:
    with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
        client_of(operated, "wrong").completions.create(model="house/noise", prompt="x", max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
def test_metrics_count_requests_and_tokens(operated: Running, stream: bool) -> None:
    before = figures(operated)
    given: Any = {"model": "house/noise", "prompt": "import", "max_tokens": 5, "temperature": 0, "stream": stream}
    answer = client_of(operated).completions.create(**given)
    if stream:
        list(answer)
    fetched(operated, "/nowhere", Authorization=f"Bearer {KEY}")
    after = figures(operated)
    counted = {name: after[name] - before.get(name, 0.0) for name in after if after[name] != before.get(name, 0.0)}
    path = 'path="/v1/completions"'
    assert counted[f'ibnorm_requests_total{{{path},status="200"}}'] == 1
    assert counted['ibnorm_requests_total{path="other",status="404"}'] == 1
    assert counted["ibnorm_prompt_tokens_total"] == 6
    assert counted["ibnorm_generated_tokens_total"] == 5
    assert counted["ibnorm_first_token_seconds_count"] == 1
    assert counted[f'ibnorm_request_seconds_bucket{{{path},le="+Inf"}}'] == 1
    assert 0.0 < counted["ibnorm_first_token_seconds_sum"] <= counted[f"ibnorm_request_seconds_sum{{{path}}}"]
    assert after["ibnorm_texts_running"] == 0.0
    assert after["ibnorm_texts_limit"] == 16.0
    assert any(re.fullmatch(r'ibnorm_build_info\{version="[^"]+",model="house/noise"\}', name) for name in after)


def test_every_request_has_an_id_and_a_line_of_the_log(operated: Running) -> None:
    client = client_of(operated)
    answer = client.completions.with_raw_response.create(
        model="house/noise", prompt="private", max_tokens=3, extra_headers={"X-Request-Id": "job-17"}
    )
    assert answer.headers["x-request-id"] == "job-17"
    line = logged(operated, "job-17")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (7, 3)
    assert line["seconds"] > 0.0
    assert "private" not in json.dumps(line)
    status, headers, _ = fetched(operated, "/v1/models")
    assert status == 401
    assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
    assert logged(operated, headers["x-request-id"])["status"] == 401
    forged = fetched(operated, "/health", **{"X-Request-Id": "x y"})[1]["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", forged), "an id that could break a log is replaced"


def test_ready_names_a_command_that_works_as_it_is() -> None:
    paths = ("/v1/models", "/v1/completions")
    server = ReadyServer("127.0.0.1:8000", 1, models=("it's",), paths=paths)
    last = str(server).splitlines()[-1]
    assert last.startswith("try it: curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d ")
    assert "it'\"'\"'s" in last
    keyed = ReadyServer("0.0.0.0:1", 1, models=("m",), paths=(*paths, "/v1/chat/completions"), needs_key=True)
    assert "http://localhost:1/v1/chat/completions" in str(keyed)
    assert '-H "Authorization: Bearer $API_KEY"' in str(keyed)


@pytest.mark.parametrize(("content", "words"), [("", "0 words"), ("a b", "2 words"), (None, "cannot be read")])
def test_a_file_that_holds_no_key(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_api_key(tmp_path / "key")


def test_settings_are_checked_and_do_not_show_the_key() -> None:
    assert KEY not in repr(TextSettings(api_key=KEY))
    with pytest.raises(ConfigError, match="without spaces") as caught:
        TextSettings(api_key=f"{KEY} {KEY}")
    assert KEY not in str(caught.value)
    with pytest.raises(ConfigError, match="the model's name is 'a b'"):
        TextSettings("a b")


def test_labels_of_metrics_are_escaped_and_buckets_add_up() -> None:
    metrics = Metrics(0.0, {"model": 'a"b\\c\nd'})
    for seconds in (0.004, 0.005, 0.006, 500.0):
        metrics.count_request("other", 200, seconds=seconds, stream_error="timeout")
    lines = metrics.text({}).splitlines()
    assert r'ibnorm_build_info{model="a\"b\\c\nd"} 1' in lines
    assert 'ibnorm_request_seconds_bucket{path="other",le="0.005"} 2' in lines
    assert 'ibnorm_request_seconds_bucket{path="other",le="120"} 3' in lines
    assert 'ibnorm_request_seconds_bucket{path="other",le="+Inf"} 4' in lines
    assert 'ibnorm_stream_errors_total{code="timeout"} 4' in lines
    helped = [line.split()[2] for line in lines if line.startswith("# HELP")]
    assert len(helped) == len(set(helped)) == sum(line.startswith("# TYPE") for line in lines)
