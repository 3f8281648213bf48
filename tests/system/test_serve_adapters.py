"""LoRA adapters, each under a name of its own: what they answer is what a model answers that they were merged into."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from served import Served, engine_of, make_adapter, make_folder, model, served
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """base, with the adapters calm and wild; and both again as models of their own."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_folder(folder / "base")
    names = ("calm", "wild")
    for seed, name in enumerate(names, start=10):
        make_adapter(base, folder / "lora" / name, folder / f"merged-{name}", seed)
    adapters = {name: str(folder / "lora" / name) for name in names}
    merged = [model(folder / f"merged-{name}", f"merged-{name}") for name in names]
    with served(model(base, "base", adapters=adapters), *merged) as one:
        yield one


def post(server: Served, route: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60)


def completion(server: Served, name: str, prompt: str) -> tuple[list[str], list[float]]:
    answer = post(server, "/v1/completions", model=name, prompt=prompt, max_tokens=16, temperature=0, logprobs=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    told = answer.json()["choices"][0]["logprobs"]
    return told["tokens"], told["token_logprobs"]


def test_an_adapter_answers_as_the_model_that_it_is_merged_into(server: Served) -> None:
    texts = []
    for _ in range(2):  # the second time, prompts come out of the cache, each name's its own
        for name in ("calm", "wild"):
            tokens, logprobs = completion(server, name, "Once upon a time there was")
            expected, numbers = completion(server, f"merged-{name}", "Once upon a time there was")
            assert tokens == expected
            assert logprobs == pytest.approx(numbers, abs=1e-3)
            texts.append(tokens)
    texts.append(completion(server, "base", "Once upon a time there was")[0])
    assert len({tuple(text) for text in texts}) == 3


def test_chats_streams_and_embeddings_have_it_too(server: Served) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 8}
    said = [
        post(server, "/v1/chat/completions", model=name, **body).json()["choices"][0]["message"]["content"]
        for name in ("base", "wild", "merged-wild")
    ]
    assert said[0] != said[1] == said[2]
    streamed = post(server, "/v1/completions", model="wild", prompt="Hi", max_tokens=4, stream=True).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert {event["model"] for event in events} == {"wild"}
    vectors = [
        post(server, "/v1/embeddings", model=name, input="Hi").json()["data"][0]["embedding"]
        for name in ("wild", "base", "merged-wild")
    ]
    assert vectors[0] == pytest.approx(vectors[2], abs=1e-4)
    assert vectors[0] != pytest.approx(vectors[1], abs=1e-2)


def test_kserve_knows_them(server: Served) -> None:
    body = {"text_input": "Once upon a time", "max_tokens": 12, "temperature": 0}
    said = {}
    for name in ("base", "wild", "merged-wild"):
        answer = post(server, f"/v2/models/{name}/generate", **body).json()
        assert answer["model_name"] == name
        said[name] = answer["output_ids"]
        assert httpx.get(f"{server.url}/v2/models/{name}/ready").status_code == 200
        assert httpx.get(f"{server.url}/v2/models/{name}").json()["name"] == name
        [counted] = httpx.get(f"{server.url}/v2/models/{name}/stats").json()["model_stats"]
        assert counted["name"] == name  # perf_analyzer looks for the name that it asks by
        assert counted["inference_count"] >= 1
    assert said["base"] != said["wild"] == said["merged-wild"]
    streamed = post(server, "/v2/models/wild/generate_stream", **body).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert [token for event in events for token in event["output_ids"]] == said["wild"]


def test_adapters_are_listed_behind_their_model(server: Served) -> None:
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [(card["id"], card["parent"], card["root"]) for card in cards] == [
        ("base", None, "base"),
        ("calm", "base", "base"),
        ("wild", "base", "base"),
        ("merged-calm", None, "merged-calm"),
        ("merged-wild", None, "merged-wild"),
    ]
    assert httpx.get(f"{server.url}/v1/models/wild").json() == cards[2]
    tokens = post(server, "/tokenize", model="wild", prompt="Hi").json()["tokens"]
    assert post(server, "/detokenize", model="wild", tokens=tokens).json() == {"prompt": "Hi"}


def test_the_index_has_all_that_can_be_asked(tmp_path: Path) -> None:
    """An adapter stands behind its model, as ready as that is; it comes and goes with it, and not by itself."""
    base = make_folder(tmp_path / "base")
    make_adapter(base, tmp_path / "calm", tmp_path / "merged", 10)
    adapted = model(base, "base", adapters={"calm": str(tmp_path / "calm")})
    with served(adapted, grpc_port=0, model_control=True) as one:
        clients = (
            triton_http.InferenceServerClient(one.url.removeprefix("http://")),
            triton_grpc.InferenceServerClient(f"127.0.0.1:{one.grpc_port}"),
        )

        def index(client: Any) -> list[tuple[str, str, str]]:
            found = client.get_model_repository_index(**as_json(client))
            found = found if isinstance(found, list) else found.get("models", [])
            return [(it["name"], it.get("version", ""), it["state"]) for it in found]

        def as_json(client: Any) -> dict[str, bool]:
            return {"as_json": True} if client is clients[1] else {}

        for number, client in enumerate(clients, start=1):
            assert index(client) == [("base", str(number), "READY"), ("calm", str(number), "READY")]
            assert all(client.is_model_ready(name) for name, _, _ in index(client))
            with pytest.raises(
                InferenceServerException, match="calm is an adapter of base, and comes and goes with it"
            ):
                client.unload_model("calm")
            client.unload_model("base")
            assert index(client) == [("base", "", "UNAVAILABLE"), ("calm", "", "UNAVAILABLE")]
            client.load_model("base")
            counted = client.get_inference_statistics(**as_json(client))["model_stats"]
            assert [it["name"] for it in counted] == ["base"]  # whose adapters' are its own: none counts twice
            client.close()


def test_adapters_have_metrics_of_their_own(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        found = re.findall(r"^(weft:adapter_.*|vllm:lora_requests_info{.*}) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    completion(server, "calm", "Hi")
    before = told()
    completion(server, "calm", "Hi")
    after = told()
    tokens = 'weft:adapter_generation_tokens_total{adapter="calm",model_name="base"}'
    ends = 'weft:adapter_requests_total{adapter="calm",finished_reason="length",model_name="base"}'
    assert (after[tokens] - before[tokens], after[ends] - before[ends]) == (16, 1)
    idle = 'vllm:lora_requests_info{max_lora="2",model_name="base",running_lora_adapters="",waiting_lora_adapters=""}'
    assert after[idle] > 0
    engine = engine_of(server.catalogue.models["base"].current)
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.02), step())[1])  # or it is over before it is looked at
    with httpx.stream(
        "POST", f"{server.url}/v1/completions",
        json={"model": "wild", "prompt": "Hi", "max_tokens": 400, "stream": True, "ignore_eos": True},
    ) as answer:  # fmt: skip
        lines = answer.iter_lines()  # kept: without a reader it hangs up
        next(lines)
        assert any('running_lora_adapters="wild"' in name for name in told())


def test_a_model_that_is_gone_takes_its_adapters_with_it(server: Served) -> None:
    server.call(server.catalogue.unload, "base")
    cards = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["merged-calm", "merged-wild"]
    refused = post(server, "/v1/completions", model="wild", prompt="Hi")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert refused.json()["error"]["message"].endswith("; it was unloaded")
    health = httpx.get(f"{server.url}/health/generate", timeout=30)
    assert (health.status_code, set(health.json()["models"])) == (200, {"merged-calm", "merged-wild"})
    server.call(server.catalogue.load, "base")
    completion(server, "wild", "Hi")
